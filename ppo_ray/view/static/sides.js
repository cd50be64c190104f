// Two steps beside each other, of one run or of two: the same prompts first, each response token by token.
import { get, writeAddress } from "./api.js";
import { fill, h, number, runColour, select, show } from "./dom.js";
import { FIGURES, tokenView } from "./tokens.js";

const ORDERS = [
  ["score", "score"],
  ["kl", "KL"],
  ["tokens", "length"],
  ["advantage", "advantage"],
];
const MOST = 500;
const SHOWN = 40;

export async function render(main, runs, options) {
  const [firstRun, lastRun] = [runs[0], runs.at(-1)];
  const ends = (run) => [run[1].metrics.step?.[0] ?? 0, run[1].metrics.step?.at(-1) ?? 0];
  const read = (text, run, step) => {
    const [index, at, row] = (text ?? "").split(".").map(Number);
    const known = runs.some(([other]) => other === index);
    return {
      run: known ? index : run[0],
      step: Number.isInteger(at) ? at : step,
      row: Number.isInteger(row) ? row : null,
    };
  };
  const view = {
    a: read(options.a, firstRun, ends(firstRun)[0]),
    b: read(options.b, lastRun, ends(lastRun)[1]),
    sort: options.sort ?? "score",
    order: options.order ?? "desc",
    colour: options.colour in FIGURES ? options.colour : "ratio",
    opened: [],
  };
  const controls = h("div", { class: "bar" }),
    body = h("div");
  const write = () =>
    writeAddress("sides", {
      a: [view.a.run, view.a.step, ...(view.a.row === null ? [] : [view.a.row])].join("."),
      b: [view.b.run, view.b.step, ...(view.b.row === null ? [] : [view.b.row])].join("."),
      sort: view.sort === "score" ? "" : view.sort,
      order: view.order === "desc" ? "" : view.order,
      colour: view.colour === "ratio" ? "" : view.colour,
    });
  const change = (what) => {
    Object.assign(view, what);
    write();
    load();
  };
  const pickStep = (side) => {
    const run = runs.find(([index]) => index === view[side].run)[1];
    const steps = run.metrics.step ?? [0];
    const input = h("input", {
      type: "number",
      min: 0,
      value: view[side].step,
      "aria-label": `step of side ${side}`,
      onchange: (event) => change({ [side]: { ...view[side], step: Number(event.target.value), row: null } }),
    });
    const slider = h("input", {
      type: "range",
      min: steps[0] ?? 0,
      max: steps.at(-1) ?? 0,
      value: view[side].step,
      "aria-hidden": true,
      tabindex: -1,
      oninput: (event) => (input.value = event.target.value),
      onchange: (event) => change({ [side]: { ...view[side], step: Number(event.target.value), row: null } }),
    });
    return h(
      "span",
      { class: "side-pick" },
      runs.length > 1
        ? select(
            "run",
            runs.map(([index, item]) => [index, item.name]),
            view[side].run,
            (value) => change({ [side]: { ...view[side], run: Number(value), row: null } }),
          )
        : null,
      h("label", { class: "field" }, h("span", {}, "step"), input),
      slider,
    );
  };

  async function load() {
    view.opened.forEach((close) => close?.());
    view.opened = [];
    fill(
      controls,
      pickStep("a"),
      h("span", { class: "versus" }, "beside"),
      pickStep("b"),
      select("by", ORDERS, view.sort, (value) => change({ sort: value })),
      select(
        "first",
        [
          ["desc", "highest"],
          ["asc", "lowest"],
        ],
        view.order,
        (value) => change({ order: value }),
      ),
      select(
        "colour by",
        Object.entries(FIGURES).map(([key, [name]]) => [key, name]),
        view.colour,
        (value) => change({ colour: value }),
      ),
    );
    try {
      const [a, b] = await Promise.all(["a", "b"].map((side) => whole(view[side], view)));
      const pairs = pair(a.rows, b.rows, view);
      fill(
        body,
        summary(a, b, pairs),
        h(
          "div",
          { class: "pairs" },
          pairs.slice(0, SHOWN).map((items) => showPair(items, view)),
        ),
        pairs.length > SHOWN
          ? h("p", { class: "hint" }, `${pairs.length - SHOWN} pairs more; the table of samples has all.`)
          : null,
      );
    } catch (error) {
      fill(body, h("p", { class: "error", role: "alert" }, error.message));
    }
  }
  fill(main, controls, body);
  await load();
  return { close: () => view.opened.forEach((close) => close?.()) };
}

/** Ask for a step's responses until the server has read it. */
async function whole({ run, step }, { sort, order }) {
  for (;;) {
    const found = await get(`runs/${run}/samples`, { "min.step": step, "max.step": step, sort, order, limit: MOST });
    if (found.is_whole || found.rows.length) return found;
    await new Promise((done) => setTimeout(done, 60));
  }
}

/** Pair rows: a pair that was asked for, then those with the same prompt, then by rank. */
function pair(left, right, view) {
  const asked = [left.find((row) => row.row === view.a.row), right.find((row) => row.row === view.b.row)];
  const pairs = asked[0] && asked[1] ? [{ rows: asked, isSame: asked[0].prompt === asked[1].prompt }] : [];
  const used = new Set(pairs.flatMap(({ rows }) => rows));
  const byPrompt = new Map();
  for (const row of right) if (!used.has(row)) byPrompt.set(row.prompt, [...(byPrompt.get(row.prompt) ?? []), row]);
  for (const row of left) {
    const other = used.has(row) ? null : byPrompt.get(row.prompt)?.shift();
    if (other) {
      pairs.push({ rows: [row, other], isSame: true });
      used.add(row).add(other);
    }
  }
  const [a, b] = [left, right].map((rows) => rows.filter((row) => !used.has(row)));
  for (let index = 0; index < Math.max(a.length, b.length); index++)
    pairs.push({ rows: [a[index], b[index]], isSame: false });
  return pairs;
}

function summary(a, b, pairs) {
  const same = pairs.filter(({ isSame }) => isSame).length;
  const mean = (rows, name) => {
    const known = rows.map((row) => row[name]).filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };
  const line = (name, title) =>
    h(
      "tr",
      {},
      h("td", {}, title),
      h("td", { class: "num" }, number(mean(a.rows, name))),
      h("td", { class: "num" }, number(mean(b.rows, name))),
    );
  return h(
    "div",
    { class: "card summary" },
    h(
      "table",
      { class: "plain" },
      h(
        "thead",
        {},
        h("tr", {}, h("th", {}, "mean"), h("th", { class: "num" }, "left"), h("th", { class: "num" }, "right")),
      ),
      h("tbody", {}, line("score", "score"), line("kl", "KL"), line("tokens", "length")),
    ),
    h(
      "p",
      { class: "hint" },
      same
        ? `${same} prompts are in both steps and stand first; the others are paired by their rank.`
        : "No prompt is in both steps: responses are paired by their rank.",
    ),
  );
}

function showPair({ rows, isSame }, view) {
  const prompt = (row) => h("div", { class: "prompt-line", title: row.prompt }, show(row.question ?? row.prompt));
  const cells = rows.map((row, index) => {
    const side = index ? view.b : view.a;
    return row ? makeSide(row, side, view, isSame ? null : prompt(row)) : h("div", { class: "side empty" });
  });
  return h(
    "article",
    { class: "pair card" },
    isSame && rows[0] ? prompt(rows[0]) : null,
    h("div", { class: "two" }, cells),
  );
}

function makeSide(row, side, view, prompt) {
  const text = h("div", { class: "text response-text" }, show(row.response || "(no text)"));
  const open = async (event) => {
    const path = `runs/${side.run}/samples/${row.step}/${row.row}`;
    const sample = await get(path, { limit: 1024 });
    const tokens = tokenView(sample, path, view.colour);
    view.opened.push(tokens.close);
    text.replaceWith(tokens.element);
    event.target.remove();
    tokens.paint(view.colour);
  };
  return h(
    "section",
    { class: "side" },
    h(
      "header",
      {},
      h("span", { class: "dot", style: { background: runColour(side.run) } }),
      h("b", {}, `step ${row.step}`),
      h("span", {}, `score ${number(row.score)}`),
      h("span", {}, `KL ${number(row.kl)}`),
      h("span", {}, `${row.tokens} tokens`),
      h("button", { class: "quiet", onclick: open }, "token by token ›"),
    ),
    prompt,
    text,
  );
}
