// What was chosen and is not yet known to be on the server's disk. It outlives a reload; each entry has an id of its own,
// so that sending it again adds nothing.

const PREFIX = "jaxrlhf.outbox.";
const FINAL = ["invalid", "unknown_pair", "pair_full"]; // what the store itself says no to; any other failure may pass
const memory = new Map(); // where the browser keeps nothing (private window, storage full)

export const newId = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

/** Ask the server. Returns {status, body, wait}; status 0: no answer. */
export async function ask(path, token, sent) {
  try {
    const headers = { Authorization: `Bearer ${token}` };
    const options = { headers, cache: "no-store", signal: AbortSignal.timeout(15000) };
    if (sent !== undefined) {
      headers["Content-Type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(sent) });
    }
    const answer = await fetch(path, options);
    const body = await answer.json();
    return { status: answer.status, body, wait: Number(answer.headers.get("Retry-After")) || 0 };
  } catch {
    return { status: 0, body: { error: { message: "no answer from the server" } }, wait: 0 };
  }
}

/** All entries of a person, oldest first. */
export function entries(who) {
  const found = [...memory.entries()];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    if (key.startsWith(PREFIX)) found.push([key, JSON.parse(localStorage.getItem(key))]);
  }
  return found
    .filter(([, entry]) => entry.who === who)
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([key, entry]) => ({ key, ...entry }));
}

/** Keep an entry until the server has it; `path` is where it goes. */
export function keep(who, path, sent) {
  const last = entries(who).at(-1)?.key.slice(PREFIX.length) ?? "0";
  const key = PREFIX + String(Math.max(Date.now(), Number(last) + 1)).padStart(16, "0"); // in order, whatever the clock does
  const entry = { who, path, sent };
  try {
    localStorage.setItem(key, JSON.stringify(entry));
  } catch {
    memory.set(key, entry);
  }
  return key;
}

export function forget(key) {
  memory.delete(key);
  localStorage.removeItem(key);
}

/** Send what is kept, in order, again and again until nothing is left or `here()` says that this person has gone.
 * `told(entry, answer)` hears of each that was settled, `waiting(answer, count)` of each failure that will be tried again.
 * Resolves to false where the token is refused. */
export async function flush(who, token, here, told, waiting) {
  for (let failures = 0, entry; here() && (entry = entries(who)[0]); ) {
    const answer = await ask(entry.path, token, entry.sent);
    if (answer.status === 401) return false;
    if (answer.status === 200 || FINAL.includes(answer.body.error?.code)) {
      failures = 0;
      forget(entry.key);
      if (here()) told(entry, answer);
      continue;
    }
    if (here()) waiting(answer, entries(who).length);
    const pause = Math.max(answer.wait, Math.min(15, 2 ** failures++ / 2)) * 1000;
    await new Promise((go) => {
      const done = () => (clearTimeout(timer), removeEventListener("online", done), go());
      const timer = setTimeout(done, pause);
      addEventListener("online", done);
    });
  }
  return true;
}
