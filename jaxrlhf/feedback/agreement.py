"""How far two labelers agree, and whether one favours a side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxrlhf.evaluation import win_rate
from jaxrlhf.feedback import store


class Agreement(NamedTuple):
    """Raw agreement with its 95 % interval, Cohen's kappa (1 perfect, 0 as by chance), and pairs judged by both."""

    raw: float
    low: float
    high: float
    kappa: float
    pairs: int


def verdicts(choices: Sequence[store.Choice], labeler: str) -> dict[str, str]:
    """What a labeler said of each pair, freed of the order shown: a, b, tie or both_bad. Skips are left out."""
    return {
        choice.pair: choice.preferred or choice.choice
        for choice in choices
        if choice.labeler == labeler and choice.choice != "skip"
    }


def agreement(first: Mapping[str, str], second: Mapping[str, str]) -> Agreement:
    """Agreement of two labelers (or a labeler and gold) over the pairs that both judged.

    Kappa is 1 where both always say the same single word, when chance alone would agree as well.
    Source: Cohen 1960.

    Raises:
        ValueError: no pair judged by both.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("the two labelers have no pair in common: agreement needs at least one")
    n = len(common)
    raw = sum(first[pair] == second[pair] for pair in common) / n
    words = {first[pair] for pair in common} | {second[pair] for pair in common}
    chance = sum(
        sum(first[pair] == word for pair in common) * sum(second[pair] == word for pair in common) for word in words
    ) / (n * n)
    kappa = 1.0 if chance == 1 else (raw - chance) / (1 - chance)
    return Agreement(*win_rate.wilson(raw, n), kappa, n)


def between_labelers(choices: Sequence[store.Choice]) -> dict[tuple[str, str], Agreement]:
    """Agreement of every two labelers who judged a pair in common."""
    said = {labeler: verdicts(choices, labeler) for labeler in sorted({choice.labeler for choice in choices})}
    return {
        (first, second): agreement(said[first], said[second])
        for first, second in itertools.combinations(said, 2)
        if said[first].keys() & said[second].keys()
    }


def left_share(choices: Sequence[store.Choice]) -> win_rate.Interval | None:
    """Share of decided choices that took the left response: 1/2 inside the interval: no bias seen. None without one."""
    decided = [choice.choice for choice in choices if choice.choice in ("left", "right")]
    return win_rate.wilson(decided.count("left") / len(decided), len(decided)) if decided else None
