// Distributions: how a figure is spread in every step, its histogram in one, and that step's best and worst.
import { get, writeAddress } from "./api.js";
import { draw } from "./charts.js";
import { colour, fill, h, number, runColour, select, show } from "./dom.js";

const NAMES = {
  score: "score",
  kl: "KL per token",
  advantages: "advantage per token",
  log_ratio: "log-ratio to the reference per token",
  rollout_logprobs: "log-probability per token",
  values: "value per token",
  returns: "return per token",
  tokens: "length",
};
const BINS = 48;

export async function render(main, runs, options) {
  const view = {
    name: options.of in NAMES ? options.of : "score",
    step: options.step === undefined ? null : Number(options.step),
    charts: [],
  };
  const controls = h("div", { class: "bar" }),
    body = h("div");
  const write = () => writeAddress("spreads", { of: view.name === "score" ? "" : view.name, step: view.step });
  const close = () => (view.charts.forEach((chart) => chart.close()), (view.charts = []));

  async function load() {
    fill(
      controls,
      select("distribution of", Object.entries(NAMES), view.name, (value) => ((view.name = value), write(), load())),
    );
    fill(body, h("p", { class: "hint" }, "Reading the steps …"));
    try {
      const found = await Promise.all(runs.map(([index]) => get(`runs/${index}/spread/${view.name}`)));
      close();
      fill(body);
      for (const [place, [index, run]] of runs.entries()) await showRun(body, index, run, found[place], view, write);
    } catch (error) {
      fill(body, h("p", { class: "error", role: "alert" }, error.message));
    }
  }
  fill(main, controls, body);
  await load();
  return { close, update: (now) => ((runs = now), load()) };
}

async function showRun(body, index, run, { steps, notes }, view, write) {
  const known = steps.filter((step) => step.quantiles);
  const fan = h("div", { class: "plot" }),
    ridges = h("div", { class: "ridges" }),
    one = h("div");
  const section = h(
    "section",
    {},
    h("h2", {}, h("span", { class: "dot", style: { background: runColour(index) } }), run.name),
    notes.map((note) => h("p", { class: "note" }, show(note))),
  );
  body.append(section);
  if (!known.length) {
    section.append(h("p", { class: "hint" }, "No step has a value of this figure."));
    return;
  }
  section.append(
    h(
      "div",
      { class: "card" },
      h(
        "div",
        { class: "headline" },
        h("h3", {}, `${NAMES[view.name]} over the steps`),
        h(
          "span",
          { class: "legend" },
          "median; half and nine tenths of all values; 1 % and 99 % dotted. Click: a step",
        ),
      ),
      fan,
    ),
    ridges,
    one,
  );
  drawFan(
    fan,
    known,
    runColour(index),
    view,
    (step) => ((view.step = step), write(), showStep(one, index, run, view, known)),
  );
  await drawRidges(ridges, index, known, view);
  await showStep(one, index, run, view, known);
}

function drawFan(element, steps, stroke, view, onStep) {
  const x = steps.map((step) => step.step);
  const shade = (share) => `color-mix(in srgb, ${stroke} ${share}%, transparent)`;
  const line = (place, width, paint, dash) => ({
    x,
    y: steps.map((step) => step.quantiles[place]),
    stroke: paint,
    width,
    dash,
  });
  const [none, faint] = ["transparent", shade(60)];
  const lines = [
    line(0, 1, faint, [2, 3]),
    line(1, 0, none),
    line(2, 0, none),
    line(3, 2, stroke),
    line(4, 0, none),
    line(5, 0, none),
    line(6, 1, faint, [2, 3]),
  ];
  const chart = draw(element, {
    lines,
    linked: false,
    height: 240,
    bands: [
      { series: [6, 2], fill: shade(14) },
      { series: [5, 3], fill: shade(26) },
    ],
  });
  chart.plot.over.addEventListener("click", () => chart.plot.cursor.idx !== null && onStep(x[chart.plot.cursor.idx]));
  view.charts.push(chart);
}

/** Histograms of up to 24 steps, one above the other, as ridges. */
async function drawRidges(element, index, steps, view) {
  const most = 24,
    every = Math.max(1, (steps.length - 1) / (most - 1));
  const chosen = [
    ...new Set(Array.from({ length: Math.min(most, steps.length) }, (_, place) => steps[Math.round(place * every)])),
  ].filter(Boolean);
  const low = Math.min(...chosen.map((step) => step.quantiles[0])),
    high = Math.max(...chosen.map((step) => step.quantiles[6]));
  if (chosen.length < 2 || !(high > low)) return;
  const found = await Promise.all(
    chosen.map((step) => get(`runs/${index}/spread/${view.name}/${step.step}`, { bins: BINS, low, high })),
  );
  const stroke = runColour(index),
    width = 640,
    gap = 17,
    tall = 46;
  const x = (value) => 46 + ((value - low) / (high - low)) * (width - 60);
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const height = tall + gap * chosen.length + 18;
  const lines = found.flatMap(({ edges, counts }, place) => {
    const base = tall + gap * place,
      top = Math.max(...counts, 1);
    const points = counts.map(
      (count, bin) =>
        `${x((edges[bin] + edges[bin + 1]) / 2).toFixed(1)},${(base - (count / top) * tall * 0.92).toFixed(1)}`,
    );
    const path = `M${x(edges[0]).toFixed(1)},${base}L${points.join("L")}L${x(edges.at(-1)).toFixed(1)},${base}Z`;
    return [
      svg("path", { d: path, class: "ridge", fill: stroke, stroke }),
      svg("text", { x: 38, y: base, class: "tick", "text-anchor": "end" }, String(chosen[place].step)),
    ];
  });
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) =>
    svg(
      "text",
      { x: x(low + share * (high - low)), y: height - 3, class: "tick", "text-anchor": "middle" },
      number(low + share * (high - low)),
    ),
  );
  fill(
    element,
    h(
      "div",
      { class: "card" },
      h("h3", {}, `Histograms of ${NAMES[view.name]}, by step`),
      svg(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "histograms by step" },
        ...lines,
        ...ticks,
      ),
    ),
  );
}

async function showStep(element, index, run, view, known) {
  const steps = known.map((item) => item.step);
  const step = steps.includes(view.step) ? view.step : steps.at(-1);
  const { edges, counts, num_values } = await get(`runs/${index}/spread/${view.name}/${step}`, { bins: BINS });
  const ask = (order) =>
    get(`runs/${index}/samples`, { "min.step": step, "max.step": step, sort: "score", order, limit: 5 });
  const [best, worst] = await Promise.all([ask("desc"), ask("")]);
  const plot = h("div", { class: "plot" });
  const list = (title, { rows }) =>
    h(
      "div",
      { class: "card" },
      h("h3", {}, title),
      h(
        "table",
        { class: "samples" },
        h(
          "tbody",
          {},
          rows.map((row) =>
            h(
              "tr",
              { onclick: () => (location.hash = `#/samples?run=${index}&open=${row.step}.${row.row}`) },
              h("td", { class: "num" }, number(row.score)),
              h("td", { class: "excerpt" }, h("div", {}, show(row.response || "(no text)"))),
            ),
          ),
        ),
      ),
    );
  fill(
    element,
    h("div", { class: "card" }, h("h3", {}, `Step ${step}: ${num_values.toLocaleString("en")} values`), plot),
    h("div", { class: "two" }, list("Best scored", best), list("Worst scored", worst)),
  );
  const middle = counts.map((_, bin) => (edges[bin] + edges[bin + 1]) / 2);
  view.charts.push(
    draw(plot, {
      lines: [{ x: middle, y: counts, stroke: runColour(index), fill: colour("bar"), width: 1 }],
      bars: true,
      linked: false,
      isWhole: false,
      height: 180,
    }),
  );
}
