"""How surely each labeler follows the taste that all share: a temperature a labeler, fitted to their choices alone.

Of a pair with the common margin m, labeler l chooses response a with the probability sigmoid(beta_l m); 1 / beta_l is the
temperature. beta 0 is a coin, below 0 a reversed taste. Nobody knows m: it is a standard normal, the same for all who judged
the pair, and is integrated out; the unit of beta is thus one deviation of the margins. Where the answer is known (gold), m is
above 0 for the right one. Pairs that one person judged say nothing of anybody, unless they are gold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxrlhf.feedback import store

_PLACE, _WEIGHT = np.polynomial.legendre.leggauss(20)
MARGIN = 3.5 * (_PLACE + 1)  # margins above 0 that stand for all of them: up to 7 deviations
DENSITY = _WEIGHT * np.exp(-0.5 * MARGIN**2)
DENSITY = DENSITY / DENSITY.sum()
PRIOR_MEAN, PRIOR_DEVIATION = 1.0, 1.0  # of beta: keeps those who always agree finite, and says that most read


class Reliability(NamedTuple):
    """A labeler's beta with its 95 % interval, how often they choose what the common taste prefers, and pairs that say so."""

    labeler: str
    beta: float
    low: float
    high: float
    agrees: float  # share of the pairs
    pairs: int


class Table(NamedTuple):
    """Choices as numbers: one row for each set of pairs that the same people judged in the same way."""

    labelers: list[str]
    said: Int[np.ndarray, "n labelers"]  # 1: response a (of gold pairs: the right one), -1: the other, 0: not judged
    known: Int[np.ndarray, " n"]  # 1: gold, else 0
    count: Float[np.ndarray, " n"]  # pairs of this kind


def log_sigmoid(x: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    """log(1 / (1 + exp(-x))), exact at both ends."""
    return -np.logaddexp(0.0, -x)


def fit(
    said: Int[np.ndarray, "n labelers"],
    known: Int[np.ndarray, " n"],
    count: Float[np.ndarray, " n"],
    start: Float[np.ndarray, " labelers"] | None = None,
    tolerance: float = 1e-8,
    most: int = 2000,
) -> Float[np.ndarray, " labelers"]:
    """The likeliest beta of each labeler under the prior; rows are those of a `Table`.

    Source: the two-parameter logistic model without difficulties, labelers in the place of questions, fitted by marginal
    likelihood (Bock and Aitkin 1981), each step one of Newton's; a reliability of each labeler beside a common taste as in Chen
    et al. 2013, "Pairwise ranking aggregation in a crowdsourced setting".
    """
    node = np.concatenate([-MARGIN, MARGIN])
    below = np.where(known[:, None] > 0, 0.0, DENSITY)  # the right answer of a gold pair has a margin above 0
    prior = np.concatenate([below, np.broadcast_to(DENSITY, below.shape)], axis=1)  # [n, nodes]
    yes, no = (said > 0).astype(np.float64), (said < 0).astype(np.float64)
    beta = np.ones(said.shape[1]) if start is None else start
    for _ in range(most):
        lead = beta[:, None] * node  # [labelers, nodes]
        likelihood = (yes + no) @ log_sigmoid(lead) - no @ lead  # log sigmoid(-x) = log sigmoid(x) - x
        likelihood = np.where(prior > 0, likelihood, -np.inf)
        posterior = prior * np.exp(likelihood - likelihood.max(axis=1, keepdims=True))
        posterior *= (count / posterior.sum(axis=1))[:, None]
        chose, other = yes.T @ posterior, no.T @ posterior
        chance = np.exp(log_sigmoid(lead))
        slope = ((chose * (1 - chance) - other * chance) * node).sum(axis=1) - (beta - PRIOR_MEAN) / PRIOR_DEVIATION**2
        bend = ((chose + other) * chance * (1 - chance) * node**2).sum(axis=1) + 1 / PRIOR_DEVIATION**2
        step = np.clip(slope / bend, -1.0, 1.0)
        beta = beta + step
        if np.abs(step).max(initial=0.0) < tolerance:
            break
    return beta


def tabulate(choices: Sequence[store.Choice], gold: Mapping[str, str]) -> Table:
    """Choices of a or b; ties, two bad ones and skips say nothing here. Pairs that cannot tell are left out: one judge, no
    gold.
    """
    of_pair: dict[str, dict[str, int]] = {}
    for choice in choices:
        right = gold.get(choice.pair)
        if choice.preferred is not None and right in (None, "a", "b"):
            of_pair.setdefault(choice.pair, {})[choice.labeler] = 1 if choice.preferred == (right or "a") else -1
    telling = {pair: said for pair, said in of_pair.items() if pair in gold or len(said) > 1}
    labelers = sorted({labeler for said in telling.values() for labeler in said})
    rows = []
    for pair, said in telling.items():
        row = [said.get(labeler, 0) for labeler in labelers]
        if pair not in gold and next(word for word in row if word) < 0:
            row = [-word for word in row]  # the margins are symmetric: which response is a says nothing
        rows.append([int(pair in gold), *row])
    kinds, count = np.unique(np.array(rows, np.int64).reshape(len(rows), 1 + len(labelers)), axis=0, return_counts=True)
    return Table(labelers, kinds[:, 1:], kinds[:, 0], count.astype(np.float64))


def agreeing(beta: Float[np.ndarray, " labelers"]) -> Float[np.ndarray, " labelers"]:
    """Share of the pairs on which a labeler of this beta chooses what the common taste prefers: mean of sigmoid(beta |m|)."""
    return (np.exp(log_sigmoid(beta[..., None] * MARGIN)) * DENSITY).sum(axis=-1)


def reliability(choices: Sequence[store.Choice], gold: Mapping[str, str], draws: int = 100, seed: int = 0) -> list[Reliability]:
    """Every labeler of whom the choices tell, the most reliable first; empty where no pair tells.

    Intervals: percentiles over `draws` bootstrap samples of the pairs. Two labelers who judged the same pairs and no gold come
    out alike, as nothing tells them apart: it takes three, or gold.
    """
    table = tabulate(choices, gold)
    if not table.labelers:
        return []
    whole = fit(table.said, table.known, table.count)
    pairs = int(table.count.sum())
    sampled = np.random.default_rng(seed).multinomial(pairs, table.count / pairs, draws).astype(np.float64)
    drawn = np.stack([fit(table.said, table.known, count, whole, tolerance=1e-3) for count in sampled])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    judged = (np.abs(table.said) * table.count[:, None]).sum(axis=0).astype(int)
    rows = zip(table.labelers, *(x.tolist() for x in (whole, low, high, agreeing(whole), judged)), strict=True)
    return sorted((Reliability(*row) for row in rows), key=lambda each: -each.beta)
