"""How well scores agree with people's ratings: accuracy, by margin too, calibration, length, and drift on fresh samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, Num


class PairAccuracy(NamedTuple):
    """Share of pairs ordered as people order them, and how many pairs."""

    accuracy: float
    pairs: int


def _gaps(values: np.ndarray) -> np.ndarray:
    return values[:, None] - values[None, :]


def pair_accuracy(
    scores: Float[np.ndarray, " n"], ratings: Float[np.ndarray, " n"], domains: Sequence[str], min_gap: float = 0.5
) -> dict[str, PairAccuracy]:
    """Accuracy per domain over ALL pairs of one domain whose mean ratings differ by `min_gap` or more; equal scores count half.

    Raises:
        ValueError: not one score and rating a text, or a score that is not a number.
    """
    scores, ratings, names = np.asarray(scores, np.float64), np.asarray(ratings, np.float64), np.asarray(domains)
    if not len(scores) == len(ratings) == len(names):
        raise ValueError(f"{len(scores)} scores, {len(ratings)} ratings and {len(names)} domains: need one of each a text")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    result = {}
    for domain in sorted(set(names.tolist())):
        inside = names == domain
        better = _gaps(ratings[inside]) >= min_gap
        gap = _gaps(scores[inside])[better]
        result[domain] = PairAccuracy(float(((gap > 0) + 0.5 * (gap == 0)).mean()) if gap.size else float("nan"), int(gap.size))
    return result


def calibration(
    scores: Float[np.ndarray, " n"], ratings: Float[np.ndarray, " n"], domains: Sequence[str], bins: int = 10
) -> tuple[float, list[dict[str, float | int]]]:
    """Expected calibration error of sigmoid(score gap) as the probability that people rate one text of a pair higher.

    Over all same-domain pairs of unequal mean rating, each oriented so that the model favours the first: confidence is
    then in [0.5, 1] and the table holds one row a filled bin (confidence, accuracy, pairs).
    Source: Guo et al. 2017, "On calibration of modern neural networks".
    """
    names, confidence, right = np.asarray(domains), [], []
    for domain in sorted(set(names.tolist())):
        inside = names == domain
        first, second = np.triu_indices(int(inside.sum()), 1)
        score, rating = np.asarray(scores, np.float64)[inside], np.asarray(ratings, np.float64)[inside]
        rated, gap = rating[first] - rating[second], score[first] - score[second]
        keep = rated != 0
        rated, gap = rated[keep], gap[keep]
        confidence.append(1 / (1 + np.exp(-np.abs(gap))))
        right.append(np.where(gap == 0, 0.5, (gap > 0) == (rated > 0)))
    confidence, right = np.concatenate(confidence), np.concatenate(right)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        inside = index == b
        if inside.any():
            row = {
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(right[inside].mean()),
                "pairs": int(inside.sum()),
            }
            table.append(row)
            error += row["pairs"] * abs(row["accuracy"] - row["confidence"])
    return error / max(len(confidence), 1), table


def accuracy_by_margin(
    scores: Float[np.ndarray, " n"],
    ratings: Float[np.ndarray, " n"],
    domains: Sequence[str],
    edges: Sequence[float] = (0.0, 0.5, 1.0, 2.0, 3.0),
) -> list[dict[str, float | int]]:
    """A row {margin, accuracy, pairs} for each range of rating gaps that holds pairs: (edges[k], edges[k + 1]], the last open.

    `margin` is the range's lower end. Over the same-domain pairs of unequal mean rating; equal scores count half.
    """
    names = np.asarray(domains)
    rated, scored = [], []
    for domain in sorted(set(names.tolist())):
        inside = names == domain
        gap = _gaps(np.asarray(ratings, np.float64)[inside])
        better = gap > 0
        rated.append(gap[better])
        scored.append(_gaps(np.asarray(scores, np.float64)[inside])[better])
    rated, scored = np.concatenate(rated), np.concatenate(scored)
    right = (scored > 0) + 0.5 * (scored == 0)
    rows = []
    for low, high in zip(edges, [*edges[1:], np.inf], strict=True):
        inside = (rated > low) & (rated <= high)
        if inside.any():
            rows.append({"margin": float(low), "accuracy": float(right[inside].mean()), "pairs": int(inside.sum())})
    return rows


def correlation(x: Num[np.ndarray, " n"], y: Num[np.ndarray, " n"]) -> float:
    """Pearson's correlation; NaN where one of the two does not vary."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def agreement(scores: Float[np.ndarray, "p m"], judged: Float[np.ndarray, "p m"]) -> float:
    """Share of the pairs of one row's samples that the judge tells apart and the scores order alike; equal scores count half.

    NaN where the judge tells no two apart.
    """
    better = judged[:, :, None] > judged[:, None, :]
    gap = (scores[:, :, None] - scores[:, None, :])[better]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean()) if gap.size else float("nan")


def on_samples(
    scores: Float[np.ndarray, " n"], length: Integer[np.ndarray, " n"], judged: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What a reward model says of one policy's samples; held beside the reference policy's it shows the drift.

    `mean` and `std` of the normalised scores (0 and 1 on the reference policy's samples), `length` the scores' correlation
    with the response length, `accuracy` the `agreement` with each judge over all pairs of samples.
    """
    scores = np.asarray(scores, np.float64)
    agreed = {name: agreement(scores[None], np.asarray(values, np.float64)[None]) for name, values in judged.items()}
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "length": correlation(scores, length),
        "accuracy": agreed,
    }
