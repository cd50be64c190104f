// Elements made of text: nothing here, or anywhere on this page, reads text as HTML.

// uPlot writes numbers in the browser's language; under the locale C a browser has one that JavaScript refuses.
try {
  new Intl.NumberFormat(navigator.language);
} catch {
  Object.defineProperty(navigator, "language", { value: "en-US" });
}

/** Make an element. Attributes: `class`, `style` (an object), `on...` (listeners), all others by their names. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") for (const [key, item] of Object.entries(value)) element.style.setProperty(key, item);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name === "class" ? "class" : name, value === true ? "" : String(value));
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/** Put new children in place of an element's old ones. */
export function fill(element, ...children) {
  element.replaceChildren(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
}

// Controls, marks of direction, invisible characters, halves of surrogate pairs: what a reader would not see as it is.
const HIDDEN =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff0-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** Return a text as nodes in which hidden characters are shown by their names. */
export function show(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    const code = match[0].charCodeAt(0);
    const name = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    const sign = code < 0x20 ? String.fromCharCode(0x2400 + code) : code === 0x7f ? "\u2421" : name;
    nodes.push(h("span", { class: "hidden-char", title: name }, sign));
    from = match.index + 1;
    if (nodes.length > 4000) break; // more signs than anybody reads
  }
  nodes.push(text.slice(from));
  return nodes;
}

/** Write a number as short as it can be read. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e").replace("-", "−");
  return value.toFixed(Math.max(0, digits - 1 - Math.max(0, Math.floor(Math.log10(size || 1))))).replace("-", "−");
}

/** Write seconds for people. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0995) return `${number(1000 * seconds, 2)} ms`;
  if (seconds < 90) return `${number(seconds, 2)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

/** A select of names, or of `[value, name]` pairs. */
export function select(label, options, value, change) {
  const made = options.map((option) => (Array.isArray(option) ? option : [option, option]));
  const element = h(
    "select",
    { onchange: (event) => change(event.target.value) },
    made.map(([key, name]) => h("option", { value: key }, name)),
  );
  element.value = value;
  return h("label", { class: "field" }, h("span", {}, label), element);
}

/** A colour of the theme. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

export const RUN_COLOURS = ["run-0", "run-1", "run-2", "run-3", "run-4", "run-5"];
export const runColour = (run) => colour(RUN_COLOURS[run % RUN_COLOURS.length]);

/** Show a box beside the pointer, or beside an element that has the focus. */
export function tip(event, ...children) {
  const box = document.getElementById("tip");
  fill(box, ...children);
  box.hidden = false;
  const at = event.currentTarget?.getBoundingClientRect?.() ?? event.target.getBoundingClientRect();
  const left = Math.min(at.left, window.innerWidth - box.offsetWidth - 12);
  const below = at.bottom + 8 + box.offsetHeight < window.innerHeight;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${below ? at.bottom + 8 : at.top - box.offsetHeight - 8}px`;
}

export function hideTip() {
  document.getElementById("tip").hidden = true;
}

/** A score with a bar for where it lies between the lowest and the highest. */
export function scored(value, limits) {
  if (value === null) return h("span", { class: "none", title: "not scored" }, "none");
  const share = limits && limits.max > limits.min ? (value - limits.min) / (limits.max - limits.min) : 0.5;
  return h("span", { class: "scored" }, h("i", { style: { width: `${Math.round(share * 34)}px` } }), number(value));
}
