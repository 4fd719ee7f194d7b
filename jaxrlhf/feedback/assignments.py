"""Who is asked about which pair, so that each gets labels from exactly k different people; gold pairs mixed in.

A pair is given under a lease: while it runs, its place is taken. An answer ends the lease (by a trigger), a lease that has
run out is a free place again, and an answer that comes late counts as long as a place is free. Each function is one
transaction, so no count can be outrun.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxrlhf.feedback import schema, store

_CLOCK = time.time() - time.monotonic()  # a clock set back or forward while the server runs moves no deadline


@dataclasses.dataclass(frozen=True)
class Rules:
    """How pairs are given out."""

    k: int = 1  # different people who label each pair
    lease_seconds: int | float = 1800.0  # after which an unanswered pair is given to somebody else
    gold_share: float = 0.1  # of the pairs that a person is given, as long as there are gold pairs left for them

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k={self.k}: at least 1 person labels each pair")
        if self.lease_seconds <= 0:
            raise ValueError(f"lease_seconds={self.lease_seconds} must be > 0")
        if not 0 <= self.gold_share < 1:
            raise ValueError(f"gold_share={self.gold_share} must be in [0, 1): the rest are the pairs to be labelled")


class Given(NamedTuple):
    """A pair as one person sees it."""

    pair: store.Pair
    left: store.Side


class Progress(NamedTuple):
    """How far a person, and all together, have come."""

    done: int  # this person's standing choices, skips and gold included
    waiting: int  # pairs that still lack labels and that this person has not chosen on
    labels: int  # of everybody, gold and skips not counted
    wanted: int  # k times the pairs


class NotGiven(ValueError):
    """The pair was never given to this labeler."""


class Full(ValueError):
    """Others have filled the pair's places meanwhile."""


def now() -> float:
    """Seconds since 1970 that never go back while a program runs."""
    return _CLOCK + time.monotonic()


def give(db: sqlite3.Connection, labeler: str, rules: Rules, count: int) -> list[Given]:
    """`count` pairs for a labeler, fewer where fewer are left: those held already (taken-back ones first), then new ones.

    Asking again prolongs what is held. Pairs with the fewest labels go first, in order of arrival or as `ask_first` has it.
    """
    with schema.transaction(db):
        moment = now()
        held = _held(db, labeler, moment)[:count]
        for pair in held:
            _lease(db, pair, labeler, moment + rules.lease_seconds)
        while len(held) < count and (pair := _next(db, labeler, rules, moment)) is not None:
            _lease(db, pair, labeler, moment + rules.lease_seconds)
            held.append(pair)
        return [_shown(db, pair, labeler) for pair in held]


def _held(db: sqlite3.Connection, labeler: str, moment: float) -> list[str]:
    """Pairs under a running lease of this labeler, taken-back ones first."""
    rows = db.execute(
        "SELECT l.pair FROM leases AS l JOIN pairs AS p ON p.id = l.pair WHERE l.labeler = ? AND l.deadline > ? ORDER BY "
        "NOT EXISTS (SELECT 1 FROM events AS e WHERE e.pair = l.pair AND e.labeler = l.labeler), p.number",
        (labeler, moment),
    )
    return [pair for (pair,) in rows]


# Of a pair p: this labeler has no standing choice on it, and does not hold it.
_FREE = """COALESCE((SELECT choice FROM events AS e WHERE e.pair = p.pair AND e.labeler = :labeler
    ORDER BY sequence DESC LIMIT 1), 'undo') = 'undo'
    AND NOT EXISTS (SELECT 1 FROM leases AS m WHERE m.pair = p.pair AND m.labeler = :labeler AND m.deadline > :moment)"""
_NEXT = f"""SELECT p.pair FROM progress AS p WHERE p.labels < :k AND {_FREE} AND p.labels + (SELECT COUNT(*) FROM leases AS l
    WHERE l.pair = p.pair AND l.labeler <> :labeler AND l.deadline > :moment) < :k ORDER BY p.labels, p.number LIMIT 1"""
_NEXT_GOLD = f"SELECT p.pair FROM gold AS p WHERE p.pair NOT IN (SELECT pair FROM withdrawn) AND {_FREE}"


def _next(db: sqlite3.Connection, labeler: str, rules: Rules, moment: float) -> str | None:
    """A pair that this labeler has not chosen on and that has a place free; now and then a gold one, each person's in an
    order of their own.
    """
    known = {"k": rules.k, "labeler": labeler, "moment": moment}
    given = db.execute("SELECT COUNT(*) FROM leases WHERE labeler = ?", (labeler,)).fetchone()[0]
    if store.uniform("gold", labeler, given) < rules.gold_share and (gold := db.execute(_NEXT_GOLD, known).fetchall()):
        return min((pair for (pair,) in gold), key=lambda pair: store.uniform("gold order", pair, labeler))
    found = db.execute(_NEXT, known).fetchone()
    return None if found is None else found[0]


def _lease(db: sqlite3.Connection, pair: str, labeler: str, deadline: float) -> None:
    db.execute(
        "INSERT INTO leases VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET deadline = excluded.deadline",
        (pair, labeler, store.left_response(pair, labeler), deadline),
    )


def _shown(db: sqlite3.Connection, pair: str, labeler: str) -> Given:
    found = store.pair_of_id(db, pair)
    assert found is not None  # leases refer to pairs
    left = db.execute("SELECT left_response FROM leases WHERE pair = ? AND labeler = ?", (pair, labeler)).fetchone()[0]
    return Given(found, left)


def answer(db: sqlite3.Connection, choice: store.Choice, rules: Rules) -> store.Choice:
    """Record what a labeler said of a pair that was given to them; the side shown is that of the lease, whatever `choice` says.

    A repeat (the same id, or a pair chosen on already) gives the choice that stands.

    Raises:
        NotGiven: the labeler was never shown this pair.
        Full: the lease had run out, and others filled the places meanwhile.
        ValueError: as `store.record`.
    """
    with schema.transaction(db):
        key = (choice.pair, choice.labeler)
        lease = db.execute("SELECT left_response FROM leases WHERE pair = ? AND labeler = ?", key).fetchone()
        if lease is None:
            raise NotGiven(f"pair {choice.pair!r} was not given to {choice.labeler}: ask for pairs first")
        sent = choice.id is not None and store.event_of_id(db, choice.id, choice.labeler) is not None
        repeated = sent or store.standing_choice(db, *key) is not None
        labels = db.execute("SELECT labels FROM progress WHERE pair = ?", (choice.pair,)).fetchone()
        if not repeated and choice.choice != "skip" and labels is not None and labels[0] >= rules.k:
            db.execute("UPDATE leases SET deadline = 0 WHERE pair = ? AND labeler = ?", key)
            full = Full(f"pair {choice.pair!r} has its {rules.k} labels from others: your place had run out")
        else:
            return store.record(db, [dataclasses.replace(choice, left_response=lease[0])])[0]
    raise full  # after the lease was given back


def take_back(db: sqlite3.Connection, labeler: str, rules: Rules, event: str | None = None) -> Given | None:
    """Undo the labeler's latest choice and give its pair again, its place kept; None where there is nothing to take back."""
    with schema.transaction(db):
        repeated = event is not None and store.event_of_id(db, event, labeler) is not None
        taken = store.undo(db, labeler, event)
        if taken is None:
            return None
        if not repeated:
            _lease(db, taken.pair, labeler, now() + rules.lease_seconds)
        return _shown(db, taken.pair, labeler)


def progress(db: sqlite3.Connection, labeler: str, rules: Rules) -> Progress:
    """How far the labeler, and all together, have come."""
    mine = "SELECT pair, MAX(sequence), choice FROM events WHERE labeler = ? GROUP BY pair"
    standing = [pair for pair, _, choice in db.execute(mine, (labeler,)) if choice != "undo"]
    labels, wanted, unfilled = db.execute(
        "SELECT COALESCE(SUM(MIN(labels, :k)), 0), COUNT(*) * :k, COALESCE(SUM(labels < :k), 0) FROM progress", {"k": rules.k}
    ).fetchone()
    answered = "SELECT COUNT(*) FROM progress WHERE pair = ? AND labels < ?"
    done_here = sum(db.execute(answered, (pair, rules.k)).fetchone()[0] for pair in standing)
    return Progress(len(standing), unfilled - done_here, labels, wanted)


def waiting(db: sqlite3.Connection, rules: Rules) -> list[store.Pair]:
    """The pairs that lack labels, in the order in which they are asked about; gold pairs are none."""
    of_id = {pair.id: pair for pair in store.pairs(db)}
    rows = db.execute("SELECT pair FROM progress WHERE labels < ? ORDER BY number", (rules.k,))
    return [of_id[pair] for (pair,) in rows]


def ask_first(db: sqlite3.Connection, pairs: Sequence[str]) -> None:
    """Ask about these pairs in this order: they share out among them the places that they have, whatever else is in the store.

    Pairs with fewer labels still go before those with more, leases hold, and pairs that arrive later come after.

    Raises:
        ValueError: a pair twice, or one that is not to be labelled; nothing is then changed.
    """
    with schema.transaction(db):
        places = dict(db.execute("SELECT pair, number FROM progress"))
        if wrong := [pair for pair in pairs if pair not in places]:
            raise ValueError(f"pair {wrong[0]!r} is not to be labelled: unknown, gold or withdrawn")
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"{len(pairs)} pairs, {len(set(pairs))} different ones: each has one place")
        shared = zip(sorted(places[pair] for pair in pairs), pairs, strict=True)
        db.executemany("UPDATE progress SET number = ? WHERE pair = ?", shared)


def add_gold(db: sqlite3.Connection, answers: Iterable[tuple[store.Pair, str]]) -> int:
    """Add pairs whose answer is known (`a`, `b`, `tie` or `both_bad`), to see who reads with care; returns how many were new.

    A gold pair is given to everyone, counts for nobody's k, and is in no training row.

    Raises:
        ValueError: an answer that is none, or a pair that has another one already.
    """
    answers = list(answers)
    with schema.transaction(db):
        store.add_pairs(db, [pair for pair, _ in answers])
        new = 0
        for pair, right in answers:
            if right not in ("a", "b", "tie", "both_bad"):
                raise ValueError(f"gold answer {right!r} of pair {pair.id}: a, b, tie or both_bad")
            new += db.execute("INSERT OR IGNORE INTO gold VALUES (?, ?, ?)", (pair.id, right, time.time())).rowcount
            if (known := store.gold(db)[pair.id]) != right:
                raise ValueError(f"pair {pair.id} has the gold answer {known!r} already, and now {right!r}")
        return new
