// The first page: how the runs stand, what left its healthy range, and every curve.
import { readAddress, state, writeAddress } from "./api.js";
import { isGoing } from "./app.js";
import { abscissa, draw, runLines } from "./charts.js";
import { duration, fill, h, number, runColour, select, show } from "./dom.js";

const WIDTHS = [1, 3, 5, 11, 25, 51];
const AXES = [["steps", "steps"], ["responses", "responses"], ["seconds", "seconds"]];
const last = (run, name) => run.metrics[name]?.at(-1) ?? null;
const dot = (run) => h("span", { class: "dot", style: { background: runColour(run) } });

export function render(main, runs, options) {
  const view = { kind: options.x ?? "steps", width: Number(options.smooth ?? 5), charts: [] };
  const standing = h("section"), health = h("section"), curves = h("section"), rest = h("section");
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
    select("smoothed over", WIDTHS.map((width) => [width, width === 1 ? "nothing" : `${width} steps`]), view.width, (value) => change("smooth", value)),
    h("span", { class: "legend" }, h("span", { class: "swatch healthy" }), "healthy range", h("span", { class: "swatch event" }), "event", h("span", { class: "swatch held" }), "held-out"),
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

function showStanding(runs) {
  const rows = runs.map(([index, run]) => {
    const known = state.known.runs[index];
    const scores = (run.metrics["score/mean"] ?? []).filter((value) => value !== null);
    const held = run.held_out.filter((item) => item["eval/score_mean"] !== undefined);
    const [first, final] = [held[0]?.["eval/score_mean"], held.at(-1)?.["eval/score_mean"]];
    const seconds = (run.metrics["time/step_s"] ?? []).filter((value) => value !== null);
    const status = isGoing(known) ? ["going", "under way"] : run.last_event === "interrupted" && run.num_steps < run.num_planned ? ["stopped", "interrupted"] : run.num_steps === run.num_planned ? ["done", "done"] : ["stopped", "not finished"];
    return h(
      "tr",
      {},
      h("td", { class: "name", title: run.folder }, dot(index), run.name),
      h("td", {}, h("span", { class: `pill ${status[0]}` }, status[1])),
      h("td", { class: "num" }, `${run.num_steps}${run.num_planned ? ` / ${run.num_planned}` : ""}`, progress(run)),
      h("td", { class: "num" }, pair(scores[0], scores.at(-1))),
      h("td", { class: "num" }, held.length > 1 ? pair(first, final) : number(first)),
      h("td", { class: "num" }, number(last(run, "kl/per_sequence"))),
      h("td", { class: "num" }, number(last(run, "response/tokens_mean"))),
      h("td", { class: "num" }, duration(seconds.length ? seconds.reduce((sum, item) => sum + item, 0) / seconds.length : null)),
    );
  });
  const heads = ["run", "", "steps", "score", "held-out score", "KL", "length", "per step"];
  const facts = runs.length === 1 ? showFacts(runs[0][1]) : null;
  const notes = runs.flatMap(([, run]) => run.notes.map((note) => h("p", { class: "note" }, `${run.name}: `, show(note))));
  return [
    h("div", { class: "card flush" }, h("div", { class: "scroll" }, h("table", { class: "standing" }, h("thead", {}, h("tr", {}, heads.map((head, index) => h("th", { class: index > 1 ? "num" : null }, head)))), h("tbody", {}, rows))), facts),
    notes,
  ];
}

const pair = (first, final) => [h("span", { class: "from" }, number(first), " → "), h("b", {}, number(final))];

function progress(run) {
  if (!run.num_planned) return null;
  return h("div", { class: "progress" }, h("div", { style: { width: `${(100 * run.num_steps) / run.num_planned}%` } }));
}

function showFacts(run) {
  const facts = Object.entries(run.facts).filter(([name]) => name !== "steps");
  return h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { title: value }, show(value)))));
}

function showHealth(runs) {
  const found = runs.flatMap(([index, run]) => run.unhealthy.map((item) => ({ ...item, index, run })));
  if (!found.length) return runs.some(([, run]) => run.num_steps) ? h("p", { class: "allclear" }, "✓ Every step lies within the healthy ranges.") : null;
  const rows = found.map(({ name, range, remedy, steps, index, run }) =>
    h("li", {}, runs.length > 1 ? dot(index) : null, h("a", { href: `#chart-${name}`, onclick: (event) => lead(event, name) }, name), ` left its healthy range (${range}) in ${steps.length} of ${run.num_steps} steps, last at step ${steps.at(-1)}: `, h("span", { class: "remedy" }, remedy), "."),
  );
  return h("details", { class: "card health", open: true }, h("summary", {}, `${found.length} ${found.length === 1 ? "figure" : "figures"} left the healthy range`), h("ul", {}, rows));
}

function lead(event, name) {
  event.preventDefault();
  const card = [...document.querySelectorAll(".chart")].find((item) => item.dataset.names.split(" ").includes(name));
  card?.scrollIntoView({ behavior: "smooth", block: "center" });
  card?.classList.add("found");
  setTimeout(() => card?.classList.remove("found"), 1600);
}

function drawCurves(section, runs, view) {
  const groups = new Map();
  const listed = new Set(state.known.panels.flatMap((panel) => panel.names));
  const parts = [...new Set(runs.flatMap(([, run]) => Object.keys(run.metrics)))].filter((name) => /^parts\/.*_mean$/.test(name) && !listed.has(name));
  const unhealthy = [...new Set(runs.flatMap(([, run]) => run.unhealthy.map((item) => item.name)))].filter((name) => !listed.has(name));
  const panels = [
    ...state.known.panels,
    ...parts.map((name) => ({ group: "Reward", title: `Part: ${name.slice(6, -5)}`, names: [name, `eval/${name.slice(6)}`], about: "mean of this part's scores before its weight" })),
    ...unhealthy.map((name) => ({ group: "Policy", title: name, names: [name], about: "", is_log: name.includes("ratio_min") })),
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
  const range = state.known.healthy[panel.names[0]] ?? null;
  const outside = runs.reduce((sum, [, run]) => sum + (run.unhealthy.find((item) => item.name === panel.names[0])?.steps.length ?? 0), 0);
  const values = h("span", { class: "values" });
  const plot = h("div", { class: "plot" });
  const events = runs.flatMap(([, run]) => placeEvents(run, view.kind));
  const showValues = (index, data) => {
    const items = lines.flatMap((line, place) => {
      if (line.run === undefined && line.held === undefined) return [];
      const value = index === null ? line.y.findLast((item) => item !== null && item !== undefined) : data[place + 1][index];
      if (value === null || value === undefined) return [];
      return [h("span", { style: { color: line.stroke }, class: line.held !== undefined ? "held-value" : null }, number(value, 4))];
    });
    fill(values, items);
  };
  showValues(null, null);
  jobs.push(() => draw(plot, { lines, isLog: panel.is_log, range, events, onCursor: showValues }));
  const sentence = range ? `${panel.about}. Healthy: ${range.text}; outside, ${range.remedy}` : panel.about;
  return h(
    "figure",
    { class: `chart${outside ? " outside" : ""}`, "data-names": panel.names.join(" ") },
    h("figcaption", { title: sentence }, h("b", {}, panel.title), outside ? h("span", { class: "warn", title: `outside ${range.text} in ${outside} steps: ${range.remedy}` }, `${outside} outside`) : null, values, h("code", {}, panel.names[0])),
    plot,
  );
}

function placeEvents(run, kind) {
  const x = abscissa(run, kind);
  const skipped = (run.metrics["policy/skipped_minibatches"] ?? []).flatMap((value, index) => (value > 0 ? [{ x: x[index] }] : []));
  const named = run.events.map((event) => ({ x: x[run.metrics.step?.indexOf(event.step)] ?? x.at(-1) ?? 0 }));
  return [...named, ...skipped];
}

function showEvents(runs) {
  const rows = runs.flatMap(([index, run]) =>
    run.events.map((event) => h("tr", {}, h("td", {}, dot(index), run.name), h("td", { class: "num" }, event.step), h("td", {}, String(event.event).replaceAll("_", " ")), h("td", {}, show(String(event.message ?? ""))))),
  );
  if (!rows.length) return null;
  return h("details", { class: "card", open: rows.length < 12 }, h("summary", {}, `${rows.length} ${rows.length === 1 ? "event" : "events"}`), h("table", { class: "plain" }, h("thead", {}, h("tr", {}, ["run", "step", "what", ""].map((head) => h("th", {}, head)))), h("tbody", {}, rows)));
}

function showHeldOut(runs) {
  return runs.map(([index, run]) => {
    const { before, after } = run.evaluations;
    if (!before || !after) return null;
    const rows = before.samples.slice(0, after.samples.length).map((old, row) => {
      const now = after.samples[row];
      const prompt = old.prompt === now.prompt ? old.prompt : `${old.prompt}\n${now.prompt}`;
      return h("tr", {}, h("td", { class: "text" }, show(prompt)), h("td", { class: "text" }, show(old.response)), h("td", { class: "num" }, number(old.score)), h("td", { class: "text" }, show(now.response)), h("td", { class: "num" }, number(now.score)));
    });
    const heads = ["prompt", "before", "score", "after", "score"];
    return h("details", { class: "card", open: runs.length === 1 }, h("summary", {}, dot(index), `Held-out responses of ${run.name}, before and after: mean score `, pair(before.mean_score, after.mean_score)), h("div", { class: "scroll" }, h("table", { class: "plain texts" }, h("thead", {}, h("tr", {}, heads.map((head) => h("th", {}, head)))), h("tbody", {}, rows))));
  });
}

function showOptions(runs) {
  const single = runs.length === 1;
  const write = (value) => (value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value, (_, item) => (item === null || item === false ? undefined : item)) : String(value));
  let heads, rows;
  if (single) {
    heads = ["option", "here", "default"];
    rows = runs[0][1].changes.map((item) => [item.name, write(item.value), write(item.default)]);
  } else {
    heads = ["option", ...runs.map(([, run]) => run.name)];
    const names = [...new Set(runs.flatMap(([, run]) => Object.keys(run.options)))];
    rows = names.map((name) => [name, ...runs.map(([, run]) => write(run.options[name]))]).filter(([, ...values]) => new Set(values).size > 1);
  }
  if (!rows.length) return null;
  const title = single ? `${rows.length} options are not the defaults` : `${rows.length} options differ between the runs`;
  return h("details", { class: "card", open: !single }, h("summary", {}, title), h("div", { class: "scroll" }, h("table", { class: "plain options" }, h("thead", {}, h("tr", {}, heads.map((head) => h("th", {}, head)))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, index) => h("td", { class: index ? "value" : "code" }, show(cell)))))))));
}
