// One trajectory: its prompt as text or chat, its response token by token, and the same prompt at other steps.
import { get } from "./api.js";
import { fill, h, number, select, show } from "./dom.js";
import { FIGURES, MORE, long, tokenView } from "./tokens.js";

/** Fill an element with a sample; returns {close}. */
export async function openSample(element, run, step, row, { colour: chosen = "advantage", onColour, onOpen, onClose }) {
  let sample;
  const path = `runs/${run}/samples/${step}/${row}`;
  try {
    sample = await get(path, { limit: MORE });
  } catch (error) {
    fill(element, h("p", { class: "error", role: "alert" }, error.message), h("button", { onclick: onClose }, "Close"));
    return {};
  }
  if (!(chosen in FIGURES)) chosen = "advantage";
  const tokens = tokenView(sample, path, chosen);
  const pick = select(
    "colour by",
    [...Object.entries(FIGURES).map(([key, [name]]) => [key, name]), ["", "nothing"]],
    chosen,
    (value) => {
      tokens.paint(value);
      onColour?.(value);
    },
  );
  fill(
    element,
    h(
      "header",
      {},
      h("h2", {}, `Step ${step}, response ${row}`),
      h("button", { class: "quiet", title: "Close (Esc)", "aria-label": "Close", onclick: onClose }, "✕"),
    ),
    showFacts(sample.facts, sample.num_tokens),
    h("h3", {}, sample.messages ? "Conversation" : "Prompt"),
    sample.messages ? chat(sample.messages) : h("div", { class: "prompt text" }, long(sample.prompt)),
    h("div", { class: "headline" }, h("h3", {}, "Response"), pick),
    tokens.element,
    showExtras(sample.facts),
    showAlike(sample, run, step, row, onOpen),
  );
  tokens.paint(chosen);
  element.scrollTop = 0;
  return { close: tokens.close };
}

function showFacts(facts, numTokens) {
  const items = {
    score: facts.score ?? "none",
    ...facts.parts,
    tokens: numTokens,
    "prompt tokens": facts.num_prompt_tokens,
    finish: facts.finish_reason,
    version: facts.policy_version,
    worker: facts.worker,
    sample: facts.sample_id,
    seed: facts.seed,
  };
  if (facts.truncated) items.truncated = "the classifier saw the end only";
  return h(
    "dl",
    { class: "facts small" },
    Object.entries(items)
      .filter(([, value]) => value !== undefined)
      .map(([name, value]) =>
        h(
          "div",
          {},
          h("dt", {}, show(name)),
          h("dd", {}, typeof value === "number" ? number(value, 4) : show(String(value))),
        ),
      ),
  );
}

function showExtras(facts) {
  if (!facts.row) return null;
  return [
    h("h3", {}, "Its row of the data"),
    h(
      "dl",
      { class: "facts small" },
      Object.entries(facts.row).map(([name, value]) =>
        h(
          "div",
          {},
          h("dt", {}, show(name)),
          h("dd", { class: "wrap" }, long(typeof value === "object" ? JSON.stringify(value) : String(value))),
        ),
      ),
    ),
  ];
}

function chat(messages) {
  return h(
    "div",
    { class: "chat" },
    messages.map(({ role, content }) =>
      h(
        "div",
        { class: `message ${role === "user" ? "user" : role === "system" ? "system" : "assistant"}` },
        h("span", { class: "role" }, show(role)),
        h("div", { class: "text" }, long(content)),
      ),
    ),
  );
}

function showAlike(sample, run, step, row, onOpen) {
  if (!onOpen || sample.num_alike < 2) return null;
  const rows = sample.alike.map((other) => {
    const here = other.step === step && other.row === row;
    return h(
      "tr",
      { class: here ? "open" : null, onclick: () => here || onOpen(`${other.step}.${other.row}`) },
      h("td", { class: "num" }, other.step),
      h("td", { class: "num" }, number(other.score)),
      h("td", { class: "num" }, number(other.kl)),
      h("td", { class: "excerpt" }, h("div", {}, show(other.response || "(no text)"))),
      h(
        "td",
        {},
        here
          ? ""
          : h(
              "a",
              {
                href: `#/sides?a=${run}.${step}.${row}&b=${run}.${other.step}.${other.row}`,
                onclick: (event) => event.stopPropagation(),
              },
              "beside",
            ),
      ),
    );
  });
  return [
    h("h3", {}, `The same prompt: ${sample.num_alike} responses`),
    h(
      "table",
      { class: "samples alike" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ["step", "score", "KL", "response", ""].map((head, index) =>
            h("th", { class: index < 3 ? "num" : null }, head),
          ),
        ),
      ),
      h("tbody", {}, rows),
    ),
  ];
}
