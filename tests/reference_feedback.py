"""Selection of pairs and reliability of labelers in plain float64 Python, from the papers; imports nothing of ours."""

from __future__ import annotations

import math

import numpy as np


def chance(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


def nats(p: float) -> float:
    """Entropy of a choice."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def uncertainty(margins: list[float]) -> float:
    """Entropy of the members' mean prediction (Lewis and Gale 1994)."""
    return nats(sum(map(chance, margins)) / len(margins))


def disagreement(margins: list[float]) -> float:
    """Variance of the members' predictions (Christiano et al. 2017)."""
    p = [chance(margin) for margin in margins]
    return sum((q - sum(p) / len(p)) ** 2 for q in p) / len(p)


def bald(margins: list[float]) -> float:
    """Mutual information of choice and member (Houlsby et al. 2011), as the mean divergence of a member from the mean."""
    p = [chance(margin) for margin in margins]
    mean = sum(p) / len(p)
    return sum(q * math.log(q / mean) + (1 - q) * math.log((1 - q) / (1 - mean)) for q in p) / len(p)


def log_posterior(betas, said, gold, deviation: float = 3.0) -> float:
    """Log of the likelihood of verdicts, margins integrated out on a fine grid, and of the prior N(1, 3^2) of each beta.

    `said[i][l]`: 1 for a (of gold pairs: right), -1 for b, 0 not judged.
    """
    m = np.linspace(-9, 9, 6001)
    density = np.exp(-0.5 * m**2) / math.sqrt(2 * math.pi)
    total = -0.5 * sum((beta - 1) ** 2 for beta in betas) / deviation**2
    for words, known in zip(said, gold, strict=True):
        weight = np.where(m > 0, 2.0, np.where(m == 0, 1.0, 0.0)) if known else np.ones_like(m)
        likelihood = np.ones_like(m)
        for beta, word in zip(betas, words, strict=True):
            if word:
                likelihood = likelihood / (1 + np.exp(-word * beta * m))
        total += math.log(np.trapezoid(likelihood * density * weight, m))
    return total
