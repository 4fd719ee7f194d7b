import { ask, entries, flush, keep, newId } from "./outbox.js";
import { differing, put } from "./text.js";

const $ = (id) => document.getElementById(id);
const AHEAD = 4; // pairs held: the next is there at once, and few are held from others
const store = { get: (key) => localStorage.getItem(`jaxrlhf.${key}`), set: (key, value) => localStorage.setItem(`jaxrlhf.${key}`, value) };

let visit = 0; // a number for each token that begins: what an earlier one still waits for is not this one's
let token = "";
let person = null; // {name, role, ...} of the server, whose token it is
let progress = { done: 0, waiting: 0, labels: 0, wanted: 0 };
let queue = []; // pairs to show; the first is on the page
let shownAt = 0; // ms; moves forward by the time that the page was hidden
let hiddenAt = 0;
let sending = false;
let asking = false;
let locked = false; // while an undo is under way
let turning = 0; // timer from one pair to the next: a key now would choose on a pair not yet seen
let again = 0; // timer that looks for new pairs
let differences = store.get("differences") === "true";
const times = []; // seconds of the latest choices

function show(view) {
  for (const id of ["work", "done", "enter"]) $(id).hidden = id !== view;
}

function say(text, seconds = 0) {
  $("status").textContent = text;
  if (seconds) setTimeout(() => $("status").textContent === text && say(""), seconds * 1000);
}

/** Take back what was said of a server that did not answer. */
function answered() {
  if (/^(Waiting|Your choice is kept|\d+ choices are kept)/.test($("status").textContent)) say("");
}

function minutes(seconds) {
  const rounded = Math.round(seconds / 60);
  return rounded < 1 ? "under a minute" : rounded < 90 ? `about ${rounded} min` : `about ${Math.round(rounded / 60)} h`;
}

function count() {
  const pending = entries(person.name).filter((entry) => entry.path === "api/choices").length;
  const [done, left] = [progress.done + pending, Math.max(progress.waiting - pending, queue.length)];
  const middle = [...times].sort((a, b) => a - b)[times.length >> 1];
  const rest = left && middle ? ` · ${minutes(left * middle)}` : "";
  $("count").textContent = `${done} done · ${left} left${rest}`;
  $("bar").max = Math.max(done + left, 1);
  $("bar").value = done;
}

/** Draw the first pair of the queue. */
function draw() {
  const pair = queue[0];
  count();
  $("undo").disabled = $("undo-last").disabled = locked;
  if (!pair) {
    show("done");
    clearTimeout(again);
    again = setTimeout(refill, 5000);
    return;
  }
  show("work");
  const [left, right] = [pair.left, pair.right].map((text) => text.replace(/^[ \n]+|[ \n]+$/g, "")); // trim() would drop U+FEFF
  const found = differences ? differing(left, right) : [];
  const marks = typeof found === "string" ? [] : found;
  if (typeof found === "string") say(found, 4);
  put(document.querySelector(".prompt"), pair.prompt);
  put($("card-left"), left, marks[0]);
  put($("card-right"), right, marks[1]);
  for (const id of ["card-left", "card-right"]) $(id).classList.remove("chosen");
}

function next() {
  clearTimeout(turning); // pairs may have come meanwhile, and been shown: once is enough
  turning = 0;
  shownAt = performance.now();
  hiddenAt = document.hidden ? shownAt : 0;
  toggle($("much"), false);
  $("note").value = "";
  openNote(false);
  draw();
  scrollTo(0, 0);
}

/** Fetch pairs until enough are held; those whose choice is still being sent are not shown again. */
async function refill() {
  if (asking) return;
  asking = true;
  const mine = visit;
  const answer = await ask("api/pairs", token, { want: Math.min(8, AHEAD + entries(person.name).length) });
  if (mine !== visit) return;
  asking = false;
  if (answer.status === 401) return enter("This token is not known any more.");
  if (answer.status !== 200) {
    say(`Waiting for the server (${answer.body.error.message}).`);
    clearTimeout(again);
    again = setTimeout(refill, 1000 * Math.max(2, answer.wait));
    return;
  }
  if (!sending) answered();
  progress = answer.body.progress;
  const busy = new Set(entries(person.name).map((entry) => entry.sent.pair));
  const before = queue[0]?.pair;
  const held = new Set(queue.map((pair) => pair.pair));
  queue.push(...answer.body.pairs.filter((pair) => !busy.has(pair.pair) && !held.has(pair.pair)));
  if (queue[0]?.pair !== before || $("work").hidden) queue[0] && !before ? next() : draw();
  else count();
}

function settled(entry, answer) {
  if (answer.status === 200) answered();
  else if (answer.status === 409) say("Others had filled that pair meanwhile: your choice was not needed.", 6);
  else say(`Not kept: ${answer.body.error.message}`, 12);
  if (entry.path === "api/choices" && answer.status === 200) progress = { ...progress, done: progress.done + 1, waiting: progress.waiting - 1 };
  if (entry.path !== "api/undo") return;
  locked = false;
  const given = answer.body.pair;
  if (given) {
    progress = { ...progress, done: progress.done - 1, waiting: progress.waiting + 1 };
    queue = [given, ...queue.filter((pair) => pair.pair !== given.pair)];
    next();
  } else {
    say("Nothing to take back.", 3);
    draw();
  }
}

async function send() {
  if (sending) return;
  sending = true;
  const mine = visit;
  const waiting = (answer, kept) => say(`${kept === 1 ? "Your choice is" : `${kept} choices are`} kept here until the server takes ${kept === 1 ? "it" : "them"} (${answer.body.error.message}).`);
  const good = await flush(person.name, token, () => mine === visit, settled, waiting);
  if (mine !== visit) return;
  sending = false;
  if (!good) return enter("This token is not known any more. What you chose is kept here.");
  count();
  if (queue.length < AHEAD - 1) refill();
}

function choose(word, much) {
  const pair = queue[0];
  if (!pair || locked || turning || $("work").hidden) return;
  const seconds = Math.max(0, (performance.now() - shownAt) / 1000);
  const sent = { id: newId(), pair: pair.pair, choice: word, seconds: Math.round(seconds * 1000) / 1000 };
  const decided = word === "left" || word === "right";
  if (decided && (much || pressed($("much")))) sent.strength = 3;
  if ($("note").value.trim()) sent.note = $("note").value.trim();
  keep(person.name, "api/choices", sent);
  times.push(seconds);
  if (times.length > 21) times.shift();
  queue.shift();
  if (decided) $(`card-${word}`).classList.add("chosen"); // for as long as the eye needs
  turning = setTimeout(next, decided ? 110 : 0);
  send();
}

function undo() {
  if (locked || turning) return;
  locked = true;
  draw();
  keep(person.name, "api/undo", { id: newId() });
  send();
}

const pressed = (button) => button.getAttribute("aria-pressed") === "true";
const toggle = (button, on = !pressed(button)) => button.setAttribute("aria-pressed", String(on));

function openNote(open) {
  $("note").hidden = !open;
  $("open-note").setAttribute("aria-expanded", String(open));
  if (open) $("note").focus();
}

function mark() {
  differences = !differences;
  toggle($("differences"), differences);
  store.set("differences", differences);
  if (queue[0]) draw();
}

function openGuidelines() {
  $("guidelines").showModal();
  $("guidelines").scrollTop = 0; // the focus on Close would show a long text from its end
}

function theme(step = 0) {
  const all = ["Auto", "Light", "Dark"];
  const now = all[(Math.max(all.indexOf(store.get("theme")), 0) + step) % 3];
  store.set("theme", now);
  document.documentElement.dataset.theme = now.toLowerCase();
  $("theme").textContent = `\u25d0 ${now}`;
}

function enter(why = "") {
  show("enter");
  say(why);
  $("token").focus();
}

async function begin(given) {
  const mine = ++visit;
  clearTimeout(again);
  const answer = await ask("api/me", given);
  if (mine !== visit) return;
  if (answer.status === 401) return enter(given ? answer.body.error.message : "");
  if (answer.status !== 200) {
    say(`Waiting for the server (${answer.body.error.message}).`);
    again = setTimeout(() => begin(given), 1000 * Math.max(2, answer.wait));
    return;
  }
  say("");
  [token, person, queue] = [given, answer.body, []];
  clearTimeout(turning);
  sending = asking = locked = false;
  turning = 0;
  store.set("token", token);
  progress = person.progress;
  $("guidelines-text").textContent = person.guidelines;
  $("open-figures").hidden = person.role !== "admin";
  if (store.get("read") !== person.guidelines) openGuidelines(); // once, and again when they have changed
  store.set("read", person.guidelines);
  send(); // what an earlier visit could not send; then pairs are asked for
}

$("guidelines").addEventListener("close", () => (shownAt = performance.now())); // reading them is no time taken
document.addEventListener("visibilitychange", () => {
  if (document.hidden) hiddenAt = performance.now();
  else if (hiddenAt) [shownAt, hiddenAt] = [shownAt + performance.now() - hiddenAt, 0];
});
for (const button of document.querySelectorAll("[data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
$("undo").addEventListener("click", undo);
$("undo-last").addEventListener("click", undo);
$("much").addEventListener("click", () => toggle($("much")));
$("open-note").addEventListener("click", () => openNote($("note").hidden));
$("differences").addEventListener("click", mark);
$("theme").addEventListener("click", () => theme(1));
$("open-guidelines").addEventListener("click", openGuidelines);
$("open-figures").addEventListener("click", async () => (await import("./figures.js")).open(token));
document.querySelector("#enter form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin($("token").value.trim());
  $("token").value = "";
});

const KEYS = {
  Digit1: (much) => choose("left", much), Numpad1: () => choose("left"),
  Digit2: (much) => choose("right", much), Numpad2: () => choose("right"),
  Digit3: () => choose("tie"), Numpad3: () => choose("tie"),
  Digit4: () => choose("both_bad"), Numpad4: () => choose("both_bad"),
  s: () => choose("skip"), z: undo, d: mark, m: () => toggle($("much")), n: () => openNote(true),
  e: () => document.querySelectorAll("#work .more:not([hidden])").forEach((button) => button.click()),
  g: openGuidelines,
}; // prettier-ignore
document.addEventListener("keydown", (event) => {
  if (event.target === $("note") && event.key === "Escape") return openNote(false);
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.matches("textarea, input")) return;
  if (document.querySelector("dialog[open]") || !person) return;
  const act = KEYS[event.code] ?? KEYS[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  act(event.shiftKey);
});

theme();
toggle($("differences"), differences);
/** The token in the part of a link that no server is sent; it leaves the address bar at once. */
function fromLink() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) history.replaceState(null, "", location.pathname);
  return found;
}
addEventListener("hashchange", () => {
  const found = fromLink(); // another person's link, opened over this page
  if (found) begin(found);
});
begin(fromLink() ?? store.get("token") ?? "");
