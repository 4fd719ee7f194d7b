"""The feedback store: pairs shown to people and what they chose, in one append-only SQLite file.

Nothing is ever changed or removed: a choice is an event, an undo is a later event, and the current state is a view over
both. Events carry a sequence number, so a trainer that reads `upto=n` reads the same rows for ever. A call that returns
has reached the disk (`synchronous=FULL`). Repeating a call changes nothing: a pair's id is a hash of its texts, and a
labeler has at most one standing choice a pair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

SCHEMA_VERSION = 1
Side = Literal["a", "b"]
Word = Literal["left", "right", "tie", "both_bad", "skip"]

_SCHEMA = """
CREATE TABLE pairs (
    id TEXT PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE,      -- order of arrival
    prompt TEXT NOT NULL,
    response_a TEXT NOT NULL,
    response_b TEXT NOT NULL,
    checkpoint_a TEXT NOT NULL,          -- the policy that wrote each response
    checkpoint_b TEXT NOT NULL,
    sampling TEXT NOT NULL,              -- JSON of the SamplingSpec
    time REAL NOT NULL                   -- seconds since 1970, UTC
) STRICT;
CREATE TABLE events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    pair TEXT NOT NULL REFERENCES pairs (id),
    labeler TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'both_bad', 'skip', 'undo')),
    left_response TEXT NOT NULL CHECK (left_response IN ('a', 'b')),  -- which response stood at the left
    time REAL NOT NULL
) STRICT;
CREATE INDEX events_of_pair ON events (pair, labeler, sequence);
CREATE TRIGGER pairs_no_update BEFORE UPDATE ON pairs BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER pairs_no_delete BEFORE DELETE ON pairs BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
"""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt. `sampling` is the JSON of the spec they were drawn with."""

    prompt: str
    response_a: str
    response_b: str
    checkpoint_a: str = ""
    checkpoint_b: str = ""
    sampling: str = "{}"

    @property
    def id(self) -> str:
        """Hash of the three texts: the same pair added twice is one pair, and what is drawn by its id (the side shown, a
        simulated person's errors) depends on no folder's name.
        """
        content = json.dumps([self.prompt, self.response_a, self.response_b], ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        return hashlib.blake2b(content, digest_size=12).hexdigest()


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a labeler said of a pair, as shown: `left_response` names the response that stood at the left."""

    pair: str
    labeler: str
    choice: Word
    left_response: Side
    time: float = 0.0  # seconds since 1970; 0: now, filled in by `record`
    sequence: int = 0  # filled in by the store

    @property
    def preferred(self) -> Side | None:
        """The response preferred, or None for a tie, two bad ones or a skip."""
        if self.choice not in ("left", "right"):
            return None
        return self.left_response if self.choice == "left" else ("b" if self.left_response == "a" else "a")


def open_store(path: str | Path) -> sqlite3.Connection:
    """Open the store, creating it where there is no file; close the connection when done (`contextlib.closing`).

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the file is not a feedback store, is damaged, or was written by a newer version.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first")
    try:
        db = sqlite3.connect(path, timeout=5.0, isolation_level=None)
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: not a readable feedback store ({error}); restore a copy or give another path") from error
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version > SCHEMA_VERSION:
        raise ValueError(f"{path}: schema version {version} is newer than this program's {SCHEMA_VERSION}; update jaxrlhf")
    if tables and (version == 0 or not {"pairs", "events"} <= tables):
        raise ValueError(f"{path}: an SQLite file of another program; give another path")
    problem = db.execute("PRAGMA quick_check").fetchone()[0]
    if problem != "ok":
        raise ValueError(f"{path}: damaged ({problem}); restore a copy or give another path")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    if not version:
        with _transaction(db):
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:  # two programs may create at once
                for statement in _statements(_SCHEMA):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _statements(script: str) -> list[str]:
    """The statements of a script: `executescript` would commit the transaction that makes creation atomic."""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One writer at a time; on disk when it ends, undone when it raises."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def add_pairs(db: sqlite3.Connection, pairs: Iterable[Pair]) -> int:
    """Add pairs in one transaction and return how many were new.

    Raises:
        ValueError: the two responses of a pair are the same text, which nobody can choose between.
    """
    pairs = list(pairs)
    for pair in pairs:
        if pair.response_a == pair.response_b:
            raise ValueError(f"pair {pair.id}: both responses are {pair.response_a!r}; leave such a pair out")
    now = time.time()
    with _transaction(db):
        before = db.execute("SELECT COUNT(*) FROM pairs").fetchone()[0]
        number = before
        for pair in pairs:
            row = (pair.id, number, *dataclasses.astuple(pair), now)
            number += db.execute("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row).rowcount
        return number - before


def pairs(db: sqlite3.Connection) -> list[Pair]:
    """All pairs in order of arrival."""
    fields = ", ".join(field.name for field in dataclasses.fields(Pair))
    return [Pair(*row) for row in db.execute(f"SELECT {fields} FROM pairs ORDER BY number")]


def record(db: sqlite3.Connection, choices: Sequence[Choice]) -> list[Choice]:
    """Append choices in one transaction and return them as they now stand, with sequence number and time.

    Where the labeler's choice on a pair already stands, the first one is kept and returned: a retry or a double click
    adds nothing. To change a choice, `undo` it first.

    Raises:
        ValueError: an unknown pair, or a word that is no choice.
    """
    with _transaction(db):
        return [_record(db, choice) for choice in choices]


def _record(db: sqlite3.Connection, choice: Choice) -> Choice:
    if choice.choice not in get_args(Word) or choice.left_response not in ("a", "b"):
        raise ValueError(
            f"choice {choice.choice!r} with {choice.left_response!r} at the left: one of {get_args(Word)}, and a or b"
        )
    if db.execute("SELECT 1 FROM pairs WHERE id = ?", (choice.pair,)).fetchone() is None:
        raise ValueError(f"pair {choice.pair!r} is not in the store; add it before choosing")
    standing = _last_event(db, choice.pair, choice.labeler)
    if standing is not None:
        return standing
    stamped = dataclasses.replace(choice, time=choice.time or time.time())
    return dataclasses.replace(stamped, sequence=_append(db, stamped, stamped.choice))


def _append(db: sqlite3.Connection, choice: Choice, word: str) -> int:
    row = (choice.pair, choice.labeler, word, choice.left_response, choice.time)
    statement = "INSERT INTO events (pair, labeler, choice, left_response, time) VALUES (?, ?, ?, ?, ?) RETURNING sequence"
    return db.execute(statement, row).fetchone()[0]


def _last_event(db: sqlite3.Connection, pair: str, labeler: str) -> Choice | None:
    row = db.execute(
        "SELECT pair, labeler, choice, left_response, time, sequence FROM events WHERE pair = ? AND labeler = ? "
        "ORDER BY sequence DESC LIMIT 1",
        (pair, labeler),
    ).fetchone()
    return None if row is None or row[2] == "undo" else Choice(*row)


def undo(db: sqlite3.Connection, labeler: str) -> Choice | None:
    """Take back the labeler's latest standing choice by a new event, and return it; None where there is none."""
    with _transaction(db):
        mine = [choice for choice in choices(db) if choice.labeler == labeler]
        if not mine:
            return None
        _append(db, dataclasses.replace(mine[-1], time=time.time()), "undo")
        return mine[-1]


def last_sequence(db: sqlite3.Connection) -> int:
    """Number of the latest event; 0 where there is none."""
    return db.execute("SELECT COALESCE(MAX(sequence), 0) FROM events").fetchone()[0]


def choices(db: sqlite3.Connection, upto: int | None = None) -> list[Choice]:
    """The choices that stand (or stood, after event number `upto`), in order of their sequence numbers."""
    rows = db.execute(
        "SELECT pair, labeler, choice, left_response, time, MAX(sequence) AS last FROM events "  # the row of the maximum
        "WHERE sequence <= ? GROUP BY pair, labeler ORDER BY last",
        (last_sequence(db) if upto is None else upto,),
    )
    return [Choice(*row) for row in rows if row[2] != "undo"]


def unlabelled(db: sqlite3.Connection, labeler: str) -> list[Pair]:
    """The pairs without a standing choice of this labeler, in order of arrival."""
    done = {choice.pair for choice in choices(db) if choice.labeler == labeler}
    return [pair for pair in pairs(db) if pair.id not in done]


def preferences(db: sqlite3.Connection, upto: int | None = None, ties: bool = False) -> list[dict[str, Any]]:
    """Preference rows for training, one a choice: prompt, chosen, rejected, tie, pair, labeler, checkpoint_*, sequence.

    Skips and two bad ones are left out; a tie is left out too unless `ties`, and then `chosen` is response a.
    """
    by_id = {pair.id: pair for pair in pairs(db)}
    rows = []
    for choice in choices(db, upto):
        tie = choice.choice == "tie"
        if choice.preferred is None and not (ties and tie):
            continue
        pair = by_id[choice.pair]
        sides = [(pair.response_a, pair.checkpoint_a), (pair.response_b, pair.checkpoint_b)]
        (chosen, chosen_by), (rejected, rejected_by) = sides if choice.preferred != "b" else sides[::-1]
        rows.append(
            {
                "prompt": pair.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "tie": tie,
                "pair": pair.id,
                "labeler": choice.labeler,
                "checkpoint_chosen": chosen_by,
                "checkpoint_rejected": rejected_by,
                "sampling": pair.sampling,
                "sequence": choice.sequence,
            }
        )
    return rows
