"""How well scores agree with people's ratings, and best-of-n by a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


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


def kl_best_of_n(n: int) -> float:
    """Upper bound, in nats, of the KL of best-of-n from the policy it draws from: log n - (n - 1) / n.

    Source: Stiennon et al. 2020, appendix G.3; Beirami et al. 2024 show that it is a bound.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_weights(scores: Float[np.ndarray, "p m"], n: int) -> Float[np.ndarray, "p m"]:
    """Probability that each of a prompt's m samples is the best by score of n drawn from the m without replacement.

    The weighted mean of any figure of the samples is an unbiased estimate of best-of-n's. Equal scores are broken by order.
    Source: Nakano et al. 2021 (WebGPT), the unbiased estimator of best-of-n.

    Raises:
        ValueError: n is not between 1 and m.
    """
    m = scores.shape[1]
    if not 1 <= n <= m:
        raise ValueError(f"best of {n} needs n between 1 and the {m} samples drawn a prompt")
    # The sample of rank i (0: lowest) wins if it is drawn and the n - 1 others come from the i below it.
    by_rank = np.array([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    return by_rank[ranks]


def best_of_n(
    scores: Float[np.ndarray, "p m"], values: Mapping[str, np.ndarray], sizes: Sequence[int] = (1, 2, 4, 8, 16)
) -> list[dict[str, float | int]]:
    """A row for each n of `sizes`: n, KL bound, and the mean over prompts of each value of best-of-n by `scores`.

    `scores[i, j]` is the proxy's of sample j of prompt i; each of `values` is [prompts, samples] as well: judges' scores,
    `win_rate.outcomes` against a baseline, lengths.
    """
    scores = np.asarray(scores, np.float64)
    rows = []
    for n in sizes:
        weights = best_of_n_weights(scores, n)
        means = {name: float((weights * value).sum(1).mean()) for name, value in {"proxy": scores, **values}.items()}
        rows.append({"n": n, "kl": kl_best_of_n(n), **means})
    return rows
