// Texts of strangers on the page: always text nodes, never markup; what cannot be seen is shown by its number.

// Control, format (bidirectional marks, zero widths), surrogate, private and unassigned characters, but line ends and tabs.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\u2028\u2029\u3164\u115f\u1160]/u;
const KEPT = /[\n\t]/;
const SHORT = 12000; // characters of a text that is not opened
const LITTLE = 0.2; // share of common words under which marks would only be noise
const MOST_WORDS = 3000; // of each text, for differences: the table has their product

/** The nodes of a text; runs of words (each with the space after it) for which `marked(index)` holds are marked. */
function nodes(words, marked) {
  const made = [];
  let run = "";
  words.forEach((word, index) => {
    run += word;
    const on = marked(index);
    if (index + 1 < words.length && marked(index + 1) === on) return;
    const parts = on ? [run.trimEnd(), run.slice(run.trimEnd().length)] : ["", run];
    const mark = document.createElement("mark");
    mark.append(...visible(parts[0]));
    made.push(...(on ? [mark] : []), ...visible(parts[1]));
    run = "";
  });
  return made;
}

/** A string as strings and, for each hidden character, an element that says its number. */
function visible(text) {
  const parts = [];
  let plain = "";
  const letters = HIDDEN.test(text) ? [...text.replace(/\r\n/g, "\n")] : [];
  if (!letters.length) return [text];
  letters.forEach((letter, i) => {
    const joins = letter === "\u200d" && /\p{Extended_Pictographic}/u.test(letters[i + 1] ?? ""); // families of emoji
    if (KEPT.test(letter) || joins || !HIDDEN.test(letter)) return (plain += letter);
    const sign = document.createElement("span");
    sign.className = "control";
    sign.textContent = "U+" + letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(plain, sign);
    plain = "";
  });
  return [...parts, plain];
}

const wordsOf = (text) => text.match(/\s*\S+\s*|\s+/g) ?? [];

/** Which words of each of two texts are not in their longest common subsequence: [Set, Set], or a string that says why not. */
export function differing(first, second) {
  const [a, b] = [first, second].map((text) => wordsOf(text).map((word) => word.trim()));
  if (Math.max(a.length, b.length) > MOST_WORDS) return "These texts are too long to mark their differences.";
  const width = b.length + 1;
  const best = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      best[i * width + j] =
        a[i] === b[j] ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
  if (best[0] < LITTLE * Math.min(a.length, b.length)) return "These answers have little in common: nothing is marked.";
  const [onlyA, onlyB] = [new Set(), new Set()];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) [i, j] = [i + 1, j + 1];
    else if (j === b.length || (i < a.length && best[(i + 1) * width + j] >= best[i * width + j + 1])) onlyA.add(i++);
    else onlyB.add(j++);
  }
  return [joined(onlyA, a.length), joined(onlyB, b.length)];
}

/** A single common word between two marked ones is there by chance: marked too, or the text is speckled. */
function joined(only, length) {
  const both = (at) => only.has(at - 1) && only.has(at + 1);
  return new Set([...Array(length).keys()].filter((at) => only.has(at) || both(at)));
}

/** Put a text into `.text` of a section, cut where it is long, with a button that opens it. */
export function put(section, text, only) {
  const target = section.querySelector(".text");
  const more = section.querySelector(".more");
  const draw = (whole) => target.replaceChildren(...nodes(wordsOf(whole ? text : text.slice(0, SHORT)), (at) => !!only?.has(at)));
  section.classList.remove("open", "cut");
  draw(false);
  const cut = text.length > SHORT || target.scrollHeight > target.clientHeight + 4;
  section.classList.toggle("cut", cut);
  more.hidden = !cut;
  more.textContent = `Show all ${text.length.toLocaleString("en")} characters`;
  more.onclick = () => {
    const open = section.classList.toggle("open");
    section.classList.toggle("cut", !open);
    draw(open);
    more.textContent = open ? "Show less" : `Show all ${text.length.toLocaleString("en")} characters`;
  };
}
