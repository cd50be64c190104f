// The system: what a step's seconds were spent on, and what each rollout worker did.
import { get, readAddress, writeAddress } from "./api.js";
import { draw } from "./charts.js";
import { colour, duration, fill, h, number, runColour, RUN_COLOURS, show } from "./dom.js";

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
  let charts = [];
  const drawAll = async () => {
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
    const jobs = [];
    const cards = await Promise.all(runs.map(([index, run]) => showRun(index, run, view.step, jobs)));
    charts.forEach((chart) => chart.close());
    fill(main, bar, cards);
    charts = jobs.map((job) => job());
  };
  const change = (step) => {
    view.step = step;
    writeAddress("system", { ...readAddress().options, step });
    drawAll();
  };
  await drawAll();
  return { update: (now) => ((runs = now), drawAll()), close: () => charts.forEach((chart) => chart.close()) };
}

async function showRun(index, run, step, jobs) {
  const at = run.metrics.step?.indexOf(step) ?? -1;
  const title = h("h2", {}, h("span", { class: "dot", style: { background: runColour(index) } }), run.name);
  if (at < 0) return h("section", {}, title, h("p", { class: "hint" }, `This run has no step ${step}.`));
  const [{ workers, actors, notes }, memory] = await Promise.all([
    get(`runs/${index}/workers/${step}`),
    get(`runs/${index}/memory`),
  ]);
  return h(
    "section",
    {},
    title,
    h("div", { class: "card" }, h("h3", {}, `Step ${step}`), timeline(run, at, actors)),
    h("div", { class: "card" }, h("h3", {}, "Every step"), history(run)),
    showActors(actors),
    showMemory(memory, jobs),
    showWorkers(workers, notes),
  );
}

/** A bar per part. Parts overlap where generation goes on beside learning, so a bar begins where the one before ends. */
function timeline(run, at, actors) {
  const value = (name) => run.metrics[name]?.[at] ?? null;
  const whole = value("time/step_s");
  const parts = PARTS.map(([name, title, kind]) => ({ name, title, kind, seconds: value(name) })).filter(
    (part) => part.seconds !== null,
  );
  const sum = parts.reduce((total, part) => total + part.seconds, 0);
  const isOverlapped = (value("rollout/staleness_max") ?? 0) > 0 || value("time/wait_s") !== null;
  const length = Math.max(whole ?? 0, sum) || 1;
  let begin = 0;
  const lane = (name, kind, seconds, isOfActor) =>
    h(
      "div",
      { class: `lane${isOfActor ? " of-actor" : ""}` },
      h("span", { class: "lane-name" }, name),
      h(
        "span",
        { class: "track" },
        h("i", {
          class: `span ${kind}`,
          style: { left: `${(100 * begin) / length}%`, width: `max(${(100 * seconds) / length}%, 2px)` },
        }),
      ),
      h("span", { class: "num" }, duration(seconds)),
      h("span", { class: "num share" }, whole && !isOfActor ? `${Math.round((100 * seconds) / whole)} %` : ""),
    );
  const rows = parts.map((part) => {
    // a part that several actors have: a lane of each below it
    const shared = actors.filter((actor) => actor[part.name] !== undefined);
    const row = [
      lane([part.title, h("code", {}, part.name)], part.kind, part.seconds, false),
      shared.length > 1 ? shared.map((actor) => lane(actor.name, part.kind, actor[part.name], true)) : null,
    ];
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

const SECONDS = [
  ["weights", "time/sync_s"],
  ["generation", "time/generate_s"],
  ["scoring", "time/score_s"],
  ["learning", "time/learn_s"],
];
const MEMORY = [
  ["resident", ""],
  ["most ever", "_peak"],
  ["GPU, allocated", "_gpu"],
  ["GPU, reserved", "_gpu_reserved"],
];
const memoryOf = (name, place) => `memory/${name.replace(/-\d+$/, "")}${place}_gib`;

/** Where each actor ran, its own seconds, and its memory. */
function showActors(actors) {
  if (!actors.length)
    return h(
      "div",
      { class: "card" },
      h("h3", {}, "Actors"),
      h("p", { class: "hint" }, "This run's folder does not tell where its actors ran and what memory they took."),
    );
  const used = MEMORY.filter(([, place]) => actors.some((actor) => actor[memoryOf(actor.name, place)] !== undefined));
  const cell = (text) => h("td", { class: "num" }, text);
  const rows = actors.map((actor) =>
    h(
      "tr",
      {},
      h("td", {}, show(actor.name)),
      h("td", {}, show(actor.host ?? "–")),
      SECONDS.map(([, name]) => cell(actor[name] === undefined ? "" : duration(actor[name]))),
      used.map(([, place]) => cell(gib(actor[memoryOf(actor.name, place)]))),
    ),
  );
  const heads = ["actor", "machine", ...SECONDS.map(([name]) => name), ...used.map(([name]) => name)];
  return h(
    "div",
    { class: "card actors" },
    h("h3", {}, "Actors"),
    h("div", { class: "scroll" }, table(heads, rows, 2)),
    h(
      "p",
      { class: "hint" },
      "Resident memory counts what is mapped of Ray's object store. GPU memory is the most within the step, of torch.",
    ),
  );
}

const gib = (value) => (value === undefined ? "" : `${number(value)} GiB`);

/** Each actor's memory over the steps. */
function showMemory({ steps, actors }, jobs) {
  const names = Object.keys(actors);
  const stroke = (name) => colour(RUN_COLOURS[names.indexOf(name) % RUN_COLOURS.length]);
  const chart = (title, place) => {
    const of = names.filter((name) => memoryOf(name, place) in actors[name]);
    if (!of.length) return null;
    const plot = h("div", { class: "plot" });
    const lines = of.map((name) => ({ x: steps, y: actors[name][memoryOf(name, place)], stroke: stroke(name) }));
    jobs.push(() => draw(plot, { lines }));
    return h("figure", { class: "chart" }, h("figcaption", {}, h("b", {}, title)), plot);
  };
  const charts = [chart("Resident memory, GiB", ""), chart("GPU memory, reserved, GiB", "_gpu_reserved")].filter(
    Boolean,
  );
  if (!charts.length) return null;
  return h(
    "div",
    { class: "card" },
    h("h3", {}, "Memory"),
    h("div", { class: "grid" }, charts),
    h(
      "p",
      { class: "legend" },
      names.map((name) => [h("span", { class: "dot", style: { background: stroke(name) } }), show(name)]),
    ),
  );
}

function table(heads, rows, texts) {
  return h(
    "table",
    { class: "plain" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        heads.map((head, place) => h("th", { class: place >= texts ? "num" : null }, head)),
      ),
    ),
    h("tbody", {}, rows),
  );
}

function showWorkers(workers, notes) {
  const batch = workers.reduce((sum, worker) => sum + worker.tokens, 0) || 1;
  const rows = workers.map((worker) =>
    h(
      "tr",
      {},
      h("td", {}, show(worker.name)),
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
    table(heads, rows, 1),
  );
}
