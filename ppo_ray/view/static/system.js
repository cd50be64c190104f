// The system: what a step's seconds were spent on, and what each rollout worker did.
import { get, readAddress, writeAddress } from "./api.js";
import { duration, fill, h, number, runColour } from "./dom.js";

/** A step's parts in the order in which they follow one another, and the parts that they hold themselves. */
const PARTS = [
  ["time/publish_s", "weights: publish", "sync"],
  ["time/sync_s", "weights: to the engines", "sync"],
  ["time/generate_s", "generation", "generate"],
  ["time/score_s", "scoring", "score"],
  ["time/old_s", "learner: policy and reference before", "learn"],
  ["time/estimate_s", "learner: rewards, advantages", "learn"],
  ["time/update_s", "learner: optimizer steps", "learn"],
];

export async function render(main, runs, options) {
  const steps = runs[0][1].metrics.step ?? [];
  const view = { step: options.step === undefined ? (steps.at(-1) ?? 0) : Number(options.step) };
  const draw = async () => {
    const bar = h(
      "div",
      { class: "bar" },
      h(
        "label",
        { class: "field" },
        h("span", {}, "step"),
        h("input", {
          type: "number",
          min: 0,
          value: view.step,
          onchange: (event) => change(Number(event.target.value)),
        }),
      ),
      h("input", {
        type: "range",
        min: steps[0] ?? 0,
        max: steps.at(-1) ?? 0,
        value: view.step,
        "aria-label": "step",
        onchange: (event) => change(Number(event.target.value)),
      }),
    );
    const cards = await Promise.all(runs.map(([index, run]) => showRun(index, run, view.step)));
    fill(main, bar, cards);
  };
  const change = (step) => {
    view.step = step;
    writeAddress("system", { ...readAddress().options, step });
    draw();
  };
  await draw();
  return { update: (now) => ((runs = now), draw()) };
}

async function showRun(index, run, step) {
  const at = run.metrics.step?.indexOf(step) ?? -1;
  const title = h("h2", {}, h("span", { class: "dot", style: { background: runColour(index) } }), run.name);
  if (at < 0) return h("section", {}, title, h("p", { class: "hint" }, `This run has no step ${step}.`));
  return h(
    "section",
    {},
    title,
    h("div", { class: "card" }, h("h3", {}, `Step ${step}`), timeline(run, at)),
    h("div", { class: "card" }, h("h3", {}, "Every step"), history(run)),
    await showWorkers(index, run, step),
  );
}

/** A bar per part. Parts overlap where generation goes on beside learning, so a bar begins where the one before ends. */
function timeline(run, at) {
  const value = (name) => run.metrics[name]?.[at] ?? null;
  const whole = value("time/step_s");
  const parts = PARTS.map(([name, title, kind]) => ({ name, title, kind, seconds: value(name) })).filter(
    (part) => part.seconds !== null,
  );
  const sum = parts.reduce((total, part) => total + part.seconds, 0);
  const isOverlapped = (value("rollout/staleness_max") ?? 0) > 0 || value("time/wait_s") !== null;
  const length = Math.max(whole ?? 0, sum) || 1;
  let begin = 0;
  const rows = parts.map((part) => {
    const row = h(
      "div",
      { class: "lane" },
      h("span", { class: "lane-name" }, part.title, h("code", {}, part.name)),
      h(
        "span",
        { class: "track" },
        h("i", {
          class: `span ${part.kind}`,
          style: { left: `${(100 * begin) / length}%`, width: `max(${(100 * part.seconds) / length}%, 2px)` },
        }),
      ),
      h("span", { class: "num" }, duration(part.seconds)),
      h("span", { class: "num share" }, whole ? `${Math.round((100 * part.seconds) / whole)} %` : ""),
    );
    begin += part.seconds;
    return row;
  });
  const left = whole === null ? null : whole - sum;
  const words = isOverlapped
    ? "Generation and scoring of this batch went on beside the update before: the parts add up to more than the step."
    : left !== null && left > 0.02 * whole
      ? `The step took ${duration(whole)}; ${duration(left)} of them are none of these parts: checkpoints, evaluations, the log.`
      : `The step took ${duration(whole)}.`;
  return [
    h("div", { class: "lanes" }, rows),
    h("p", { class: "hint" }, words, " Of workers in parallel the slowest counts."),
  ];
}

/** Each step as a column of its parts. */
function history(run) {
  const steps = run.metrics.step ?? [],
    every = Math.ceil(steps.length / 240);
  const groups = [
    ["sync", ["time/publish_s", "time/sync_s"]],
    ["generate", ["time/generate_s"]],
    ["score", ["time/score_s"]],
    ["learn", ["time/learn_s"]],
  ];
  const sums = steps.map((_, at) =>
    groups.map(([, names]) => names.reduce((sum, name) => sum + (run.metrics[name]?.[at] ?? 0), 0)),
  );
  const most = Math.max(...sums.map((parts) => parts.reduce((sum, part) => sum + part, 0)), 1e-9);
  const columns = sums
    .filter((_, at) => at % every === 0)
    .map((parts, place) =>
      h(
        "span",
        {
          class: "column",
          title: `step ${steps[place * every]}: ${groups.map(([name], index) => `${name} ${duration(parts[index])}`).join(", ")}`,
        },
        parts.map((part, index) =>
          h("i", { class: `span ${groups[index][0]}`, style: { height: `${(100 * part) / most}%` } }),
        ),
      ),
    );
  return [
    h("div", { class: "columns" }, columns),
    h(
      "p",
      { class: "legend" },
      groups.map(([name]) => [
        h("span", { class: `swatch span ${name}` }),
        { sync: "weights", generate: "generation", score: "scoring", learn: "learning" }[name],
      ]),
      h("span", { class: "spring" }),
      `highest: ${duration(most)}`,
    ),
  ];
}

async function showWorkers(index, run, step) {
  const { workers, notes } = await get(`runs/${index}/workers/${step}`);
  const batch = workers.reduce((sum, worker) => sum + worker.tokens, 0) || 1;
  const rows = workers.map((worker) =>
    h(
      "tr",
      {},
      h("td", {}, worker.name),
      h("td", { class: "num" }, worker.responses),
      h("td", { class: "num" }, worker.tokens.toLocaleString("en")),
      h("td", { class: "num" }, `${Math.round((100 * worker.tokens) / batch)} %`),
      h("td", { class: "num" }, worker.policy_version),
      h("td", { class: "num" }, number(worker.score)),
    ),
  );
  const heads = ["worker", "responses", "tokens", "share", "version", "mean score"];
  return h(
    "div",
    { class: "card" },
    h("h3", {}, "Rollout workers"),
    notes.map((note) => h("p", { class: "note" }, note)),
    h(
      "table",
      { class: "plain" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          heads.map((head, place) => h("th", { class: place ? "num" : null }, head)),
        ),
      ),
      h("tbody", {}, rows),
    ),
  );
}
