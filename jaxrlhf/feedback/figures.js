// The admin's figures, and the export.

import { ask } from "./outbox.js";

const $ = (id) => document.getElementById(id);
const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(0)} %`);
const number = (value, digits = 2) => (value == null ? "–" : value.toFixed(digits));
const interval = (found, of) => (found == null ? "–" : `${of(found.rate ?? found.raw)} (${of(found.low)} to ${of(found.high)})`);

function table(title, names, rows) {
  const made = document.createElement("table");
  made.createCaption().textContent = title;
  const head = made.createTHead().insertRow();
  for (const name of names) head.appendChild(document.createElement("th")).textContent = name;
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const cell of row) line.insertCell().textContent = cell;
  }
  return made;
}

function tables(found) {
  const people = found.labelers.map((each) => [
    each.name, each.choices, each.skips, each.seconds == null ? "–" : `${number(each.seconds, 1)} s`,
    each.gold ? `${interval(each.gold, percent)} of ${each.gold.pairs}` : "–", interval(each.left, percent), interval(each.longer, percent),
  ]); // prettier-ignore
  const made = [
    table(`${found.labels} of ${found.wanted} labels, ${found.gold} gold pairs`,
      ["Labeler", "Choices", "Skips", "Median time", "Agrees with gold", "Took the first", "Took the longer"], people),
  ]; // prettier-ignore
  if (found.together) {
    const { raw, fleiss, krippendorff, pairs } = found.together;
    made.push(table("All labelers together", ["Pairs judged by two or more", "Raw agreement", "Fleiss' kappa", "Krippendorff's alpha"], [[pairs, percent(raw), number(fleiss), number(krippendorff)]]));
  }
  if (found.agreement.length)
    made.push(table("Labelers by two", ["Labelers", "Pairs", "Raw agreement", "Cohen's kappa"],
      found.agreement.map((two) => [`${two.first}, ${two.second}`, two.pairs, interval(two, percent), number(two.kappa)]))); // prettier-ignore
  if (found.reliability?.length)
    made.push(table("Reliability: how steeply each follows the taste that all share (0: a coin, 95 % interval)",
      ["Labeler", "Pairs that tell", "Reliability", "Agrees with the common taste"],
      found.reliability.map((each) => [each.labeler, each.pairs, `${number(each.beta)} (${number(each.low)} to ${number(each.high)})`, percent(each.agrees)]))); // prettier-ignore
  if (found.ratings?.length)
    made.push(table("Checkpoints (Bradley-Terry, in Elo points, 95 % interval)", ["Checkpoint", "Comparisons", "Rating"],
      found.ratings.map((each) => [each.checkpoint, each.comparisons, `${number(each.rating, 0)} (${number(each.low, 0)} to ${number(each.high, 0)})`]))); // prettier-ignore
  return made;
}

export async function open(token) {
  const answer = await ask("api/summary", token);
  const body = $("figures-body");
  if (answer.status === 200) body.replaceChildren(...tables(answer.body));
  else body.textContent = answer.body.error.message;
  $("download").onclick = async () => {
    const file = await fetch("api/choices.jsonl", { headers: { Authorization: `Bearer ${token}` } });
    if (!file.ok) return (body.textContent = (await file.json()).error.message);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await file.blob());
    link.download = "choices.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  $("figures").showModal();
  $("figures").scrollTop = 0;
}
