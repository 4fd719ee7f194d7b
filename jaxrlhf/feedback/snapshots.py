"""Snapshots of the feedback store: choices that stood after an event, as files that a round learns from and is judged on."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.data import sources
from jaxrlhf.feedback import exchange, rounds, store
from jaxrlhf.training.manifest import file_hashes

FILE = "snapshot.json"


def is_held_out(prompt: str, share: float) -> bool:
    """Whether choices on a prompt are held out: by its hash alone, so that no pair ever changes sides."""
    return store.uniform("held out", prompt) < share


def new_choices(db: sqlite3.Connection, after: int, leave_out: Sequence[str] = ()) -> int:
    """Standing choices, gold and skips not counted, later than event number `after`."""
    rows = store.preferences(db)
    return sum(row["sequence"] > after and row["labeler"] not in leave_out for row in rows)


def freeze(
    db: sqlite3.Connection,
    folder: Path,
    upto: int,
    known: int,
    share: float,
    leave_out: Sequence[str] = (),
    since: Sequence[int] = (),
) -> dict[str, Any]:
    """Write the choices that stood after event `upto` into `folder`, and return what `snapshot.json` there says of them.

    `learned.jsonl` and `held_out.jsonl` have rows as `store.preferences` gives them, ties too, but for labelers left out;
    `gold.jsonl` the pairs whose answer is known. Texts that no file can hold are left out and counted (`unreadable`).
    `known`: the last event that the served round had; later choices are new. `since`: the last events of the rounds after it.
    A snapshot that is there is checked and kept.

    Raises:
        ValueError: no choice to learn from, or the snapshot that is there is not as it was written.
    """
    if (folder / FILE).is_file():
        return check(folder)
    every = [row for row in store.preferences(db, upto, ties=True) if row["labeler"] not in leave_out]
    rows, gold = map(exchange.writable, (every, _gold_rows(db)))
    sides: dict[str, list] = {"learned": [], "held_out": [], "gold": gold}
    for row in rows:
        sides["held_out" if is_held_out(row["prompt"], share) else "learned"].append(row)
    if not sides["learned"]:
        raise ValueError(f"no choice to learn from up to event {upto}: label pairs first, or leave fewer labelers out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, some in sides.items():
        if some:
            sources.write_jsonl(folder / f"{name}.jsonl", some)
            rounds.sync(folder / f"{name}.jsonl")
    told: dict[str, Any] = {
        "upto": upto,
        "known": known,
        "since": list(since),
        "share": share,
        "left_out": sorted(leave_out),
        "choices": len(rows),
    }
    told["unreadable"] = len(every) - len(rows)
    told |= {name: len(some) for name, some in sides.items()} | {"new": sum(row["sequence"] > known for row in rows)}
    told |= {"people_on_gold": _right_on_gold(db, upto, known, leave_out), "files": file_hashes(folder)}
    rounds.write_sealed(folder / FILE, told)
    return told


def check(folder: Path) -> dict[str, Any]:
    """What `snapshot.json` says.

    Raises:
        ValueError: it or a file of the snapshot is not as it was written.
    """
    told = rounds.read_sealed(folder / FILE)
    found = {name: value for name, value in file_hashes(folder).items() if name != FILE}
    if found != told["files"]:
        wrong = sorted({name for name, _ in found.items() ^ told["files"].items()})
        raise ValueError(f"{folder}: {', '.join(wrong)} is not as it was written: restore it, or remove this round's folder")
    return told


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of `learned`, `held_out` or `gold`; none where there is no such file."""
    path = folder / f"{name}.jsonl"
    return exchange.read(path) if path.is_file() else []


def _gold_rows(db: sqlite3.Connection) -> list[dict[str, Any]]:
    known, rows = store.gold(db), []
    for pair in store.pairs(db):
        if (right := known.get(pair.id)) in ("a", "b"):
            two = (pair.response_a, pair.response_b)
            chosen, rejected = two if right == "a" else two[::-1]
            rows.append({"prompt": pair.prompt, "chosen": chosen, "rejected": rejected, "pair": pair.id})
    return rows


def _right_on_gold(db: sqlite3.Connection, upto: int, after: int, leave_out: Sequence[str]) -> list[list[Any]]:
    """[pair, right or not] of each new choice on a gold pair; skips are left out."""
    known = store.gold(db)
    said = [c for c in store.choices(db, upto) if c.sequence > after and c.pair in known and c.choice != "skip"]
    return [[c.pair, (c.preferred or c.choice) == known[c.pair]] for c in said if c.labeler not in leave_out]
