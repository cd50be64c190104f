// Tables of the overview: how runs stand, what left its healthy range, events, held-out responses, options.
import { state } from "./api.js";
import { isGoing } from "./app.js";
import { duration, h, number, runColour, show } from "./dom.js";

const last = (run, name) => run.metrics[name]?.at(-1) ?? null;
const dot = (run) => h("span", { class: "dot", style: { background: runColour(run) } });

export function showStanding(runs) {
  const rows = runs.map(([index, run]) => {
    const known = state.known.runs[index];
    const scores = (run.metrics["score/mean"] ?? []).filter((value) => value !== null);
    const held = run.held_out.filter((item) => item["eval/score_mean"] !== undefined);
    const [first, final] = [held[0]?.["eval/score_mean"], held.at(-1)?.["eval/score_mean"]];
    const seconds = (run.metrics["time/step_s"] ?? []).filter((value) => value !== null);
    const status = isGoing(known)
      ? ["going", "under way"]
      : run.last_event === "interrupted" && run.num_steps < run.num_planned
        ? ["stopped", "interrupted"]
        : run.num_steps === run.num_planned
          ? ["done", "done"]
          : ["stopped", "not finished"];
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
      h(
        "td",
        { class: "num" },
        duration(seconds.length ? seconds.reduce((sum, item) => sum + item, 0) / seconds.length : null),
      ),
    );
  });
  const heads = ["run", "", "steps", "score", "held-out score", "KL", "length", "per step"];
  const facts = runs.length === 1 ? showFacts(runs[0][1]) : null;
  const notes = runs.flatMap(([, run]) =>
    run.notes.map((note) => h("p", { class: "note" }, `${run.name}: `, show(note))),
  );
  return [
    h(
      "div",
      { class: "card flush" },
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          { class: "standing" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              heads.map((head, index) => h("th", { class: index > 1 ? "num" : null }, head)),
            ),
          ),
          h("tbody", {}, rows),
        ),
      ),
      facts,
    ),
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
  return h(
    "dl",
    { class: "facts" },
    facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { title: value }, show(value)))),
  );
}

export function showHealth(runs) {
  const found = runs.flatMap(([index, run]) => run.unhealthy.map((item) => ({ ...item, index, run })));
  if (!found.length)
    return runs.some(([, run]) => run.num_steps)
      ? h("p", { class: "allclear" }, "✓ Every step lies within the healthy ranges.")
      : null;
  const rows = found.map(({ name, range, remedy, steps, index, run }) =>
    h(
      "li",
      {},
      runs.length > 1 ? dot(index) : null,
      h("a", { href: `#chart-${name}`, onclick: (event) => lead(event, name) }, name),
      ` left its healthy range (${range}) in ${steps.length} of ${run.num_steps} steps, last at step ${steps.at(-1)}: `,
      h("span", { class: "remedy" }, remedy),
      ".",
    ),
  );
  return h(
    "details",
    { class: "card health", open: true },
    h("summary", {}, `${found.length} ${found.length === 1 ? "figure" : "figures"} left the healthy range`),
    h("ul", {}, rows),
  );
}

function lead(event, name) {
  event.preventDefault();
  const card = [...document.querySelectorAll(".chart")].find((item) => item.dataset.names.split(" ").includes(name));
  card?.scrollIntoView({ behavior: "smooth", block: "center" });
  card?.classList.add("found");
  setTimeout(() => card?.classList.remove("found"), 1600);
}

export function showEvents(runs) {
  const rows = runs.flatMap(([index, run]) =>
    run.events.map((event) =>
      h(
        "tr",
        {},
        h("td", {}, dot(index), run.name),
        h("td", { class: "num" }, event.step),
        h("td", {}, String(event.event).replaceAll("_", " ")),
        h("td", {}, show(String(event.message ?? ""))),
      ),
    ),
  );
  if (!rows.length) return null;
  return h(
    "details",
    { class: "card", open: rows.length < 12 },
    h("summary", {}, `${rows.length} ${rows.length === 1 ? "event" : "events"}`),
    h(
      "table",
      { class: "plain" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["run", "step", "what", ""].map((head) => h("th", {}, head)),
        ),
      ),
      h("tbody", {}, rows),
    ),
  );
}

export function showHeldOut(runs) {
  return runs.map(([index, run]) => {
    const { before, after } = run.evaluations;
    if (!before || !after) return null;
    const rows = before.samples.slice(0, after.samples.length).map((old, row) => {
      const now = after.samples[row];
      const prompt = old.prompt === now.prompt ? old.prompt : `${old.prompt}\n${now.prompt}`;
      return h(
        "tr",
        {},
        h("td", { class: "text" }, show(prompt)),
        h("td", { class: "text" }, show(old.response)),
        h("td", { class: "num" }, number(old.score)),
        h("td", { class: "text" }, show(now.response)),
        h("td", { class: "num" }, number(now.score)),
      );
    });
    const heads = ["prompt", "before", "score", "after", "score"];
    return h(
      "details",
      { class: "card", open: runs.length === 1 },
      h(
        "summary",
        {},
        dot(index),
        `Held-out responses of ${run.name}, before and after: mean score `,
        pair(before.mean_score, after.mean_score),
      ),
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          { class: "plain texts" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              heads.map((head) => h("th", {}, head)),
            ),
          ),
          h("tbody", {}, rows),
        ),
      ),
    );
  });
}

export function showOptions(runs) {
  const single = runs.length === 1;
  const write = (value) =>
    value === null || value === undefined
      ? "–"
      : typeof value === "object"
        ? JSON.stringify(value, (_, item) => (item === null || item === false ? undefined : item))
        : String(value);
  let heads, rows;
  if (single) {
    heads = ["option", "here", "default"];
    rows = runs[0][1].changes.map((item) => [item.name, write(item.value), write(item.default)]);
  } else {
    heads = ["option", ...runs.map(([, run]) => run.name)];
    const names = [...new Set(runs.flatMap(([, run]) => Object.keys(run.options)))];
    rows = names
      .map((name) => [name, ...runs.map(([, run]) => write(run.options[name]))])
      .filter(([, ...values]) => new Set(values).size > 1);
  }
  if (!rows.length) return null;
  const title = single
    ? `${rows.length} options are not the defaults`
    : `${rows.length} options differ between the runs`;
  return h(
    "details",
    { class: "card", open: !single },
    h("summary", {}, title),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "plain options" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            heads.map((head) => h("th", {}, head)),
          ),
        ),
        h(
          "tbody",
          {},
          rows.map((row) =>
            h(
              "tr",
              {},
              row.map((cell, index) => h("td", { class: index ? "value" : "code" }, show(cell))),
            ),
          ),
        ),
      ),
    ),
  );
}
