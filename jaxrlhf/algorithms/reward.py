"""Learning a score from choices: Bradley-Terry over every pair of a set, and a weak pull of the scores towards zero.

A set holds N texts, scored once each; `preferred[i, j]` says with what weight text i was chosen over text j. So 64 rated
texts give some thousand pairs for the price of 64 forward passes, and a pair of responses is the case N = 2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import pairwise
from jaxrlhf.core import masking
from jaxrlhf.core.types import Outputs, Preferences, Term


@dataclasses.dataclass(frozen=True)
class Config:
    centre_coef: float = 1e-3  # times the mean square of the scores; pairs leave their common offset free
    smoothing: float = 0.0  # probability that a choice was meant the other way

    def __post_init__(self):
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing={self.smoothing} must be in [0, 0.5); at 0.5 a choice says nothing")
        if self.centre_coef < 0:
            raise ValueError(f"centre_coef={self.centre_coef} must be >= 0; 0 turns centring off")


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, N, T] int32
    prompt_len: jax.Array  # [B, N] int32
    response_len: jax.Array  # [B, N] int32
    preferred: jax.Array  # [B, N, N] float32, weight with which i is preferred to j; 0: no choice was made
    margin: jax.Array | None = None  # [B, N, N] float32, by how much i's score should lead j's


def from_preferences(preferences: Preferences) -> Batch:
    """Pairs that a person chose from. A tie counts half each way; a label between 0 and 1 counts both ways.

    `margin` is by how much response 0 should lead, so its sign turns when the pair is read from response 1.

    Raises:
        ValueError: sets of more or fewer than two responses.
    """
    if preferences.tokens.shape[1] != 2:
        raise ValueError(
            f"from_preferences: sets of {preferences.tokens.shape[1]} responses, but a label compares 2; "
            "for larger sets fill Batch.preferred"
        )
    label = jnp.where(preferences.tie, 0.5, preferences.label)
    forward, backward = preferences.weight * label, preferences.weight * (1.0 - label)
    zero = jnp.zeros_like(forward)
    margin = jnp.stack([zero, preferences.margin, -preferences.margin, zero], axis=-1).reshape(-1, 2, 2)
    preferred = jnp.stack([zero, forward, backward, zero], axis=-1).reshape(-1, 2, 2)
    return Batch(preferences.tokens, preferences.prompt_len, preferences.response_len, preferred, margin)


def _differences(scores: Float[Array, "b n"], pair: Bool[Array, "b n n"]) -> Float[Array, "b n n"]:
    return jnp.where(pair, scores[:, :, None] - scores[:, None, :], 0.0)


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Mean over weighted pairs of -log P(choice), and `centre_coef` times the mean square score of the texts compared.

    Reads `outputs.scores` [B, N]. A text in no pair does not count. Accuracy: an equal score is wrong.
    Source: algorithms/pairwise.py; centring from Eisenstein et al. 2023, section 5 (there on the sum of a pair's scores).

    Raises:
        ValueError: the outputs hold no scores.
    """
    scores = outputs.scores
    if scores is None:
        raise ValueError("reward.loss needs Outputs.scores: ask the objective for them")
    pair = batch.preferred > 0
    compared = pair.any(axis=2) | pair.any(axis=1)
    difference = _differences(scores, pair)
    led = difference if batch.margin is None else difference - jnp.where(pair, batch.margin, 0.0)
    count = batch.preferred.sum()

    def over_pairs(values):
        return (batch.preferred * values).sum()

    texts = compared.sum().astype(jnp.float32)
    terms = {
        "loss/pairs": Term(over_pairs(pairwise.bradley_terry(led, config.smoothing)), count),
        "loss/centre": Term(
            masking.masked_sum(jnp.square(masking.masked(scores, compared)), compared), texts, config.centre_coef
        ),
    }
    metrics = {
        "reward/accuracy": Term(over_pairs((difference > 0).astype(jnp.float32)), count),
        "reward/margin": Term(over_pairs(difference), count),
        "reward/score": Term(masking.masked_sum(scores, compared), texts),
    }
    return terms, metrics
