"""Choices in and out: rows of prompt, chosen and rejected, as TRL and Hugging Face have them, with where each came from."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.data import hub, sources, strict, tfds_preferences
from jaxrlhf.feedback import schema, store

_KEPT = ("strength", "note", "seconds", "time", "schema")


def read(path: Path, rejects: Path | None = None) -> list[dict[str, Any]]:
    """Rows of a `.jsonl`, `.jsonl.gz` or `.parquet` file, or of the split `train` of a folder of TFDS or Hugging Face; of JSON
    lines, with `rejects`, without the bad ones, which are written there.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another kind of file, one that `rejects` cannot be had of, or `place: field: problem` of the first bad row.
    """
    if rejects is not None and not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"{path}: bad rows are left out of JSON lines alone: set skip_bad off, or give a .jsonl file")
    if path.is_dir():
        return (tfds_preferences.read_hub if hub.is_folder(path) else tfds_preferences.read_tfds)(path, "train")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return tfds_preferences.read_jsonl(path, rejects)
    if path.suffix == ".parquet":
        return tfds_preferences.read_parquet(path)
    raise ValueError(
        f"{path}: choices are read from .jsonl, .jsonl.gz and .parquet files and from folders of TFDS and Hugging Face"
    )


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows of `store.preferences` as the name says: `.jsonl`, `.parquet`, or a folder for TFDS; returns what to read.

    Raises:
        ValueError: no rows, or a TFDS data set is there already.
    """
    if not rows:
        raise ValueError(f"{path}: there are no choices to write")
    if path.suffix == ".jsonl":
        sources.write_jsonl(path, rows)
    elif path.suffix == ".parquet":
        tfds_preferences.write_parquet(path, rows)
    elif not path.suffix:
        return tfds_preferences.write_tfds(path, {"train": rows})
    else:
        raise ValueError(f"{path}: choices are written to a .jsonl or .parquet file, or to a folder (TFDS)")
    return path


def writable(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that `read` takes back: a policy may write what no file of text can hold, such as NUL."""
    return [row for row in rows if strict.row_problem(row, tfds_preferences.SCHEMA) is None]


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def as_pair(row: Mapping[str, Any]) -> tuple[store.Pair, store.Side]:
    """The pair of a row, and which response of it was chosen.

    A row that does not say which response it was (`chosen_is`) has them in the order of their texts: were the chosen one
    always a, the order would give it away.
    """
    chosen = (row["chosen"], row.get("checkpoint_chosen", ""))
    rejected = (row["rejected"], row.get("checkpoint_rejected", ""))
    side = row.get("chosen_is") or ("a" if chosen < rejected else "b")
    if side not in ("a", "b"):
        raise ValueError(f"chosen_is={side!r}: a or b, or leave it out")
    first, second = (chosen, rejected) if side == "a" else (rejected, chosen)
    return store.Pair(row["prompt"], first[0], second[0], first[1], second[1], row.get("sampling") or "{}"), side


def add_rows(db: sqlite3.Connection, rows: Iterable[Mapping[str, Any]], labeler: str = "imported") -> int:
    """Add the choices of rows, checked as `read` does, in one transaction; returns how many were new.

    `labeler` chose where a row does not say who. What a store has no place for (margin, weight) is not kept.

    Raises:
        ValueError: a row that makes no choice, and what is wrong with it.
    """
    with schema.transaction(db):
        before = store.last_sequence(db)
        for number, row in enumerate(rows, 1):
            try:
                pair, side = as_pair(row)
                who = row.get("labeler") or labeler
                left = row.get("left") or store.left_response(pair.id, who)
                word = "tie" if row.get("tie") else "left" if side == left else "right"
                kept = {
                    name: row[name] for name in ("strength", "note", "seconds", "time", "schema") if row.get(name) is not None
                }
                store.add_pairs(db, [pair])
                store.record(db, [store.Choice(pair.id, who, word, left, **kept)])
            except (ValueError, TypeError, sqlite3.IntegrityError) as error:
                raise ValueError(f"row {number}: {error}") from error
        return db.execute("SELECT COUNT(*) FROM events WHERE sequence > ?", (before,)).fetchone()[0]


def as_gold(rows: Iterable[Mapping[str, Any]]) -> list[tuple[store.Pair, str]]:
    """Rows whose answer is known, as `assignments.add_gold` takes them."""
    return [(pair, "tie" if row.get("tie") else side) for row in rows for pair, side in [as_pair(row)]]
