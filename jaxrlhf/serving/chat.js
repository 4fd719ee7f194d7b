// The chat page: streams answers, shows two at times and lets the person choose, and asks once whether anything may be kept.
import { put } from "./text.js";

const $ = (id) => document.getElementById(id);
const memory = { get: (key) => localStorage.getItem(`jaxrlhf.chat.${key}`), set: (key, value) => localStorage.setItem(`jaxrlhf.chat.${key}`, value) };
const visitor = memory.get("visitor") ?? crypto.getRandomValues(new Uint32Array(4)).join("-"); // made up here; no name, no address
memory.set("visitor", visitor);
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  memory.set("token", given);
  history.replaceState(null, "", location.pathname); // so that nobody reads it from the address
}

let service = { model: "", keeps: false, ask_share: 0, wording: "" };
let running = null; // AbortController of the answer under way

const agreed = () => service.keeps && memory.get("consent") === "yes";

function headers() {
  const token = memory.get("token");
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

/** What the server says; throws its message where it refuses. */
async function ask(path, sent, signal) {
  const answer = await fetch(path, sent ? { method: "POST", headers: headers(), body: JSON.stringify(sent), signal } : { headers: headers() });
  if (!answer.ok) throw new Error((await answer.json()).error?.message ?? `the server answered ${answer.status}`);
  return answer;
}

function say(text) {
  $("status").textContent = text;
}

/** The events of a stream as objects. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

function from(template) {
  return $(template).content.firstElementChild.cloneNode(true);
}

function button(text, label, pressed) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => pressed(made).catch((error) => say(error.message)));
  return made;
}

/** Thumbs under one answer. */
function thumbs(section, completion, index) {
  const both = [true, false].map((good) =>
    button(good ? "\u{1F44D}" : "\u{1F44E}", good ? "a good answer" : "a bad answer", async (pressed) => {
      await ask("api/ratings", { completion, index, good, user: visitor });
      both.forEach((each) => each.setAttribute("aria-pressed", String(each === pressed)));
    }),
  );
  section.querySelector(".actions").replaceChildren(...both);
}

/** The question under two answers. */
function choice(turn, sections, completion) {
  const shown = performance.now();
  turn.querySelector(".question").hidden = false;
  const choose = (word) => async () => {
    await ask("api/choices", { completion, choice: word, user: visitor, seconds: (performance.now() - shown) / 1000 });
    turn.querySelector(".question").hidden = true;
    sections.forEach((section, i) => {
      section.classList.toggle("chosen", word === ["left", "right"][i]);
      thumbs(section, completion, i);
    });
  };
  sections.forEach((section, i) => {
    const better = button("This one is better", `answer ${i + 1} is better`, choose(["left", "right"][i]));
    section.querySelector(".actions").replaceChildren(better, ...(i ? [button("Tie", "a tie", choose("tie"))] : []));
  });
}

/** One message and what is answered to it; each stands alone, the policy reads no earlier one. */
async function send(text) {
  const turn = from("turn");
  $("talk").append(turn);
  put(turn.querySelector(".said"), text);
  const n = agreed() && Math.random() < service.ask_share ? 2 : 1;
  const sections = Array.from({ length: n }, () => from("answer"));
  turn.querySelector(".answers").append(...sections);
  const texts = sections.map(() => "");
  const sent = { model: service.model, messages: [{ role: "user", content: text }], n, stream: true, store: agreed(), user: visitor };
  running = new AbortController();
  let completion = "";
  try {
    for await (const event of events(await ask("v1/chat/completions", sent, running.signal))) {
      if (event.error) throw new Error(event.error.message);
      completion = event.id;
      for (const part of event.choices) {
        texts[part.index] += part.delta.content ?? "";
        sections[part.index].querySelector(".text").textContent = texts[part.index];
      }
      turn.scrollIntoView({ block: "end" });
    }
  } finally {
    sections.forEach((section, i) => put(section, texts[i]));
  }
  if (!sent.store) return;
  if (n === 2 && texts[0] !== texts[1]) choice(turn, sections, completion);
  else sections.forEach((section, i) => thumbs(section, completion, i));
}

/** Ask once, or when the person changes their mind. */
async function consent(yes) {
  await ask("api/consent", { given: yes, user: visitor });
  memory.set("consent", yes ? "yes" : "no");
  $("agreed").checked = yes;
  $("ask").close();
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("message").value;
  if (!text.trim() || running) return;
  $("message").value = "";
  $("send").hidden = !($("stop").hidden = false);
  say("");
  try {
    await send(text);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  } finally {
    running = null;
    $("send").hidden = !($("stop").hidden = true);
    $("message").focus();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
for (const [id, yes] of [["yes", true], ["no", false]]) $(id).addEventListener("click", () => consent(yes).catch((error) => say(error.message)));
$("agreed").addEventListener("change", () => consent($("agreed").checked).catch((error) => say(error.message)));

try {
  service = await (await ask("api/chat")).json();
  $("model").textContent = service.model;
  $("wording").textContent = service.wording;
  $("kept").hidden = !service.keeps;
  $("agreed").checked = agreed();
  if (service.keeps && memory.get("consent") === null) $("ask").showModal();
  document.body.dataset.ready = "true";
} catch (error) {
  say(error.message);
}
