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
LOG_DENSITY = np.log(np.concatenate([DENSITY[::-1], DENSITY]) / 2)
NODE = np.concatenate([-MARGIN[::-1], MARGIN])
PRIOR_MEAN, PRIOR_DEVIATION = 1.0, 3.0  # of beta: keeps those who always agree finite, and says that most read


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


def fit(table: Table, start: Float[np.ndarray, " labelers"] | None = None, most: int = 500) -> Float[np.ndarray, " labelers"]:
    """The likeliest beta of each labeler under the prior, near `start`.

    Source: the two-parameter logistic model without difficulties, labelers in the place of questions, fitted by marginal
    likelihood (Bock and Aitkin 1981); a reliability of each labeler beside a common taste as in Chen et al. 2013, "Pairwise
    ranking aggregation in a crowdsourced setting". By Newton's method, and by a step of expectation and maximisation, which
    always goes up, where that would not.
    """
    beta = np.ones(len(table.labelers)) if start is None else start
    reached = log_posterior(beta, table)
    for _ in range(most):
        scores, whole, curvature = _slopes(beta, table)
        slope = table.count @ scores - (beta - PRIOR_MEAN) / PRIOR_DEVIATION**2
        if np.abs(slope).max(initial=0.0) < 1e-7 * max(table.count.sum(), 1.0):
            break
        newton = beta + np.clip(np.linalg.solve(curvature, slope), -1.0, 1.0)
        if (after := log_posterior(newton, table)) <= reached:
            newton = beta + np.clip(slope / whole, -1.0, 1.0)
            after = log_posterior(newton, table)
        beta, reached = newton, after
    return beta


def _slopes(
    beta: Float[np.ndarray, " labelers"], table: Table
) -> tuple[Float[np.ndarray, "n labelers"], Float[np.ndarray, " labelers"], Float[np.ndarray, "labelers labelers"]]:
    """Slope of the log-likelihood of a pair of each row; the curvature that there would be if the margins were known, and that
    which there is, the prior's in both.

    Source: Louis 1982, "Finding the observed information matrix when using the EM algorithm".
    """
    joint = _log_joint(beta, table)
    posterior = np.exp(joint - joint.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)
    chance = np.exp(log_sigmoid(beta[:, None] * NODE))  # [labelers, nodes]
    judged, scores = np.abs(table.said).astype(np.float64), np.zeros(table.said.shape)
    spread = np.zeros((len(beta), len(beta)))
    for place, p, weight in zip(NODE, chance.T, posterior.T, strict=True):
        own = place * judged * (np.where(table.said > 0, 1.0, 0.0) - p)  # of each verdict, were this the margin
        scores += weight[:, None] * own
        spread += (own * (table.count * weight)[:, None]).T @ own
    spread -= (scores * table.count[:, None]).T @ scores
    bend = (judged * table.count[:, None]).T @ posterior * chance * (1 - chance) * NODE**2
    whole = bend.sum(axis=1) + 1 / PRIOR_DEVIATION**2
    return scores, whole, np.diag(whole) - spread


def _log_joint(beta: Float[np.ndarray, " labelers"], table: Table) -> Float[np.ndarray, "n nodes"]:
    """Log of the density of each margin and of the verdicts under it; -inf where the answer is known to be the other one."""
    lead, said = beta[:, None] * NODE, table.said
    # log sigmoid(-x) = log sigmoid(x) - x
    likelihood = np.abs(said).astype(np.float64) @ log_sigmoid(lead) - (said < 0).astype(np.float64) @ lead
    return np.where((table.known[:, None] > 0) & (NODE < 0), -np.inf, likelihood + LOG_DENSITY)


def log_posterior(beta: Float[np.ndarray, " labelers"], table: Table) -> float:
    """Log of the likelihood of a table and of the prior, up to constants of the table."""
    joint = _log_joint(beta, table)
    largest = joint.max(axis=1)
    likelihood = (table.count * (largest + np.log(np.exp(joint - largest[:, None]).sum(axis=1)))).sum()
    return float(likelihood - 0.5 * ((beta - PRIOR_MEAN) ** 2).sum() / PRIOR_DEVIATION**2)


def likeliest(table: Table) -> Float[np.ndarray, " labelers"]:
    """`fit` from several starts, the one that ends highest: ones, the reverse of where these lead, and what gold alone says.

    Verdicts say nothing of whose taste is the reversed one: the likelihood has a top on either side, of which the prior (that
    most people read) or gold makes one the higher.
    """
    found, gold = [fit(table)], table.known > 0
    starts = [-found[0]]
    if gold.any():
        starts.append(fit(Table(table.labelers, table.said[gold], table.known[gold], table.count[gold])))
    found += [fit(table, start) for start in starts]
    return max(found, key=lambda beta: log_posterior(beta, table))


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


def reliability(choices: Sequence[store.Choice], gold: Mapping[str, str], draws: int = 500, seed: int = 0) -> list[Reliability]:
    """Every labeler of whom the choices tell, the most reliable first; empty where no pair tells.

    Intervals: percentiles over `draws` bootstrap samples of the pairs, each fitted by one step of Newton's from the whole
    (Schucany and Wang 1991, "One-step bootstrapping for smooth iterative procedures"). Two labelers who judged the same pairs
    and no gold come out alike, as nothing tells them apart: it takes three, or gold.
    """
    table = tabulate(choices, gold)
    if not table.labelers:
        return []
    whole = likeliest(table)
    pairs = int(table.count.sum())
    sampled = np.random.default_rng(seed).multinomial(pairs, table.count / pairs, draws).astype(np.float64)
    scores, _, curvature = _slopes(whole, table)
    drawn = whole + np.linalg.solve(curvature, ((sampled - table.count) @ scores).T).T
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    judged = (np.abs(table.said) * table.count[:, None]).sum(axis=0).astype(int)
    rows = zip(table.labelers, *(x.tolist() for x in (whole, low, high, agreeing(whole), judged)), strict=True)
    return sorted((Reliability(*row) for row in rows), key=lambda each: -each.beta)
