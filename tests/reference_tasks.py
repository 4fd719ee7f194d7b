"""Rewards and sums once more, in plain loops and float64, importing nothing of ours."""

from __future__ import annotations

import math


def written_sum(left: str, right: str, carry: bool) -> str:
    """Two numbers of equally many digits added as at school, column by column from the right; a carry may be forgotten."""
    written, kept = "", 0
    for a, b in zip(reversed(left), reversed(right), strict=True):
        column = int(a) + int(b) + (kept if carry else 0)
        written, kept = str(column % 10) + written, column // 10
    if carry and kept:
        written = str(kept) + written
    return written.lstrip("0") or "0"


def repeated_share(words: list[str], n: int) -> float:
    """n-grams that stand earlier in the text too, over all n-grams: one minus the distinct ones over all."""
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0.0
    return sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams)


def weighted_sum(parts: dict[str, list[float]], weights: dict[str, float]) -> tuple[list[float], list[float]]:
    """(score, weight) of rows whose parts may hold NaN or infinities: those rows have neither."""
    score, weight = [], []
    for row in zip(*parts.values(), strict=True):
        finite = all(math.isfinite(value) for value in row)
        weight.append(float(finite))
        score.append(sum(weights[name] * value for name, value in zip(parts, row, strict=True)) if finite else 0.0)
    return score, weight
