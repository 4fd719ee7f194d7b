"""The feedback store: pairs shown to people and what they chose, in one append-only SQLite file.

Nothing is ever changed or removed (but what is withdrawn): a choice is an event, an undo is a later event, and the current
state is a view over both. Events carry a sequence number, so a trainer that reads `upto=n` reads the same rows for ever. A
call that returns has reached the disk (`synchronous=FULL`). Repeating a call changes nothing: a pair's id is a hash of its
texts, and a labeler has at most one standing choice a pair.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxrlhf.feedback import schema

Side = Literal["a", "b"]
Word = Literal["left", "right", "tie", "both_bad", "skip"]
MAX_NOTE = 2000  # characters
_COLUMNS = "pair, labeler, choice, left_response, time, sequence, strength, note, seconds, id, schema"  # as in Choice


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


_FIELDS = ", ".join(field.name for field in dataclasses.fields(Pair))


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a labeler said of a pair, as shown: `left_response` names the response that stood at the left."""

    pair: str
    labeler: str
    choice: Word
    left_response: Side
    time: float = 0.0  # seconds since 1970; 0: now, filled in by `record`
    sequence: int = 0  # filled in by the store
    strength: int | None = None  # 1 slightly, 2 clearly, 3 much better
    note: str = ""
    seconds: float | None = None  # from showing to choosing
    id: str | None = None  # made by the client: what has it twice is one choice, sent again
    schema: int = schema.VERSION  # of the program that wrote it

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
        db = sqlite3.connect(path, timeout=schema.BUSY_SECONDS, isolation_level=None)
        try:
            schema.prepare(db, path)
        except BaseException:
            db.close()
            raise
    except sqlite3.OperationalError as error:  # locked, not permitted, no room: the file may be sound
        raise ValueError(f"{path}: cannot be opened now ({error}); end the program that holds it") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: not a readable feedback store ({error}); restore a copy or give another path") from error
    return db


def left_response(pair: str, labeler: str) -> Side:
    """Which response of a pair stands at the left for a labeler: a fair coin, the same at every showing."""
    return "a" if uniform("side", pair, labeler) < 0.5 else "b"


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) that depends on the parts alone, so an answer depends on no order of asking."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: what a double holds below 1


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
    with schema.transaction(db):
        before = db.execute("SELECT COUNT(*) FROM pairs").fetchone()[0]
        number = before
        for pair in pairs:
            row = (pair.id, number, *dataclasses.astuple(pair), now)
            number += db.execute("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row).rowcount
        return number - before


def pairs(db: sqlite3.Connection) -> list[Pair]:
    """All pairs in order of arrival, gold ones too, but for those withdrawn."""
    rows = db.execute(f"SELECT {_FIELDS} FROM pairs WHERE id NOT IN (SELECT pair FROM withdrawn) ORDER BY number")
    return [Pair(*row) for row in rows]


def pair_of_id(db: sqlite3.Connection, pair: str) -> Pair | None:
    """The pair with an id, or None."""
    row = db.execute(f"SELECT {_FIELDS} FROM pairs WHERE id = ?", (pair,)).fetchone()
    return None if row is None else Pair(*row)


def record(db: sqlite3.Connection, choices: Sequence[Choice]) -> list[Choice]:
    """Append choices in one transaction and return them as they now stand, with sequence number and time.

    Where the labeler's choice on a pair already stands, the first one is kept and returned: a retry or a double click
    adds nothing, nor does an `id` that is there already, even if its choice was taken back since. To change a choice,
    `undo` it first.

    Raises:
        ValueError: an unknown pair, a word that is no choice, or a strength, note, time or id that cannot be.
    """
    with schema.transaction(db):
        return [_record(db, choice) for choice in choices]


def _record(db: sqlite3.Connection, choice: Choice) -> Choice:
    if problem := _problem(choice):
        raise ValueError(problem)
    if choice.id is not None and (known := event_of_id(db, choice.id, choice.labeler)) is not None:
        if known.pair != choice.pair or known.choice not in get_args(Word):
            raise ValueError(f"id {choice.id!r} is that of another event: draw a new one for each choice and undo")
        return known
    if pair_of_id(db, choice.pair) is None:
        raise ValueError(f"pair {choice.pair!r} is not in the store; add it before choosing")
    standing = standing_choice(db, choice.pair, choice.labeler)
    if standing is not None:
        return standing
    stamped = dataclasses.replace(choice, time=choice.time or time.time())
    return dataclasses.replace(stamped, sequence=_append(db, stamped, stamped.choice))


def _problem(choice: Choice) -> str | None:
    """Why a choice cannot be kept, if so."""
    if choice.choice not in get_args(Word) or choice.left_response not in ("a", "b"):
        return f"choice {choice.choice!r} with {choice.left_response!r} at the left: one of {get_args(Word)}, and a or b"
    if choice.strength is not None and (choice.strength not in (1, 2, 3) or choice.preferred is None):
        return f"strength {choice.strength!r} of '{choice.choice}': 1, 2 or 3, and only of left or right; else leave it out"
    if len(choice.note) > MAX_NOTE:
        return f"a note of {len(choice.note)} characters: at most {MAX_NOTE}; shorten it"
    if choice.seconds is not None and not 0 <= choice.seconds < 1e9:
        return f"seconds={choice.seconds}: the time taken is a number >= 0; leave it out where it is not known"
    return _id_problem(choice.id)


def _id_problem(event: str | None) -> str | None:
    if event is None or 8 <= len(event) <= 64:
        return None
    return f"id {event[:80]!r}: 8 to 64 characters, drawn at random by the client"


def _append(db: sqlite3.Connection, choice: Choice, word: str) -> int:
    row = dataclasses.asdict(choice) | {"choice": word, "sequence": None}
    statement = f"INSERT INTO events ({_COLUMNS}) VALUES ({', '.join(f':{name.strip()}' for name in _COLUMNS.split(','))})"
    return db.execute(statement + " RETURNING sequence", row).fetchone()[0]


def event_of_id(db: sqlite3.Connection, event: str, labeler: str) -> Choice | None:
    """The choice, standing or taken back, or the undo (whose word is `undo`) that a client sent under an id.

    Raises:
        ValueError: another labeler's.
    """
    row = db.execute(f"SELECT {_COLUMNS} FROM events WHERE id = ?", (event,)).fetchone()
    if row is not None and row[1] != labeler:
        raise ValueError(f"id {event!r} is another labeler's: draw ids at random")
    return None if row is None else Choice(*row)


def standing_choice(db: sqlite3.Connection, pair: str, labeler: str) -> Choice | None:
    """A labeler's choice on a pair, or None where there is none or it was taken back."""
    row = db.execute(
        f"SELECT {_COLUMNS} FROM events WHERE pair = ? AND labeler = ? ORDER BY sequence DESC LIMIT 1", (pair, labeler)
    ).fetchone()
    return None if row is None or row[2] == "undo" else Choice(*row)


def undo(db: sqlite3.Connection, labeler: str, event: str | None = None) -> Choice | None:
    """Take back the labeler's latest standing choice by a new event, and return it; None where there is none.

    With the same id `event` again it only says what was taken back then.

    Raises:
        ValueError: an id that cannot be, or is that of something else.
    """
    if problem := _id_problem(event):
        raise ValueError(problem)
    with schema.transaction(db):
        if event is not None and (known := event_of_id(db, event, labeler)) is not None:
            taken = db.execute(
                f"SELECT {_COLUMNS} FROM events WHERE pair = ? AND labeler = ? AND sequence < ? ORDER BY sequence DESC LIMIT 1",
                (known.pair, labeler, known.sequence),
            ).fetchone()
            if taken is None or db.execute("SELECT choice FROM events WHERE id = ?", (event,)).fetchone() != ("undo",):
                raise ValueError(f"id {event!r} is that of a choice: draw a new one for each choice and undo")
            return Choice(*taken)
        row = db.execute(
            f"SELECT {_COLUMNS} FROM events AS e WHERE labeler = ? AND choice <> 'undo' "
            "AND pair NOT IN (SELECT pair FROM withdrawn) AND NOT EXISTS (SELECT 1 FROM events AS later "
            "WHERE later.pair = e.pair AND later.labeler = e.labeler AND later.sequence > e.sequence) "
            "ORDER BY sequence DESC LIMIT 1",
            (labeler,),
        ).fetchone()
        if row is None:
            return None
        taken = Choice(*row)
        empty = {"strength": None, "note": "", "seconds": None, "schema": schema.VERSION}
        _append(db, dataclasses.replace(taken, time=time.time(), id=event, **empty), "undo")
        return taken


def gold(db: sqlite3.Connection) -> dict[str, str]:
    """The known answers: pair id to a, b, tie or both_bad."""
    return dict(db.execute("SELECT pair, answer FROM gold WHERE pair NOT IN (SELECT pair FROM withdrawn)"))


def withdraw(db: sqlite3.Connection, ids: Iterable[str]) -> int:
    """Take the texts of pairs, and notes on them, out of the file; returns how many pairs had not been withdrawn before.

    Their rows stay, empty, so that numbers and counts hold; their choices are in no result any more, whatever `upto`. It is
    the one thing that changes the past. Copies made earlier are yours to find.

    Raises:
        ValueError: an unknown pair, of which no text is then withdrawn.
    """
    with schema.transaction(db):
        before = db.execute("SELECT COUNT(*) FROM withdrawn").fetchone()[0]
        for pair in ids:
            if pair_of_id(db, pair) is None:
                raise ValueError(f"pair {pair!r} is not in the store: nothing was withdrawn")
            db.execute("INSERT OR IGNORE INTO withdrawn VALUES (?, ?)", (pair, time.time()))
        new = db.execute("SELECT COUNT(*) FROM withdrawn").fetchone()[0] - before
    if not db.in_transaction:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log beside the file holds older pages
    return new


def last_sequence(db: sqlite3.Connection) -> int:
    """Number of the latest event; 0 where there is none."""
    return db.execute("SELECT COALESCE(MAX(sequence), 0) FROM events").fetchone()[0]


def choices(db: sqlite3.Connection, upto: int | None = None) -> list[Choice]:
    """The choices that stand (or stood, after event number `upto`), in order of their sequence numbers."""
    columns = _COLUMNS.replace("sequence", "MAX(sequence) AS last")  # SQLite gives the row of the maximum
    rows = db.execute(
        f"SELECT {columns} FROM events WHERE sequence <= ? AND pair NOT IN (SELECT pair FROM withdrawn) "
        "GROUP BY pair, labeler ORDER BY last",
        (last_sequence(db) if upto is None else upto,),
    )
    return [Choice(*row) for row in rows if row[2] != "undo"]


def unlabelled(db: sqlite3.Connection, labeler: str) -> list[Pair]:
    """The pairs without a standing choice of this labeler, in the order in which they are asked about: that of arrival, but
    where `assignments.ask_first` changed it.
    """
    done = {choice.pair for choice in choices(db) if choice.labeler == labeler}
    rows = db.execute(
        f"SELECT {_FIELDS} FROM pairs LEFT JOIN progress ON progress.pair = pairs.id "
        "WHERE id NOT IN (SELECT pair FROM withdrawn) ORDER BY COALESCE(progress.number, pairs.number)"
    )
    return [pair for row in rows if (pair := Pair(*row)).id not in done]


def preferences(db: sqlite3.Connection, upto: int | None = None, ties: bool = False) -> list[dict[str, Any]]:
    """Preference rows for training, one a choice: prompt, chosen, rejected, tie, and where each came from.

    Skips, two bad ones and gold pairs are left out; a tie is left out too unless `ties`, and then `chosen` is response a.
    `chosen_is` and `left` name responses as the store does (a, b), so that `exchange.add_rows` makes the same store of it.
    """
    by_id, known = {pair.id: pair for pair in pairs(db)}, gold(db)
    rows = []
    for choice in choices(db, upto):
        tie = choice.choice == "tie"
        if choice.pair in known or (choice.preferred is None and not (ties and tie)):
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
                "chosen_is": choice.preferred or "a",
                "left": choice.left_response,
                "strength": choice.strength,
                "note": choice.note,
                "seconds": choice.seconds,
                "time": choice.time,
                "schema": choice.schema,
                "sequence": choice.sequence,
            }
        )
    return rows
