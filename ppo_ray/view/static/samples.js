// The table of all trajectories of a run: filter, sort, search, open.
import { get, writeAddress } from "./api.js";
import { fill, h, number, scored, select, show } from "./dom.js";
import { openSample } from "./sample.js";

const PAGE = 50;
const NAMES = { policy_version: "version", finish_reason: "finish", sample_id: "sample", kl: "KL" };
const RANGES = ["step", "score", "kl", "tokens", "policy_version"];

export async function render(main, runs, options) {
  const run = runs.find(([index]) => index === Number(options.run)) ?? runs[0];
  const page = new Samples(main, runs, run[0], options);
  await page.load();
  return { close: () => page.close(), key: (event) => page.key(event), update: () => page.load(true) };
}

class Samples {
  constructor(main, runs, run, options) {
    Object.assign(this, { runs, run, options: { ...options, run }, rows: [], at: -1, timer: null, opened: null });
    this.filters = h("form", { class: "bar filters", role: "search", onsubmit: (event) => event.preventDefault() });
    this.count = h("div", { class: "count", role: "status" });
    this.table = h("div", { class: "card flush scroll" });
    this.pager = h("div", { class: "pager" });
    this.side = h("aside", { class: "drawer", hidden: true, "aria-label": "Opened sample" });
    this.side.addEventListener("close", () => this.open(null));
    fill(
      main,
      this.filters,
      this.count,
      h("div", { class: "split" }, h("div", { class: "list" }, this.table, this.pager), this.side),
    );
  }

  close() {
    clearTimeout(this.timer);
    this.aborter?.abort();
    this.opened?.close?.();
  }

  /** The options that the server is asked with. */
  query() {
    const asked = Object.entries(this.options).filter(([name]) => !["run", "open", "colour"].includes(name));
    return { sort: "step", order: this.options.sort ? "" : "desc", ...Object.fromEntries(asked) };
  }

  set(changes, push = false) {
    for (const [name, value] of Object.entries(changes)) {
      if (value === "" || value === null || value === undefined) delete this.options[name];
      else this.options[name] = value;
    }
    writeAddress("samples", this.options, push);
  }

  change(changes) {
    this.set({ offset: "", ...changes });
    this.load();
  }

  async load(quiet = false) {
    clearTimeout(this.timer);
    this.aborter?.abort();
    this.aborter = new AbortController();
    let found;
    try {
      found = await get(`runs/${this.run}/samples`, { limit: PAGE, ...this.query() }, this.aborter.signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      fill(this.count, h("span", { class: "error", role: "alert" }, error.message));
      if (!this.known) this.showFilters({ numbers: {}, choices: {} });
      return;
    }
    this.found = found;
    this.rows = found.rows;
    const columns = JSON.stringify([Object.keys(found.numbers), found.choices]);
    if (!this.known || (this.known !== columns && !this.filters.contains(document.activeElement))) {
      this.known = columns;
      this.showFilters(found);
    }
    this.showCount();
    this.showTable();
    this.showPager();
    if (!quiet && this.options.open && !this.opened) this.open(this.options.open, false);
    if (!found.is_whole) this.timer = setTimeout(() => this.load(true), 60);
  }

  showFilters({ numbers, choices }) {
    const names = [...RANGES, ...Object.keys(numbers).filter((name) => name.startsWith("parts."))];
    const later = (name) => (event) => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.change({ [name]: event.target.value }), 180);
    };
    const bound = (name, side) =>
      h("input", {
        inputmode: "decimal",
        size: 5,
        placeholder: side === "min" ? number(numbers[name]?.min) : number(numbers[name]?.max),
        "aria-label": `${side} of ${NAMES[name] ?? name}`,
        value: this.options[`${side}.${name}`] ?? "",
        oninput: later(`${side}.${name}`),
      });
    const ranges = names
      .filter((name) => name in numbers)
      .map((name) =>
        h(
          "label",
          { class: "field range" },
          h("span", {}, NAMES[name] ?? name),
          h("span", {}, bound(name, "min"), "–", bound(name, "max")),
        ),
      );
    const lists = Object.entries(choices).map(([name, values]) =>
      select(NAMES[name] ?? name, [["", "any"], ...values], this.options[name] ?? "", (value) =>
        this.change({ [name]: value }),
      ),
    );
    const text = h("input", {
      type: "search",
      id: "search",
      placeholder: "search the texts",
      value: this.options.text ?? "",
      oninput: later("text"),
      size: 22,
    });
    const pattern = h("input", {
      type: "checkbox",
      checked: this.options.pattern === "1",
      onchange: (event) => this.change({ pattern: event.target.checked ? "1" : "" }),
    });
    fill(
      this.filters,
      this.runs.length > 1
        ? select(
            "run",
            this.runs.map(([index, run]) => [index, run.name]),
            this.run,
            (value) => this.switchRun(Number(value)),
          )
        : null,
      h("label", { class: "field grow" }, h("span", {}, "text"), text),
      select(
        "in",
        [
          ["response", "response"],
          ["prompt", "prompt"],
        ],
        this.options.in ?? "response",
        (value) => this.change({ in: value }),
      ),
      h("label", { class: "check", title: "A regular expression, by RE2's syntax" }, pattern, "pattern"),
      ranges,
      lists,
      h("button", { type: "button", class: "quiet", onclick: () => this.reset() }, "clear"),
    );
  }

  reset() {
    this.options = { run: this.run, ...(this.options.open ? { open: this.options.open } : {}) };
    this.known = null;
    this.change({});
  }

  switchRun(run) {
    this.run = run;
    this.known = null;
    this.open(null);
    this.change({ run });
  }

  showCount() {
    const { num_matches, num_rows, is_whole, num_read, num_files, skipped } = this.found;
    const wrong = Object.entries(skipped);
    fill(
      this.count,
      h("b", {}, num_matches.toLocaleString("en")),
      num_matches === num_rows ? " responses" : ` of ${num_rows.toLocaleString("en")} responses`,
      is_whole ? null : h("span", { class: "reading" }, ` · ${num_read} of ${num_files} steps are read`),
      wrong.length
        ? h(
            "details",
            { class: "note" },
            h("summary", {}, `${wrong.length} ${wrong.length === 1 ? "file is" : "files are"} left out`),
            wrong.map(([name, why]) => h("p", {}, h("code", {}, show(name)), ": ", show(why))),
          )
        : null,
    );
  }

  showTable() {
    const parts = Object.keys(this.found.numbers).filter((name) => name.startsWith("parts."));
    const columns = ["step", "score", ...parts, "kl", "advantage", "tokens", "finish_reason", "worker"];
    const head = (name) => {
      const active = (this.options.sort ?? "step") === name;
      const down = this.query().order === "desc";
      const turn = () => this.change({ sort: name, order: active && down ? "" : "desc" });
      return h(
        "th",
        { class: isText(name) ? "label" : "num", "aria-sort": active ? (down ? "descending" : "ascending") : "none" },
        h(
          "button",
          { class: "sort", onclick: turn },
          NAMES[name] ?? name.replace("parts.", ""),
          h("span", { class: "arrow" }, active ? (down ? "↓" : "↑") : ""),
        ),
      );
    };
    const rows = this.rows.map((row, index) =>
      h(
        "tr",
        {
          class: this.isOpen(row) ? "open" : null,
          "aria-selected": index === this.at,
          tabindex: -1,
          onclick: () => ((this.at = index), this.open(`${row.step}.${row.row}`)),
        },
        columns.map((name) =>
          h(
            "td",
            { class: isText(name) ? "label" : "num" },
            name === "score" ? scored(row.score, this.found.numbers.score) : number(row[name]),
          ),
        ),
        h("td", { class: "excerpt asked" }, h("div", {}, show(row.question ?? row.prompt))),
        h("td", { class: "excerpt" }, h("div", {}, show(row.response || "(no text)"))),
      ),
    );
    const heads = h("tr", {}, columns.map(head), h("th", { class: "asked" }, "prompt"), h("th", {}, "response"));
    fill(
      this.table,
      h("table", { class: "samples" }, h("thead", {}, heads), h("tbody", {}, rows)),
      rows.length ? null : h("p", { class: "hint" }, "No response is like that."),
    );
  }

  isOpen(row) {
    return this.options.open === `${row.step}.${row.row}`;
  }

  showPager() {
    const offset = Number(this.options.offset ?? 0),
      all = this.found.num_matches;
    const go = (to) => (this.set({ offset: to || "" }), this.load());
    fill(
      this.pager,
      h("button", { disabled: offset === 0, onclick: () => go(Math.max(offset - PAGE, 0)) }, "← before"),
      h(
        "span",
        {},
        all ? `${(offset + 1).toLocaleString("en")} to ${Math.min(offset + PAGE, all).toLocaleString("en")}` : "",
      ),
      h("button", { disabled: offset + PAGE >= all, onclick: () => go(offset + PAGE) }, "after →"),
    );
  }

  /** Open a sample by its step and row, as "12.3"; null closes it. */
  async open(name, push = true) {
    this.opened?.close?.();
    this.opened = null;
    this.set({ open: name }, push && Boolean(name));
    this.side.hidden = !name;
    this.side.parentElement.classList.toggle("with-drawer", Boolean(name));
    if (this.found) this.showTable();
    if (!name) return;
    const [step, row] = name.split(".").map(Number);
    this.opened = await openSample(this.side, this.run, step, row, {
      colour: this.options.colour,
      onColour: (colour) => this.set({ colour }),
      onOpen: (other) => this.open(other),
      onClose: () => this.open(null),
    });
  }

  key(event) {
    if (event.key === "/") {
      document.getElementById("search")?.focus();
      return true;
    }
    if (event.key === "Escape") {
      if (document.activeElement?.closest("input, select")) document.activeElement.blur();
      else if (this.options.open) this.open(null);
      return true;
    }
    const move = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
    if (event.key.startsWith("Arrow") && event.target.closest(".drawer")) return false;
    if (move) {
      this.at = Math.min(Math.max(this.at + move, 0), this.rows.length - 1);
      this.showTable();
      this.table.querySelectorAll("tbody tr")[this.at]?.scrollIntoView({ block: "nearest" });
      const row = this.rows[this.at];
      if (this.options.open && row) this.open(`${row.step}.${row.row}`, false);
      return true;
    }
    if (event.key === "Enter" && this.rows[this.at] && !event.target.closest("button, a, summary")) {
      this.open(`${this.rows[this.at].step}.${this.rows[this.at].row}`);
      return true;
    }
    return false;
  }
}

const isText = (name) => ["finish_reason", "worker"].includes(name);
