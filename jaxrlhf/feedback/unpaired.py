"""Judgements of single answers, thumbs up or down, and who agreed that what they say is kept.

As everything in the store these are events: a later judgement of the same answer by the same person stands in the place of the
earlier one, and taking consent back is a later event. What KTO learns from (`algorithms/kto.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from jaxrlhf.feedback import schema

_FIELDS = "prompt, response, person, good, checkpoint, sampling"


@dataclasses.dataclass(frozen=True)
class Rating:
    """What a person thinks of one answer."""

    prompt: str
    response: str
    person: str
    good: bool
    checkpoint: str = ""  # the policy that wrote it
    sampling: str = "{}"  # JSON of how it was drawn

    @property
    def answer(self) -> str:
        """Hash of prompt and response, by which an answer is known again."""
        content = json.dumps([self.prompt, self.response], ensure_ascii=False).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(content, digest_size=12).hexdigest()


def consent(db: sqlite3.Connection, person: str, given: bool, wording: str) -> None:
    """Note that a person agrees to the wording, or no longer does. Saying the same twice adds nothing."""
    with schema.transaction(db):
        before = _latest(db, person)
        if before != (given, wording):
            row = (person, given, wording, time.time())
            db.execute("INSERT INTO consents (person, given, wording, time) VALUES (?, ?, ?, ?)", row)


def consented(db: sqlite3.Connection, person: str) -> bool:
    """Whether a person agrees now."""
    found = _latest(db, person)
    return found is not None and found[0]


def _latest(db: sqlite3.Connection, person: str) -> tuple[bool, str] | None:
    query = "SELECT given, wording FROM consents WHERE person = ? ORDER BY sequence DESC LIMIT 1"
    row = db.execute(query, (person,)).fetchone()
    return None if row is None else (bool(row[0]), row[1])


def add(db: sqlite3.Connection, ratings: Sequence[Rating]) -> int:
    """Append judgements in one transaction; returns how many said anything new."""
    new = 0
    with schema.transaction(db):
        for each in ratings:
            query = "SELECT good FROM ratings WHERE answer = ? AND person = ? ORDER BY sequence DESC LIMIT 1"
            before = db.execute(query, (each.answer, each.person)).fetchone()
            if before is not None and bool(before[0]) == each.good:
                continue
            row = (each.answer, *dataclasses.astuple(each), time.time(), schema.VERSION)
            db.execute(f"INSERT INTO ratings (answer, {_FIELDS}, time, schema) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            new += 1
    return new


def ratings(db: sqlite3.Connection, upto: int | None = None) -> list[Rating]:
    """Judgements that stand, in order of their events, without those withdrawn; `upto`: as after that event."""
    query = f"""SELECT {_FIELDS} FROM ratings AS r WHERE sequence <= ? AND answer NOT IN (SELECT answer FROM withdrawn_answers)
        AND NOT EXISTS (SELECT 1 FROM ratings AS l WHERE l.answer = r.answer AND l.person = r.person
        AND l.sequence > r.sequence AND l.sequence <= ?) ORDER BY sequence"""
    most = 2**62 if upto is None else upto
    found = db.execute(query, (most, most))
    return [Rating(prompt, response, who, bool(good), *origin) for prompt, response, who, good, *origin in found]


def last_sequence(db: sqlite3.Connection) -> int:
    """Number of the latest judgement; 0 where there is none."""
    return db.execute("SELECT COALESCE(MAX(sequence), 0) FROM ratings").fetchone()[0]


def rows(db: sqlite3.Connection, upto: int | None = None) -> list[dict[str, Any]]:
    """Judgements that stand (`upto`: stood) in the form that KTO trainers read: prompt, completion, label."""
    return [{"prompt": each.prompt, "completion": each.response, "label": each.good} for each in ratings(db, upto)]


def withdraw(db: sqlite3.Connection, answer: str) -> None:
    """Empty the texts of an answer that somebody has a right to take back; the events stay. It counts for nothing any more.

    Raises:
        ValueError: no such answer.
    """
    with schema.transaction(db):
        if db.execute("SELECT 1 FROM ratings WHERE answer = ?", (answer,)).fetchone() is None:
            raise ValueError(f"no judgement of an answer {answer!r}")
        db.execute("INSERT OR IGNORE INTO withdrawn_answers VALUES (?, ?)", (answer, time.time()))
