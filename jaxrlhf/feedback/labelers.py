"""Who chooses: a simulated person with a judge's taste and a known share of errors, or a person at a terminal."""

from __future__ import annotations

import sqlite3
import sys
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np

from jaxrlhf.evaluation import judges as judging
from jaxrlhf.evaluation import policy
from jaxrlhf.feedback import store


def simulated(
    pairs: Sequence[store.Pair],
    judge: judging.Judge,
    labeler: str,
    noise: float = 0.1,
    tie_gap: float = 0.0,
    seed: int = 0,
) -> list[store.Choice]:
    """Choices of a simulated person: the response of which `judge` says more (of prompt and response), flipped with `noise`.

    A gap of judgements of at most `tie_gap` is a tie. Errors and sides shown are seeded by (seed, labeler, pair id).

    Raises:
        ValueError: noise is not in [0, 0.5], or tie_gap < 0.
    """
    if not 0 <= noise <= 0.5:
        raise ValueError(f"noise={noise} must be in [0, 0.5]: a share of 0.5 is chance, more is a reversed taste")
    if tie_gap < 0:
        raise ValueError(f"tie_gap={tie_gap} must be >= 0")
    if not pairs:
        return []
    texts = [policy.whole(pair.prompt, response) for pair in pairs for response in (pair.response_a, pair.response_b)]
    scores = np.asarray(judge(texts), np.float64).reshape(len(pairs), 2)
    result = []
    for pair, (a, b) in zip(pairs, scores, strict=True):
        left = store.left_response(pair.id, labeler)
        if abs(a - b) <= tie_gap:
            result.append(store.Choice(pair.id, labeler, "tie", left))
            continue
        prefers_a = bool(a > b) != (store.uniform("error", seed, labeler, pair.id) < noise)
        result.append(store.Choice(pair.id, labeler, "left" if prefers_a == (left == "a") else "right", left))
    return result


def label_simulated(
    db: sqlite3.Connection, judge: judging.Judge, labeler: str, noise: float = 0.1, tie_gap: float = 0.0, seed: int = 0
) -> int:
    """Let a simulated person choose on every pair it has not chosen on yet; returns how many."""
    return len(store.record(db, simulated(store.unlabelled(db, labeler), judge, labeler, noise, tie_gap, seed)))


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
