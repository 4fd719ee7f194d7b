"""What an admin sees: how far the work is, and how well each labeler reads."""

from __future__ import annotations

import sqlite3
import statistics
from typing import Any

from jaxrlhf.feedback import accounts, agreement, assignments, ratings, reliability, store

_TOGETHER = {"raw": agreement.raw, "fleiss": agreement.fleiss, "krippendorff": agreement.krippendorff}


def summary(db: sqlite3.Connection, rules: assignments.Rules) -> dict[str, Any]:
    """Figures of all labelers and of each, as JSON can hold them: None where there is nothing to compute from."""
    standing, known = store.choices(db), store.gold(db)
    by_id = {pair.id: pair for pair in store.pairs(db)}
    counts = agreement.verdict_counts(standing)
    whole = assignments.progress(db, "", rules)
    names = sorted({choice.labeler for choice in standing} | {account.name for account in accounts.every(db)})
    people = []
    for name in names:
        mine = [choice for choice in standing if choice.labeler == name]
        seconds = [choice.seconds for choice in mine if choice.seconds is not None]
        left, longer = agreement.left_share(mine), agreement.longer_share(mine, by_id)
        said = agreement.verdicts(mine, name)
        with_gold = agreement.agreement(said, known) if said.keys() & known.keys() else None
        people.append(
            {
                "name": name,
                "choices": len(mine),
                "skips": sum(choice.choice == "skip" for choice in mine),
                "seconds": statistics.median(seconds) if seconds else None,
                "left": None if left is None else left._asdict(),
                "longer": None if longer is None else longer._asdict(),
                "gold": None if with_gold is None else with_gold._asdict(),
            }
        )
    pairs = [
        {"first": first, "second": second, **found._asdict()}
        for (first, second), found in agreement.between_labelers(standing).items()
    ]
    together = {name: measure(counts) for name, measure in _TOGETHER.items()} if len(counts) else None
    return {
        "labels": whole.labels,
        "wanted": whole.wanted,
        "gold": len(known),
        "labelers": people,
        "together": None if together is None else {"pairs": len(counts), **together},
        "agreement": pairs,
        "reliability": [found._asdict() for found in reliability.reliability(standing, known)],
        "ratings": [rating._asdict() for rating in ratings.ratings(standing, by_id)],
    }
