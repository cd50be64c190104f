// The first page: how the runs stand, what left its healthy range, and every curve.
import { readAddress, state, writeAddress } from "./api.js";
import { abscissa, draw, runLines } from "./charts.js";
import { fill, h, number, select } from "./dom.js";
import { showEvents, showHealth, showHeldOut, showOptions, showStanding } from "./standing.js";

const WIDTHS = [1, 3, 5, 11, 25, 51];
const AXES = [
  ["steps", "steps"],
  ["responses", "responses"],
  ["seconds", "seconds"],
];
export function render(main, runs, options) {
  const view = { kind: options.x ?? "steps", width: Number(options.smooth ?? 5), charts: [] };
  const standing = h("section"),
    health = h("section"),
    curves = h("section"),
    rest = h("section");
  const change = (name, value) => {
    writeAddress("overview", { ...readAddress().options, [name]: value });
    view.kind = readAddress().options.x ?? "steps";
    view.width = Number(readAddress().options.smooth ?? 5);
    drawAll();
  };
  const controls = h(
    "div",
    { class: "bar" },
    select("against", AXES, view.kind, (value) => change("x", value)),
    select(
      "smoothed over",
      WIDTHS.map((width) => [width, width === 1 ? "nothing" : `${width} steps`]),
      view.width,
      (value) => change("smooth", value),
    ),
    h(
      "span",
      { class: "legend" },
      h("span", { class: "swatch healthy" }),
      "healthy range",
      h("span", { class: "swatch event" }),
      "event",
      h("span", { class: "swatch held" }),
      "held-out",
    ),
  );
  const drawAll = () => {
    view.charts.forEach((chart) => chart.close());
    view.charts = [];
    drawCurves(curves, runs, view);
  };
  const showAll = () => {
    fill(standing, showStanding(runs));
    fill(health, showHealth(runs));
    fill(rest, showEvents(runs), showHeldOut(runs), showOptions(runs));
  };
  fill(main, standing, health, controls, curves, rest);
  showAll();
  drawAll();
  return {
    close: () => view.charts.forEach((chart) => chart.close()),
    update: (now) => {
      runs = now;
      showAll();
      drawAll();
    },
  };
}

function drawCurves(section, runs, view) {
  const groups = new Map();
  const listed = new Set(state.known.panels.flatMap((panel) => panel.names));
  const parts = [...new Set(runs.flatMap(([, run]) => Object.keys(run.metrics)))].filter(
    (name) => /^parts\/.*_mean$/.test(name) && !listed.has(name),
  );
  const unhealthy = [...new Set(runs.flatMap(([, run]) => run.unhealthy.map((item) => item.name)))].filter(
    (name) => !listed.has(name),
  );
  const panels = [
    ...state.known.panels.filter((panel) => panel.group !== "Memory"), // of each actor, on the page of the system
    ...parts.map((name) => ({
      group: "Reward",
      title: `Part: ${name.slice(6, -5)}`,
      names: [name, `eval/${name.slice(6)}`],
      about: "mean of this part's scores before its weight",
    })),
    ...unhealthy.map((name) => ({
      group: "Policy",
      title: name,
      names: [name],
      about: "",
      is_log: name.includes("ratio_min"),
    })),
  ];
  for (const panel of panels) groups.set(panel.group, [...(groups.get(panel.group) ?? []), panel]);
  const jobs = [];
  const made = [...groups].map(([group, list]) => {
    const cards = list.map((panel) => makeCard(panel, runs, view, jobs)).filter(Boolean);
    return cards.length ? [h("h2", {}, group), h("div", { class: "grid" }, cards)] : [];
  });
  fill(section, made);
  view.charts = jobs.map((job) => job());
}

function makeCard(panel, runs, view, jobs) {
  const lines = runLines(runs, panel.names, view.kind, view.width);
  if (!lines.some((line) => line.y.some((value) => value !== null && value !== undefined))) return null;
  const ranges = runs.map(([, run]) => run.healthy[panel.names[0]] ?? null);
  const range = ranges.every((item) => item?.text === ranges[0]?.text) ? ranges[0] : null; // the losses' may differ
  const left = runs.flatMap(([, run]) =>
    run.unhealthy.filter((item) => item.name === panel.names[0]).map((item) => ({ ...item, run: run.name })),
  );
  const outside = left.reduce((sum, item) => sum + item.steps.length, 0);
  const words = left.map((item) => `${item.run}: outside ${item.range} in ${item.steps.length} steps: ${item.remedy}`);
  const values = h("span", { class: "values" });
  const plot = h("div", { class: "plot" });
  const events = runs.flatMap(([, run]) => placeEvents(run, view.kind));
  const showValues = (index, data) => {
    const items = lines.flatMap((line, place) => {
      if (line.run === undefined && line.held === undefined) return [];
      const value =
        index === null ? line.y.findLast((item) => item !== null && item !== undefined) : data[place + 1][index];
      if (value === null || value === undefined) return [];
      return [
        h(
          "span",
          { style: { color: line.stroke }, class: line.held !== undefined ? "held-value" : null },
          number(value, 4),
        ),
      ];
    });
    fill(values, items);
  };
  showValues(null, null);
  jobs.push(() => draw(plot, { lines, isLog: panel.is_log, range, events, onCursor: showValues }));
  const sentence = range ? `${panel.about}. Healthy: ${range.text}; outside, ${range.remedy}` : panel.about;
  return h(
    "figure",
    { class: `chart${outside ? " outside" : ""}`, "data-names": panel.names.join(" ") },
    h(
      "figcaption",
      { title: sentence },
      h("b", {}, panel.title),
      outside ? h("span", { class: "warn", title: words.join("\n") }, `${outside} outside`) : null,
      values,
      h("code", {}, panel.names[0]),
    ),
    plot,
  );
}

function placeEvents(run, kind) {
  const x = abscissa(run, kind);
  const skipped = (run.metrics["policy/skipped_minibatches"] ?? []).flatMap((value, index) =>
    value > 0 ? [{ x: x[index] }] : [],
  );
  const named = run.events.map((event) => ({ x: x[run.metrics.step?.indexOf(event.step)] ?? x.at(-1) ?? 0 }));
  return [...named, ...skipped];
}
