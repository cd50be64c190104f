// The frame of the page: which page is shown, which runs, light or dark, and what is new.
import { loadRuns, loadShown, readAddress, state, writeAddress } from "./api.js";
import { duration, fill, h, hideTip, runColour } from "./dom.js";
import * as overview from "./overview.js";
import * as samples from "./samples.js";
import * as sides from "./sides.js";
import * as spreads from "./spreads.js";
import * as system from "./system.js";

const PAGES = {
  overview: ["Overview", overview],
  samples: ["Samples", samples],
  sides: ["Side by side", sides],
  spreads: ["Distributions", spreads],
  system: ["System", system],
};
const FOLLOW_MS = 2000;
const main = document.getElementById("main");
let current = null;

function showTabs(page) {
  const tabs = Object.entries(PAGES).map(([key, [name]], index) =>
    h("a", { href: `#/${key}`, title: `${name} (${index + 1})`, "aria-current": key === page ? "page" : null }, name),
  );
  fill(document.getElementById("tabs"), tabs);
}

function showRuns() {
  const chips = state.known.runs.map((run, index) => {
    const pressed = state.shown.has(index);
    const toggle = () => {
      if (state.shown.has(index) && state.shown.size > 1) state.shown.delete(index);
      else state.shown.add(index);
      showRuns();
      render();
    };
    return h(
      "button",
      { class: "chip", "aria-pressed": pressed, title: run.folder, onclick: toggle },
      h("span", { class: "dot", style: { background: runColour(index) } }),
      run.name,
    );
  });
  const bar = document.getElementById("runs");
  bar.hidden = chips.length < 2;
  fill(bar, chips);
}

function showLive() {
  const going = state.known.runs.filter(isGoing);
  const newest = Math.min(...state.known.runs.map((run) => run.seconds_since ?? Infinity));
  const text = going.length ? `following, last step ${duration(newest)} ago` : "";
  fill(document.getElementById("live"), going.length ? h("span", { class: "pulse" }) : null, text);
}

/** Whether a run still makes steps, as far as its files say. */
export function isGoing(run) {
  const planned = run.num_planned === null || run.num_steps < run.num_planned;
  const patience = Math.max(120, 20 * (run.seconds_per_step ?? 30));
  return planned && run.last_event !== "interrupted" && run.seconds_since !== null && run.seconds_since < patience;
}

async function render() {
  const { page, options } = readAddress();
  const [name, code] = PAGES[page] ?? PAGES.overview;
  showTabs(page in PAGES ? page : "overview");
  document.title = `${name} · ppo-ray view`;
  hideTip();
  try {
    const runs = await loadShown();
    if (current?.code !== code) current?.close?.();
    current = { code, ...(await code.render(main, runs, options)) };
  } catch (error) {
    if (error.name !== "AbortError") fill(main, h("p", { class: "error", role: "alert" }, error.message));
  }
}

async function follow() {
  if (document.hidden) return;
  const before = JSON.stringify(state.known.runs.map((run) => [run.num_steps, run.last_event]));
  try {
    await loadRuns();
  } catch (error) {
    fill(document.getElementById("live"), h("span", { class: "lost" }, `no answer: ${error.message}`));
    return;
  }
  showLive();
  const after = JSON.stringify(state.known.runs.map((run) => [run.num_steps, run.last_event]));
  if (after !== before) current?.update?.(await loadShown());
}

const SUN = "☀",
  MOON = "☾";
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const dark = (theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  document.getElementById("theme").textContent = dark ? SUN : MOON;
  return dark;
}
function switchTheme() {
  const dark = setTheme(document.documentElement.dataset.theme);
  localStorage.setItem("ppo-ray-theme", dark ? "light" : "dark");
  setTheme(dark ? "light" : "dark");
  showRuns();
  render();
}

const KEYS = [
  ["1 … 5", "the pages"],
  ["/", "search the texts of samples"],
  ["j, k", "next, previous sample"],
  ["Enter", "open a sample"],
  ["Esc", "close it"],
  ["t", "light or dark"],
  ["?", "this help"],
];
function showHelp() {
  const box = document.getElementById("help");
  if (box.open) return box.close();
  const rows = KEYS.map(([key, meaning]) => h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, meaning)));
  fill(
    box,
    h("h2", {}, "Keyboard"),
    h("table", { class: "plain" }, rows),
    h("p", { class: "hint" }, "In charts: drag to look closer, double-click to see all."),
    h("button", { onclick: () => box.close() }, "Close"),
  );
  box.showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input, select, textarea");
  if (typing && event.key !== "Escape") return;
  const page = Object.keys(PAGES)[Number(event.key) - 1];
  if (page) location.hash = `#/${page}`;
  else if (event.key === "t") switchTheme();
  else if (event.key === "?") showHelp();
  else if (current?.key?.(event)) event.preventDefault();
});

async function start() {
  setTheme(localStorage.getItem("ppo-ray-theme"));
  document.getElementById("theme").addEventListener("click", switchTheme);
  document.getElementById("keys").addEventListener("click", showHelp);
  matchMedia("(prefers-color-scheme: dark)").addEventListener(
    "change",
    () => (setTheme(document.documentElement.dataset.theme), render()),
  );
  try {
    const known = await loadRuns();
    known.runs.forEach((_, index) => state.shown.add(index));
  } catch (error) {
    return fill(main, h("p", { class: "error", role: "alert" }, error.message));
  }
  showRuns();
  showLive();
  window.addEventListener("hashchange", render);
  window.addEventListener("popstate", render);
  if (!location.hash) writeAddress("overview", {});
  await render();
  setInterval(follow, FOLLOW_MS);
}

start();
