"""The tables of the feedback store, the steps from each version of them to the next, and transactions.

A new file is made by the same steps that bring an old one forward, so there is one way to each version. `pairs`, `events`
and `gold` are append-only, by triggers (but for texts withdrawn); `progress` is derived from them, by triggers too, but for
the places in the queue (`number`), which are those of arrival until `assignments.ask_first` shares them out anew;
`leases` and `labelers` are the present state of who is at work.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

_FIRST = """
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

# What a page needs: the client's own id of a choice, how sure and how long, places for k labelers, gold, tokens.
_SECOND = """
ALTER TABLE events ADD COLUMN strength INTEGER CHECK (strength BETWEEN 1 AND 3);  -- 1 slightly, 2 clearly, 3 much better
ALTER TABLE events ADD COLUMN note TEXT NOT NULL DEFAULT '';
ALTER TABLE events ADD COLUMN seconds REAL CHECK (seconds >= 0);  -- from showing to choosing
ALTER TABLE events ADD COLUMN id TEXT;                            -- made by the client: a retry is the same event
ALTER TABLE events ADD COLUMN schema INTEGER NOT NULL DEFAULT 1;  -- the version that wrote the row
CREATE UNIQUE INDEX events_by_id ON events (id) WHERE id IS NOT NULL;
CREATE INDEX events_of_labeler ON events (labeler, sequence);
CREATE TABLE gold (
    pair TEXT PRIMARY KEY REFERENCES pairs (id),
    answer TEXT NOT NULL CHECK (answer IN ('a', 'b', 'tie', 'both_bad')),
    time REAL NOT NULL
) STRICT;
CREATE TRIGGER gold_no_update BEFORE UPDATE ON gold BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER gold_no_delete BEFORE DELETE ON gold BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TABLE progress (                  -- pairs to be labelled, and how many standing labels each has; skips are none
    pair TEXT PRIMARY KEY REFERENCES pairs (id),
    number INTEGER NOT NULL,
    labels INTEGER NOT NULL CHECK (labels >= 0)
) STRICT, WITHOUT ROWID;
CREATE INDEX progress_next ON progress (labels, number);
INSERT INTO progress SELECT id, number, (
    SELECT COUNT(*) FROM events AS e WHERE e.pair = pairs.id AND e.choice NOT IN ('undo', 'skip') AND NOT EXISTS (
        SELECT 1 FROM events AS later WHERE later.pair = e.pair AND later.labeler = e.labeler AND later.sequence > e.sequence
    )
) FROM pairs;
CREATE TRIGGER progress_of_pair AFTER INSERT ON pairs BEGIN
    INSERT INTO progress VALUES (NEW.id, NEW.number, 0);
END;
CREATE TRIGGER progress_of_gold AFTER INSERT ON gold BEGIN DELETE FROM progress WHERE pair = NEW.pair; END;
CREATE TRIGGER progress_of_label AFTER INSERT ON events WHEN NEW.choice NOT IN ('undo', 'skip') BEGIN
    UPDATE progress SET labels = labels + 1 WHERE pair = NEW.pair;
END;
CREATE TRIGGER progress_of_undo AFTER INSERT ON events WHEN NEW.choice = 'undo' BEGIN
    UPDATE progress SET labels = labels - ('skip' <> (
        SELECT choice FROM events WHERE pair = NEW.pair AND labeler = NEW.labeler AND sequence < NEW.sequence
        ORDER BY sequence DESC LIMIT 1
    )) WHERE pair = NEW.pair;
END;
CREATE TABLE leases (                    -- who was given which pair; a row stays, so that a late answer is recognised
    pair TEXT NOT NULL REFERENCES pairs (id),
    labeler TEXT NOT NULL,
    left_response TEXT NOT NULL CHECK (left_response IN ('a', 'b')),
    deadline REAL NOT NULL,              -- seconds since 1970; 0: answered
    PRIMARY KEY (pair, labeler)
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_of_labeler ON leases (labeler, deadline);
CREATE TRIGGER leases_of_choice AFTER INSERT ON events WHEN NEW.choice <> 'undo' BEGIN
    UPDATE leases SET deadline = 0 WHERE pair = NEW.pair AND labeler = NEW.labeler;
END;
CREATE TABLE withdrawn (                 -- pairs whose texts somebody had a right to take back: the rows stay, empty
    pair TEXT PRIMARY KEY REFERENCES pairs (id),
    time REAL NOT NULL
) STRICT;
DROP TRIGGER pairs_no_update;
CREATE TRIGGER pairs_no_update BEFORE UPDATE ON pairs WHEN NEW.prompt || NEW.response_a || NEW.response_b <> ''
    OR NEW.id <> OLD.id OR NEW.number <> OLD.number OR NOT EXISTS (SELECT 1 FROM withdrawn WHERE pair = OLD.id)
BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
DROP TRIGGER events_no_update;
CREATE TRIGGER events_no_update BEFORE UPDATE ON events WHEN NEW.note <> '' OR NEW.sequence <> OLD.sequence
    OR NEW.pair || NEW.labeler || NEW.choice || NEW.left_response <> OLD.pair || OLD.labeler || OLD.choice || OLD.left_response
    OR NOT EXISTS (SELECT 1 FROM withdrawn WHERE pair = OLD.pair)
BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER withdrawn_no_update BEFORE UPDATE ON withdrawn BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER withdrawn_no_delete BEFORE DELETE ON withdrawn BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER withdrawn_texts AFTER INSERT ON withdrawn BEGIN
    UPDATE pairs SET prompt = '', response_a = '', response_b = '' WHERE id = NEW.pair;
    UPDATE events SET note = '' WHERE pair = NEW.pair;
    DELETE FROM progress WHERE pair = NEW.pair;
    DELETE FROM leases WHERE pair = NEW.pair;
END;
CREATE TABLE labelers (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('labeler', 'admin')),
    token_hash TEXT NOT NULL UNIQUE,     -- SHA-256 of a token of 256 random bits
    time REAL NOT NULL
) STRICT;
"""

# What the chat page needs: judgements of single answers, and who agreed that they are kept.
_THIRD = """
CREATE TABLE consents (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    person TEXT NOT NULL,
    given INTEGER NOT NULL CHECK (given IN (0, 1)),
    wording TEXT NOT NULL,               -- what the person was asked
    time REAL NOT NULL
) STRICT;
CREATE INDEX consents_of_person ON consents (person, sequence);
CREATE TRIGGER consents_no_update BEFORE UPDATE ON consents BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER consents_no_delete BEFORE DELETE ON consents BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TABLE ratings (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    answer TEXT NOT NULL,                -- hash of prompt and response
    prompt TEXT NOT NULL,
    response TEXT NOT NULL,
    person TEXT NOT NULL,
    good INTEGER NOT NULL CHECK (good IN (0, 1)),
    checkpoint TEXT NOT NULL,            -- the policy that wrote the response
    sampling TEXT NOT NULL,              -- JSON of how it was drawn
    time REAL NOT NULL,
    schema INTEGER NOT NULL              -- the version that wrote the row
) STRICT;
CREATE INDEX ratings_of_answer ON ratings (answer, person, sequence);
CREATE TABLE withdrawn_answers (         -- whose texts somebody had a right to take back: the rows stay, empty
    answer TEXT PRIMARY KEY,
    time REAL NOT NULL
) STRICT;
CREATE TRIGGER ratings_no_update BEFORE UPDATE ON ratings WHEN NEW.prompt || NEW.response <> ''
    OR NEW.sequence <> OLD.sequence OR NEW.answer <> OLD.answer OR NEW.person <> OLD.person OR NEW.good <> OLD.good
    OR NEW.checkpoint <> OLD.checkpoint OR NEW.sampling <> OLD.sampling OR NEW.time <> OLD.time OR NEW.schema <> OLD.schema
    OR NOT EXISTS (SELECT 1 FROM withdrawn_answers WHERE answer = OLD.answer)
BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER ratings_no_delete BEFORE DELETE ON ratings BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER withdrawn_answers_no_update BEFORE UPDATE ON withdrawn_answers
BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER withdrawn_answers_no_delete BEFORE DELETE ON withdrawn_answers
BEGIN SELECT RAISE(ABORT, 'the store is append-only'); END;
CREATE TRIGGER withdrawn_answers_texts AFTER INSERT ON withdrawn_answers BEGIN
    UPDATE ratings SET prompt = '', response = '' WHERE answer = NEW.answer;
END;
"""

STEPS = (_FIRST, _SECOND, _THIRD)
VERSION = len(STEPS)
BUSY_SECONDS = 5.0  # how long one program waits for another's write


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Check that an open file is a store, make its tables or bring them to this version, and set how it is written.

    Raises:
        ValueError: the file is another program's, is damaged, or was written by a newer version.
    """
    db.execute("BEGIN")  # both of one moment: another program may be making the tables just now
    version = _version(db)
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    db.execute("COMMIT")
    if version > VERSION:
        raise ValueError(f"{path}: schema version {version} is newer than this program's {VERSION}; update jaxrlhf")
    if tables and (version == 0 or not {"pairs", "events"} <= tables):
        raise ValueError(f"{path}: an SQLite file of another program; give another path")
    problem = db.execute("PRAGMA quick_check").fetchone()[0]
    if problem != "ok":
        raise ValueError(f"{path}: damaged ({problem}); restore a copy or give another path")
    _write_ahead(db)
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA secure_delete = ON")  # a text that is withdrawn is overwritten, not only forgotten
    if version < VERSION:
        with transaction(db):
            for number, script in list(enumerate(STEPS, 1))[_version(db) :]:  # another program may have done some meanwhile
                for statement in _statements(script):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")


def _write_ahead(db: sqlite3.Connection) -> None:
    """Let readers go on beside the writer. SQLite does not wait for others here, as it does everywhere else, so we do."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _version(db: sqlite3.Connection) -> int:
    return db.execute("PRAGMA user_version").fetchone()[0]


def _statements(script: str) -> list[str]:
    """The statements of a script: `executescript` would commit the transaction that makes a step atomic."""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current)
            current = ""
    return statements


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One writer at a time; on disk when it ends, undone when it raises. Inside another one: a part that may fail alone."""
    begin, end, back = ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
    if db.in_transaction:
        begin, end, back = ("SAVEPOINT part", "RELEASE part", "ROLLBACK TO part")
    db.execute(begin)
    try:
        yield
        db.execute(end)
    except BaseException:
        if db.in_transaction:  # a full disk ends the transaction by itself
            db.execute(back)
            if back.endswith("part"):
                db.execute(end)
        raise
