"""Models of choices, ensembles and best-of-n once more, in float64 NumPy with plain loops, written from the papers.

It imports nothing of ours. Texts and pairs that were not compared are skipped, never read.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def bradley_terry(first: float, second: float) -> float:
    """Bradley and Terry 1952: pi_1 / (pi_1 + pi_2) with pi = exp(score)."""
    return 1 / (1 + math.exp(second - first))


def davidson(first: float, second: float, nu: float) -> tuple[float, float, float]:
    """Davidson 1970, equation 2.2: P(first), P(second), P(tie) are as pi_1, pi_2 and nu sqrt(pi_1 pi_2)."""
    parts = math.exp(first), math.exp(second), nu * math.sqrt(math.exp(first) * math.exp(second))
    return parts[0] / sum(parts), parts[1] / sum(parts), parts[2] / sum(parts)


def rao_kupper(first: float, second: float, theta: float) -> tuple[float, float, float]:
    """Rao and Kupper 1967, section 2: P(first), P(second), P(tie) with the threshold parameter theta."""
    p, q = math.exp(first), math.exp(second)
    tie = p * q * (theta**2 - 1) / ((p + theta * q) * (q + theta * p))
    return p / (p + theta * q), q / (q + theta * p), tie


def choice(first: float, second: float, ties: str, tie_probability: float) -> tuple[float, float, float]:
    """P(first), P(second), P(tie); the parameters are set so that equal scores tie with `tie_probability`."""
    if ties == "davidson":  # nu / (2 + nu) = p
        return davidson(first, second, 2 * tie_probability / (1 - tie_probability))
    if ties == "rao_kupper":  # (theta^2 - 1) / (1 + theta)^2 = p
        return rao_kupper(first, second, (1 + tie_probability) / (1 - tie_probability))
    p = bradley_terry(first, second)
    return p, 1 - p, math.sqrt(p * (1 - p))  # half of -log P each way


def pair_loss(scores, preferred, tied, margin, ties: str, tie_probability: float, smoothing: float = 0.0) -> float:
    """Mean over the weighted choices and ties of all sets of -log P. scores [B, N]; preferred, tied, margin [B, N, N]."""
    total, count = 0.0, 0.0
    for b, i, j in np.ndindex(preferred.shape):
        if preferred[b, i, j] > 0 or tied[b, i, j] > 0:
            first, second = float(scores[b, i]) - float(margin[b, i, j]), float(scores[b, j])
            p, q, tie = choice(first, second, ties, tie_probability)
            if preferred[b, i, j] > 0:
                total -= preferred[b, i, j] * ((1 - smoothing) * math.log(p) + smoothing * math.log(q))
                count += preferred[b, i, j]
            if tied[b, i, j] > 0:
                total -= tied[b, i, j] * math.log(tie)
                count += tied[b, i, j]
    return total / count


def best_loss(scores, best, candidates) -> float:
    """Ziegler et al. 2019, equation 1: mean over the sets with a choice of -log (exp r_best / sum_i exp r_i)."""
    losses = []
    for b, chosen in enumerate(best):
        if chosen >= 0:
            powers = [math.exp(scores[b, i]) for i in range(scores.shape[1]) if candidates[b, i]]
            losses.append(-math.log(math.exp(scores[b, chosen]) / sum(powers)))
    return sum(losses) / len(losses)


def length_loss(coefficient: float, preferred, length) -> float:
    """Negative log-likelihood of the choices under P(i over j) = 1 / (1 + exp(-coefficient (length_i - length_j)))."""
    return sum(
        preferred[i, j] * math.log(1 + math.exp(-coefficient * (float(length[i]) - float(length[j]))))
        for i, j in np.ndindex(preferred.shape)
        if preferred[i, j] > 0
    )


def ensemble(scores: np.ndarray, how: str, coefficient: float) -> list[float]:
    """Coste et al. 2023, section 3.2, for each text: mean, worst case, mean less coefficient times the variance (sum / k)."""
    found = []
    for text in range(scores.shape[1]):
        members = [float(scores[m, text]) for m in range(scores.shape[0])]
        mean = sum(members) / len(members)
        variance = sum((value - mean) ** 2 for value in members) / len(members)
        found.append({"mean": mean, "worst": min(members), "uncertainty": mean - coefficient * variance}[how])
    return found


def best_of_n(scores: np.ndarray, values: np.ndarray, n: int) -> float:
    """The value of the best by score, averaged over every subset of n of the samples of one prompt."""
    subsets = list(itertools.combinations(range(len(scores)), n))
    return sum(float(values[max(subset, key=lambda j: scores[j])]) for subset in subsets) / len(subsets)


def kl_best_of_n(probability: np.ndarray, scores: np.ndarray, n: int) -> float:
    """KL of best-of-n from a categorical policy, exactly: the best is outcome k with P(all <= k)^n - P(all < k)^n."""
    order = np.argsort(scores)
    below = np.cumsum(probability[order])
    best = below**n - np.append(0.0, below[:-1]) ** n
    return float((best * np.log(best / probability[order])).sum())
