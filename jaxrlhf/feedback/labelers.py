"""Who chooses: a simulated person with a judge's taste and known faults, or a person at a terminal."""

from __future__ import annotations

import dataclasses
import math
import sqlite3
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from jaxrlhf.evaluation import judges as judging
from jaxrlhf.evaluation import policy
from jaxrlhf.feedback import store


@dataclasses.dataclass(frozen=True)
class Person:
    """How a simulated person's choices differ from its taste. Which pairs are hit is drawn for each, by its id alone."""

    noise: float = 0.1  # share of wrong choices
    tie_gap: float = 0.0  # judgements no further apart than this are called a tie
    left: float = 0.0  # position bias: added to the judgement of the answer at the left
    lazy: float = 0.0  # share of answers given without reading
    unread: Literal["left", "shorter"] = "left"  # what is chosen then: always the left one, or the one that is sooner read
    noise_drift: float = 0.0  # added to `noise` over 1,000 choices, which stays in [0, 0.5]: somebody who tires, or who learns
    taste_drift: float = 0.0  # over 1,000 choices, the share of choices that turn from the taste to the longer answer

    def __post_init__(self):
        if not 0 <= self.noise <= 0.5:
            raise ValueError(f"noise={self.noise} must be in [0, 0.5]: a share of 0.5 is chance, more is a reversed taste")
        if self.tie_gap < 0:
            raise ValueError(f"tie_gap={self.tie_gap} must be >= 0")
        if not 0 <= self.lazy <= 1:
            raise ValueError(f"lazy={self.lazy} must be in [0, 1]: it is a share of the choices")
        if self.unread not in ("left", "shorter"):
            raise ValueError(f"unread='{self.unread}' must be left or shorter")
        if self.taste_drift < 0:
            raise ValueError(f"taste_drift={self.taste_drift} must be >= 0: a share of the choices per 1,000")
        if not math.isfinite(self.left) or not math.isfinite(self.noise_drift):
            raise ValueError(f"left={self.left} and noise_drift={self.noise_drift} must be finite numbers")


def simulated(
    pairs: Sequence[store.Pair],
    judge: judging.Judge,
    labeler: str,
    person: Person = Person(),
    seed: int = 0,
    made: int = 0,
) -> list[store.Choice]:
    """Choices of a simulated person: the response of which `judge` says more (of prompt and response), and the person's faults.

    Errors and sides shown are seeded by (seed, labeler, pair id); with drift a choice depends also on how many came before it,
    `made` before the first.
    """
    if not pairs:
        return []
    texts = [policy.whole(pair.prompt, response) for pair in pairs for response in (pair.response_a, pair.response_b)]
    scores = np.asarray(judge(texts), np.float64).reshape(len(pairs), 2).tolist()
    result = []
    for number, (pair, (a, b)) in enumerate(zip(pairs, scores, strict=True), made):
        left = store.left_response(pair.id, labeler)
        drawn = {what: store.uniform(what, seed, labeler, pair.id) for what in ("lazy", "taste", "error")}
        preferred = _preferred(pair, a - b, left, person, number / 1000, drawn)
        word = "tie" if preferred is None else "left" if preferred == left else "right"
        result.append(store.Choice(pair.id, labeler, word, left))
    return result


def _preferred(
    pair: store.Pair, lead: float, left: store.Side, person: Person, thousands: float, drawn: Mapping[str, float]
) -> store.Side | None:
    """What the person takes after so many thousand choices, where the judgement of a is above that of b by `lead`; None: a tie.

    `drawn`: a number in [0, 1) for each fault.
    """
    if drawn["lazy"] < person.lazy:
        return _unread(pair, left, person)
    if drawn["taste"] < person.taste_drift * thousands:
        lead, gap = float(len(pair.response_a) - len(pair.response_b)), 0.0
    else:
        lead, gap = lead + (person.left if left == "a" else -person.left), person.tie_gap
    if abs(lead) <= gap:
        return None
    noise = min(max(person.noise + person.noise_drift * thousands, 0.0), 0.5)
    return "a" if (lead > 0) != (drawn["error"] < noise) else "b"


def _unread(pair: store.Pair, left: store.Side, person: Person) -> store.Side:
    """What somebody takes who does not read; of equally long answers the left one."""
    lengths = len(pair.response_a), len(pair.response_b)
    if person.unread == "left" or lengths[0] == lengths[1]:
        return left
    return "a" if lengths[0] < lengths[1] else "b"


def label_simulated(
    db: sqlite3.Connection,
    judge: judging.Judge,
    labeler: str,
    person: Person = Person(),
    seed: int = 0,
    limit: int | None = None,
) -> int:
    """Let a simulated person choose on every pair it has not chosen on yet (at most `limit`); returns how many."""
    waiting, made = store.unlabelled(db, labeler), sum(choice.labeler == labeler for choice in store.choices(db))
    return len(store.record(db, simulated(waiting[:limit], judge, labeler, person, seed, made)))


def visible(text: str) -> str:
    """Text safe to print: control, bidirectional and other invisible characters appear as escapes, line ends as spaces.

    A response is written by a model and may hold terminal commands.
    """
    text = " ".join(text.splitlines())
    return "".join(f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in text)


def read_key() -> str:
    """One key, without Enter at a terminal; the first letter of a line elsewhere; '' at the end of input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip()[:1] or ("\n" if line else "")
    try:
        import termios
        import tty
    except ImportError:  # not a POSIX terminal
        return (sys.stdin.readline().strip() or "\n")[:1]
    settings = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)  # the default would throw away keys already typed
        return sys.stdin.read(1)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)


KEYS: dict[str, store.Word] = {"1": "left", "2": "right", "t": "tie", "b": "both_bad", "s": "skip"}
HELP = "1 or 2: the better one   t: tie   b: both bad   s: skip   u: undo   q: stop (go on later)"


def show(pair: store.Pair, left: str, number: int, total: int) -> str:
    """What a person sees of a pair: who wrote which is not said."""
    first, second = (pair.response_a, pair.response_b) if left == "a" else (pair.response_b, pair.response_a)
    prompt = visible(pair.prompt)
    return f"\n[{number} of {total}]  {prompt} ...\n  1)  ... {visible(first).strip()}\n  2)  ... {visible(second).strip()}"


def label_at_terminal(
    db: sqlite3.Connection,
    labeler: str,
    limit: int | None = None,
    pair: store.Pair | None = None,
    read: Callable[[], str] = read_key,
    write: Callable[[str], None] = print,
) -> int:
    """Ask a person about every pair not chosen on yet (at most `limit`; only `pair` where given).

    Returns how many choices stand from this sitting. Each is on disk before the next pair is shown, so the work can be
    left at any moment and taken up again.
    """
    done, only = 0, pair
    write(HELP)
    while limit is None or done < limit:
        waiting = [pair for pair in store.unlabelled(db, labeler) if only is None or pair == only]
        if not waiting:
            write("No pair is left.")
            break
        pair, left = waiting[0], store.left_response(waiting[0].id, labeler)
        total = len(waiting) if limit is None else min(len(waiting), limit - done)
        write(show(pair, left, done + 1, done + total))
        key = _answer(read, write)
        if key in ("q", ""):
            break
        if key == "u":
            taken_back = done > 0 and store.undo(db, labeler) is not None
            write("Taken back." if taken_back else "Nothing to take back in this sitting.")
            done -= taken_back
        else:
            store.record(db, [store.Choice(pair.id, labeler, KEYS[key], left)])
            done += 1
    return done


def _answer(read: Callable[[], str], write: Callable[[str], None]) -> str:
    """The next key that means something ('' at the end of input)."""
    while True:
        key = read().lower()
        if key in KEYS or key in ("u", "q", ""):
            return key
        write(HELP)
