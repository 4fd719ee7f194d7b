"""How far labelers agree, with each other and with gold, and whether one favours a side or the longer answer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxrlhf.evaluation import win_rate
from jaxrlhf.feedback import store

VERDICTS = ("a", "b", "tie", "both_bad")


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


def longer_share(choices: Sequence[store.Choice], pairs: Mapping[str, store.Pair]) -> win_rate.Interval | None:
    """Share of decided choices that took the longer response, in characters; equal lengths are left out. None without one.

    People do prefer longer answers somewhat; a labeler far above the others may not be reading.
    """
    longer = []
    for choice in choices:
        lengths = {"a": len(pairs[choice.pair].response_a), "b": len(pairs[choice.pair].response_b)}
        if choice.preferred is not None and lengths["a"] != lengths["b"]:
            longer.append(choice.preferred == max(lengths, key=lambda side: lengths[side]))
    return win_rate.wilson(sum(longer) / len(longer), len(longer)) if longer else None


def verdict_counts(choices: Sequence[store.Choice]) -> Float[np.ndarray, "pairs verdicts"]:
    """How many labelers said each of `VERDICTS` of each pair that two or more of them judged; skips are left out."""
    said: dict[str, list[str]] = {}
    for choice in choices:
        if choice.choice != "skip":
            said.setdefault(choice.pair, []).append(choice.preferred or choice.choice)
    rows = [[words.count(word) for word in VERDICTS] for words in said.values() if len(words) > 1]
    return np.array(rows, np.float64).reshape(-1, len(VERDICTS))


def raw(counts: Float[np.ndarray, "pairs verdicts"]) -> float:
    """Mean over the pairs of the share of two labelers of it who say the same.

    Raises:
        ValueError: no pair judged by two.
    """
    n = _labelers(counts)
    return float(((counts * (counts - 1)).sum(axis=1) / (n * (n - 1))).mean())


def fleiss(counts: Float[np.ndarray, "pairs verdicts"]) -> float:
    """Fleiss' kappa: 1 perfect, 0 as by chance; 1 where all always say one word. Pairs with more labelers weigh no more.

    Source: Fleiss 1971, equations 3 to 7; with unequal numbers of labelers, shares of words over all labels.

    Raises:
        ValueError: no pair judged by two.
    """
    observed = raw(counts)
    chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def krippendorff(counts: Float[np.ndarray, "pairs verdicts"]) -> float:
    """Krippendorff's alpha of words without order: 1 perfect, 0 as by chance; 1 where all always say one word.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: 1 - observed / expected disagreement.

    Raises:
        ValueError: no pair judged by two.
    """
    n, of_word, total = _labelers(counts), counts.sum(axis=0), counts.sum()
    observed = ((n**2 - (counts**2).sum(axis=1)) / (n - 1)).sum()
    expected = (total**2 - (of_word**2).sum()) / (total - 1)
    return 1.0 if expected == 0 else float(1 - observed / expected)


def _labelers(counts: Float[np.ndarray, "pairs verdicts"]) -> Float[np.ndarray, " pairs"]:
    if not len(counts) or (counts.sum(axis=1) < 2).any():
        raise ValueError("agreement needs pairs that two or more labelers judged")
    return counts.sum(axis=1)
