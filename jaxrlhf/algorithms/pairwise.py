"""Models of a choice between two texts by the difference d of their scores, ties included, and what length alone explains."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

Ties = Literal["half", "davidson", "rao_kupper"]


def bradley_terry(difference: Float[Array, "*s"], smoothing: float = 0.0) -> Float[Array, "*s"]:
    """-log P of the choice made, where `difference` = score of the preferred - score of the other (- margin).

    `smoothing` is the probability that the person meant the opposite.
    Source: Bradley and Terry 1952; Christiano et al. 2017, equation 1; margin from Llama 2 (Touvron et al. 2023), equation
    2; smoothing as in cDPO (E. Mitchell 2023, "A note on DPO with noisy preferences").
    """
    # log_sigmoid stays finite where sigmoid underflows.
    kept = -jax.nn.log_sigmoid(difference)
    return kept if smoothing == 0 else (1.0 - smoothing) * kept - smoothing * jax.nn.log_sigmoid(-difference)


def davidson(difference: Float[Array, "*s"], tie_probability: float) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """-log P(first chosen) and -log P(tie), where P(first) : P(second) : P(tie) = exp(d/2) : exp(-d/2) : nu.

    `tie_probability` is that of two equal scores: nu = 2p / (1 - p).
    Source: Davidson 1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments".
    """
    log_nu = math.log(2 * tie_probability / (1 - tie_probability))
    half = difference / 2
    total = jnp.logaddexp(jnp.logaddexp(half, -half), log_nu)
    return total - half, total - log_nu


def rao_kupper(difference: Float[Array, "*s"], tie_probability: float) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """-log P(first chosen) and -log P(tie), where P(first) = sigmoid(d - log theta): a lead below the threshold is not seen.

    `tie_probability` is that of two equal scores: theta = (1 + p) / (1 - p), and P(tie) = (theta^2 - 1) P(first) P(second).
    Source: Rao and Kupper 1967, "Ties in paired-comparison experiments: a generalization of the Bradley-Terry model".
    """
    threshold = math.log((1 + tie_probability) / (1 - tie_probability))
    first, second = (-jax.nn.log_sigmoid(lead - threshold) for lead in (difference, -difference))
    return first, first + second - math.log(math.expm1(2 * threshold))


def choice(
    difference: Float[Array, "*s"], smoothing: float, ties: Ties, tie_probability: float
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """-log P of a choice of the first (or, with probability `smoothing`, of the second meant), and -log P of a tie.

    `half`: a tie is half a choice of either under Bradley-Terry, which knows none.
    """
    if ties == "half":
        return bradley_terry(difference, smoothing), bradley_terry(difference, 0.5)
    model = davidson if ties == "davidson" else rao_kupper
    chosen, tied = model(difference, tie_probability)
    if smoothing:
        chosen = (1.0 - smoothing) * chosen + smoothing * model(-difference, tie_probability)[0]
    return chosen, tied


def fit_length(preferred: Float[np.ndarray, "*s n n"], length: Integer[np.ndarray, "*s n"]) -> float:
    """Logit that one token more is worth to a choice: logistic regression of the choices on the difference of lengths.

    `preferred[i, j]` is the weight with which i was chosen over j. No intercept: turning a pair round changes nothing.
    Source: Clark et al. 2019, "Don't take the easy way out", section 3.2 (the expert that knows the bias only, fitted first).

    Raises:
        ValueError: no choice between texts of different length, or the longer (or the shorter) is chosen every time.
    """
    lead = np.asarray(length, np.float64)[..., :, None] - np.asarray(length, np.float64)[..., None, :]
    used = (preferred > 0) & (lead != 0)
    weight, lead = preferred[used].astype(np.float64), lead[used]
    if not len(lead):
        raise ValueError("no choice between texts of different length: set no length coefficient")
    if (lead > 0).all() or (lead < 0).all():
        raise ValueError(
            f"length decides all {len(lead)} choices between texts of different length: beside it there is nothing to learn"
        )
    scale = np.sqrt(np.average(lead**2, weights=weight))
    low, high = -50.0, 50.0  # the slope of the loss rises in the coefficient, so halving finds its root
    for _ in range(60):
        middle = (low + high) / 2
        slope = -(weight * lead / (1 + np.exp(np.clip(middle * lead / scale, -500, 500)))).sum()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return (low + high) / 2 / float(scale)
