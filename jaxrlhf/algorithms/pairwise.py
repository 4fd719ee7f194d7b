"""The Bradley-Terry model of a choice between two: P(first preferred) = sigmoid(difference of their scores)."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def bradley_terry(difference: Float[Array, "*s"], smoothing: float = 0.0) -> Float[Array, "*s"]:
    """-log P of the choice made, where `difference` = score of the preferred - score of the other (- margin).

    `smoothing` is the probability that the person meant the opposite.
    Source: Bradley and Terry 1952; Christiano et al. 2017, equation 1; margin from Llama 2 (Touvron et al. 2023), equation
    2; smoothing as in cDPO (E. Mitchell 2023, "A note on DPO with noisy preferences").
    """
    # log_sigmoid stays finite where sigmoid underflows.
    kept = -jax.nn.log_sigmoid(difference)
    return kept if smoothing == 0 else (1.0 - smoothing) * kept - smoothing * jax.nn.log_sigmoid(-difference)
