// A response token by token, coloured by a figure.
import { get } from "./api.js";
import { draw } from "./charts.js";
import { colour, fill, h, hideTip, number, show, tip } from "./dom.js";

export const MORE = 1024;
const LONG = 20000; // characters of a text that are shown at once
const minus = (a, b) =>
  a && b ? a.map((value, index) => (value === null || b[index] === null ? null : value - b[index])) : null;

/** The figures of a token by name: how to get them, and whether zero is their middle. */
export const FIGURES = {
  logprob: ["log-probability", (f) => f.old_logprobs ?? f.rollout_logprobs, false],
  ratio: ["log-ratio to the reference", (f) => minus(f.old_logprobs, f.ref_logprobs), true],
  kl: ["KL", (f) => f.kl, true],
  value: ["value", (f) => f.values, true],
  reward: ["reward", (f) => f.rewards, true],
  advantage: ["advantage", (f) => f.advantages, true],
  return: ["return", (f) => f.returns, true],
  mismatch: ["engine less learner", (f) => minus(f.rollout_logprobs, f.old_logprobs), true],
};

/** A text, cut where it is very long; the rest comes when it is asked for. */
export function long(text) {
  if (text.length <= LONG) return show(text);
  const rest = h(
    "button",
    {
      class: "quiet more",
      onclick: () =>
        rest.replaceWith(
          ...show(text.slice(LONG, 20 * LONG)),
          text.length > 20 * LONG ? ` … and ${(text.length - 20 * LONG).toLocaleString("en")} characters more` : "",
        ),
    },
    `show more of ${text.length.toLocaleString("en")} characters`,
  );
  return [...show(text.slice(0, LONG)), rest];
}

/** The response token by token: `paint(figure)` colours it. */
export function tokenView(sample, path, chosen) {
  const box = h("div", { class: "tokens", role: "list", "aria-label": "tokens of the response" });
  const plain = h("div", { class: "tokens text" });
  const legend = h("div", { class: "scale" }),
    plot = h("div", { class: "plot" });
  const data = { ids: [], texts: sample.tokens.texts ? [] : null, figures: {} };
  let chart = null,
    now = chosen;

  const append = ({ ids, texts, figures }) => {
    data.ids.push(...ids);
    data.texts?.push(...(texts ?? []));
    for (const [name, values] of Object.entries(figures))
      data.figures[name] = values && [...(data.figures[name] ?? []), ...values];
    const from = box.childElementCount;
    box.append(...ids.map((id, index) => token(from + index, texts ? texts[index] : String(id))));
  };
  const token = (place, text) => {
    const shown = text === "" ? ["·"] : show(text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t"));
    const describe = (event) => tip(event, explain(place, text));
    return h(
      "span",
      {
        class: `token${sample.tokens.texts ? "" : " id"}`,
        role: "listitem",
        tabindex: place ? -1 : 0,
        "data-place": place,
        onmouseenter: describe,
        onfocus: describe,
        onmouseleave: hideTip,
        onblur: hideTip,
      },
      shown,
    );
  };
  const explain = (place, text) => {
    const rows = Object.entries(FIGURES).map(([key, [name, read]]) => {
      const values = read(data.figures);
      return values
        ? h(
            "tr",
            { class: key === now ? "now" : null },
            h("td", {}, name),
            h("td", { class: "num" }, number(values[place], 4)),
          )
        : null;
    });
    return [
      h(
        "div",
        { class: "what" },
        h("b", {}, show(JSON.stringify(text))),
        h("span", {}, ` token ${place + 1} of ${sample.num_tokens}, id ${data.ids[place]}`),
      ),
      h("table", {}, rows),
    ];
  };
  const more = h("button", {
    class: "quiet",
    onclick: async () => {
      const next = await get(path, { offset: data.ids.length, limit: MORE });
      append(next.tokens);
      paint(now);
    },
  });
  const paint = (figure) => {
    now = figure;
    const [name, read, isCentred] = FIGURES[figure] ?? [];
    const values = figure ? read(data.figures) : null;
    const scale = values && makeScale(values, isCentred);
    [...box.children].forEach((span, place) => {
      const value = values?.[place];
      span.style.background = scale && value !== null && value !== undefined ? scale.paint(value) : "";
    });
    fill(
      legend,
      scale
        ? [
            h("span", {}, number(scale.low)),
            h("i", { style: { background: scale.gradient } }),
            h("span", {}, number(scale.high)),
            h("em", {}, name),
          ]
        : figure
          ? h("em", {}, "this response has no such figure: it was left out of the update")
          : null,
    );
    more.hidden = data.ids.length >= sample.num_tokens;
    more.textContent = `${data.ids.length.toLocaleString("en")} of ${sample.num_tokens.toLocaleString("en")} tokens: show more`;
    chart?.close();
    fill(plot);
    chart =
      values && values.length > 1
        ? draw(plot, {
            lines: [{ x: values.map((_, place) => place + 1), y: values, stroke: colour("accent"), width: 1.5 }],
            linked: false,
            height: 110,
            onCursor: (place) =>
              box.querySelector(".under")?.classList.remove("under") ||
              box.children[place ?? -1]?.classList.add("under"),
          })
        : null;
  };
  box.addEventListener("keydown", (event) => {
    const at = Number(event.target.dataset?.place);
    const to = box.children[at + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0)];
    if (to && to !== event.target) (to.focus(), event.preventDefault());
  });
  append(sample.tokens);
  const same = data.texts && data.texts.join("").startsWith(sample.response) && data.ids.length === sample.num_tokens;
  fill(plain, long(sample.response));
  const element = h(
    "div",
    { class: "response" },
    legend,
    box,
    more,
    plot,
    same
      ? null
      : h(
          "details",
          {},
          h(
            "summary",
            {},
            sample.tokens.texts
              ? "as one text"
              : "as one text (no tokenizer of this run is on this machine, so tokens are shown by their ids)",
          ),
          plain,
        ),
  );
  return { element, paint, close: () => (chart?.close(), hideTip()) };
}

/** A scale of colours from the lowest to the highest of most values; `isCentred`: two colours around zero. */
function makeScale(values, isCentred) {
  const known = values.filter((value) => value !== null).sort((a, b) => a - b);
  if (!known.length) return null;
  const at = (share) => known[Math.round(share * (known.length - 1))];
  const most = Math.max(Math.abs(at(0.02)), Math.abs(at(0.98)), 1e-9);
  const [low, high] = isCentred ? [-most, most] : [at(0.02), at(0.98)];
  const mix = (name, share) =>
    `color-mix(in oklab, var(--${name}) ${Math.round(100 * Math.min(Math.max(share, 0), 1))}%, transparent)`;
  if (isCentred)
    return {
      low,
      high,
      paint: (value) => (value < 0 ? mix("cold", -value / most) : mix("warm", value / most)),
      gradient: "linear-gradient(90deg, var(--cold), transparent, var(--warm))",
    };
  const span = high - low || 1; // a log-probability: the less likely, the stronger
  return {
    low,
    high,
    paint: (value) => mix("warm", (high - value) / span),
    gradient: "linear-gradient(90deg, var(--warm), transparent)",
  };
}
