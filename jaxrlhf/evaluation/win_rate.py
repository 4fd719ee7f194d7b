"""Win rate on the same prompts with its interval, and measures of diversity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Z95 = 1.959963984540054  # the normal's 97.5 % quantile


class Interval(NamedTuple):
    """A share with its 95 % interval."""

    rate: float
    low: float
    high: float


def wilson(rate: float, n: int) -> Interval:
    """The Wilson 95 % interval of a share of `n` independent trials.

    Unlike the normal interval it stays inside [0, 1] and has a width at 0 and 1. With ties counted as halves it is too
    wide rather than too narrow: outcomes in {0, 1/2, 1} of mean p vary by at most p (1 - p).
    Source: Wilson 1927; Brown, Cai and DasGupta 2001.

    Raises:
        ValueError: no trial.
    """
    if n < 1:
        raise ValueError("a share of 0 trials has no interval: give at least one")
    z2 = Z95 * Z95 / n
    centre = (rate + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n)) / (1 + z2)
    return Interval(rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half)))  # rounding aside, no change


def outcomes(candidate: Float[np.ndarray, "*#n"], baseline: Float[np.ndarray, "*#n"]) -> Float[np.ndarray, ...]:
    """1 where the candidate's judgement is higher, 0 where it is lower, 1/2 at a tie; shapes broadcast."""
    return (candidate > baseline) + 0.5 * (candidate == baseline)


def win_rate(candidate: Float[np.ndarray, " n"], baseline: Float[np.ndarray, " m"]) -> Interval:
    """Share of prompts on which the candidate's response is judged better; ties count half.

    `candidate[i]` and `baseline[i]` judge responses to the same prompt i. Interval: Wilson over the prompts.

    Raises:
        ValueError: different numbers of prompts, none, or a judgement that is not a number.
    """
    candidate, baseline = np.asarray(candidate, np.float64), np.asarray(baseline, np.float64)
    if candidate.shape != baseline.shape or candidate.ndim != 1:
        raise ValueError(
            f"judgements of shapes {candidate.shape} and {baseline.shape}: win_rate compares one a prompt, prompt by prompt"
        )
    if np.isnan(candidate).any() or np.isnan(baseline).any():
        raise ValueError("a judgement is NaN: it can neither win nor lose")
    return wilson(float(outcomes(candidate, baseline).mean()) if len(candidate) else 0.0, len(candidate))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of the corpus, of words divided at spaces; no n-gram crosses two texts.

    It falls as a corpus grows: compare only corpora of equally many texts.
    Source: Li et al. 2016, "A diversity-promoting objective function".

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: n-grams have at least 1 word")
    seen, total = set(), 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def distinct_texts(texts: Sequence[str]) -> float:
    """Share of different texts among all."""
    return len(set(texts)) / len(texts) if len(texts) else 0.0
