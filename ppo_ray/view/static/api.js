// The server's data, and what the address of the page says.

const KEY = "ppo-ray-token";

/** Take the token out of the address, where the terminal printed it, and keep it for this server's pages. */
function takeToken() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) {
    localStorage.setItem(KEY, found);
    history.replaceState(null, "", location.pathname + "#/overview");
  }
  return found ?? localStorage.getItem(KEY) ?? "";
}

const token = takeToken();

/** Ask the server for JSON. Throws an Error with the server's own words. */
export async function get(path, query = {}, signal = undefined) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const address = given.length ? `/api/${path}?${new URLSearchParams(given)}` : `/api/${path}`;
  const answer = await fetch(address, { headers: { Authorization: `Bearer ${token}` }, signal });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.detail ?? `the server answered ${answer.status}`);
  return content;
}

/** What is known of all runs; `data` has each run's metrics once they were asked for. */
export const state = { known: null, data: new Map(), shown: new Set() };

export async function loadRuns() {
  state.known = await get("runs");
  return state.known;
}

/** Load the metrics of the runs that are shown and have changed. */
export async function loadShown() {
  for (const run of state.shown) {
    const now = state.known.runs[run];
    const had = state.data.get(run);
    const stamp = `${now.num_steps} ${now.last_event} ${now.num_planned}`;
    if (had?.stamp !== stamp || had?.age > now.seconds_since) {
      state.data.set(run, { ...(await get(`runs/${run}`)), stamp });
    }
    state.data.get(run).age = now.seconds_since;
  }
  return [...state.shown].sort((a, b) => a - b).map((run) => [run, state.data.get(run)]);
}

/** The page and its options, as `#/samples?run=0` has them. */
export function readAddress() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  return { page: path || "overview", options: Object.fromEntries(new URLSearchParams(query ?? "")) };
}

/** Write options into the address; those that are empty leave it. `push` makes a step of the browser's history. */
export function writeAddress(page, options, push = false) {
  const given = Object.entries(options).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const hash = `#/${page}${given.length ? `?${new URLSearchParams(given)}` : ""}`;
  if (hash === location.hash) return;
  history[push ? "pushState" : "replaceState"](null, "", hash);
}
