"""Which pairs to ask people about next, by what reward models say of them; arrays in, arrays out.

A margin is what a model scores response a above response b, in the unit of its choices: it holds that a is chosen with the
probability sigmoid(margin). Several models (members of an ensemble) that disagree say where labels are missing; one model that
is undecided says no more than that a choice is close, which a pair may be for people too, whatever is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from jaxrlhf.evaluation import win_rate

Way = Literal["random", "uncertainty", "disagreement", "bald"]
SEVERAL = ("disagreement", "bald")  # of one model alone they are 0 everywhere


def chances(margins: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "m n"]:
    """sigmoid(margin): the probability, by each of m models, that response a is chosen in each of n pairs."""
    return 0.5 * (1 + np.tanh(0.5 * margins))  # no overflow at either end


def entropy(chance: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    """Nats of a choice of this probability; 0 at 0 and at 1."""
    inside = np.clip(chance, 1e-300, 1.0), np.clip(1 - chance, 1e-300, 1.0)
    return -(chance * np.log(inside[0]) + (1 - chance) * np.log(inside[1]))


def uncertainty(margins: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
    """Nats of the predicted choice, H[mean over the models of p]; of one model largest where |margin| is smallest.

    Source: Lewis and Gale 1994, "A sequential algorithm for training text classifiers"; as entropy: Settles 2009, section 3.1.
    """
    return entropy(chances(margins).mean(axis=0))


def disagreement(margins: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
    """Variance over the models (sum / m) of the probability that a is chosen.

    Source: Christiano et al. 2017, "Deep reinforcement learning from human preferences", section 2.2.4.
    """
    return chances(margins).var(axis=0)


def bald(margins: Float[np.ndarray, "m n"]) -> Float[np.ndarray, " n"]:
    """Nats that a choice is expected to tell of which model is right: H[mean p] - mean H[p].

    Source: Houlsby et al. 2011, "Bayesian active learning for classification and preference learning", equation 2, the members
    in the place of the posterior.
    """
    p = chances(margins)
    return np.maximum(entropy(p.mean(axis=0)) - entropy(p).mean(axis=0), 0.0)  # rounding may take it below


def worth(margins: Float[np.ndarray, "m n"], by: Way, seed: int = 0) -> Float[np.ndarray, " n"]:
    """How much each pair is worth asking about; with `random`, drawn by the seed.

    Raises:
        ValueError: no such way, one model where several are needed, or a margin that is not a number.
    """
    if by not in get_args(Way):
        raise ValueError(f"'{by}' is no way to select pairs: one of {', '.join(get_args(Way))}")
    if by == "random":
        return np.random.default_rng(seed).random(margins.shape[1])
    if by in SEVERAL and len(margins) < 2:
        raise ValueError(f"'{by}' of {len(margins)} model: one cannot disagree with itself; take an ensemble of 2 or more")
    if not np.isfinite(margins).all():
        raise ValueError(f"{int((~np.isfinite(margins)).sum())} of {margins.size} margins are no finite numbers")
    return {"uncertainty": uncertainty, "disagreement": disagreement, "bald": bald}[by](margins)


def order(
    value: Float[np.ndarray, " n"], prompts: Sequence[str], asked: Mapping[str, int] | None = None
) -> Int[np.ndarray, " n"]:
    """Numbers of the pairs, the one to ask about first in front: all prompts once before any twice, within that by value.

    `asked`: how often each prompt was asked about before. Equal values stay in the order given. Without the first rule a batch
    is of one prompt's near copies, whose values are all high for one reason, which one label takes away.
    """
    times = dict(asked or {})
    turn = np.zeros(len(value), np.int64)
    for i in map(int, np.argsort(-value, kind="stable")):
        turn[i] = times[prompts[i]] = times.get(prompts[i], 0) + 1
    return np.lexsort((-value, turn))


def labels_needed(labels: Int[np.ndarray, " k"], accuracy: Float[np.ndarray, " k"], target: float) -> float:
    """Labels at which a curve first reaches `target`, on straight lines between its points; infinite where it never does."""
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(labels[0])
    share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(labels[i - 1] + share * (labels[i] - labels[i - 1]))


def share_needed(
    labels: Int[np.ndarray, " k"],
    found: Float[np.ndarray, "s k"],
    random: Float[np.ndarray, "s k"],
    at: int = -1,
    draws: int = 1000,
    seed: int = 0,
) -> win_rate.Interval:
    """The labels with which the mean curve of `found` reaches the mean accuracy of `random` at its point `at`, as a share of
    the labels that stand there; infinite where it never does.

    Row s of both is one seed: the same first labels and the same pool. Interval: percentiles over `draws` bootstrap samples of
    the seeds, of both curves together.
    """

    def share(rows: Int[np.ndarray, " s"]) -> float:
        return labels_needed(labels, found[rows].mean(axis=0), float(random[rows].mean(axis=0)[at])) / float(labels[at])

    rng, seeds = np.random.default_rng(seed), len(found)
    drawn = np.array([share(rng.integers(0, seeds, seeds)) for _ in range(draws)])
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")  # between a number and infinity is no number
    return win_rate.Interval(share(np.arange(seeds)), float(low), float(high))
