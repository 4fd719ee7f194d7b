"""What the losses on pairs share: which pairs count, the log-prob of a response, and what is reported of a choice."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.core import masking
from jaxrlhf.core.types import Preferences, Term

Reduction = Literal["sum", "mean"]


def identical(preferences: Preferences) -> Bool[Array, " b"]:
    """Where both rows of a pair are the same text: there is nothing to choose between."""
    prompt_len, tokens = jnp.asarray(preferences.prompt_len), jnp.asarray(preferences.tokens)
    end = prompt_len + preferences.response_len
    alike = (tokens[:, 0] == tokens[:, 1]) | ~masking.length_mask(end[:, 0], tokens.shape[-1])
    return (end[:, 0] == end[:, 1]) & (prompt_len[:, 0] == prompt_len[:, 1]) & alike.all(axis=1)


def pairs(
    preferences: Preferences, width: int
) -> tuple[Bool[Array, "b 2 {width}"], Float[Array, " b"], Float[Array, " b"], dict[str, Array]]:
    """Mask of the response tokens of the pairs that count, their labels and weights, and how many there are.

    A tie has label 0.5. A pair of identical rows gets weight 0 and is counted; where the weight is 0 the mask is empty.
    `preferences.margin`, in the labeler's own unit, is not read: no such unit is known of an implicit reward.

    Raises:
        ValueError: sets of more or fewer than two responses.
    """
    if preferences.tokens.shape[1] != 2:
        raise ValueError(
            f"sets of {preferences.tokens.shape[1]} responses, but a label compares 2: make a pair of the best and the worst"
        )
    same, given = identical(preferences), jnp.asarray(preferences.weight) > 0
    counted = given & ~same
    mask = masking.length_mask(jnp.asarray(preferences.response_len), width) & counted[:, None, None]
    label = jnp.where(jnp.asarray(preferences.tie), 0.5, preferences.label)
    metrics = {
        "preferences/pairs": counted.sum().astype(jnp.float32),
        "preferences/ties": (counted & (label == 0.5)).sum().astype(jnp.float32),
        "preferences/identical": (given & same).sum().astype(jnp.float32),
    }
    return mask, jnp.where(counted, label, 0.5), jnp.where(counted, preferences.weight, 0.0), metrics


def response_logprob(logprobs: Float[Array, "*b r"], mask: Bool[Array, "*b r"], reduction: Reduction) -> Float[Array, "*b"]:
    """Log-prob of each response: the sum over its tokens (EOS included), or their mean; 0 where it has none."""
    total = masking.masked(logprobs, mask).sum(-1)
    return total if reduction == "sum" else total / jnp.maximum(mask.sum(-1), 1)


def weighted_mean(values: Float[Array, " b"], weight: Float[Array, " b"], coefficient: float = 1.0) -> Term:
    """Mean over the pairs of the whole optimizer batch, each with its weight; a pair of weight 0 is not read."""
    return Term((weight * masking.masked(values, weight > 0)).sum(), weight.sum(), coefficient)


def choice_metrics(rewards: Float[Array, "b 2"], label: Float[Array, " b"], weight: Float[Array, " b"]) -> dict[str, Term]:
    """Implicit rewards of the chosen and of the rejected response, their distance, and how often it has the right sign.

    Over decided pairs: those with a label other than 0.5. Equal rewards count as wrong.
    """
    decided = jnp.where(label == 0.5, 0.0, weight)
    first = label > 0.5
    chosen, rejected = jnp.where(first, rewards[:, 0], rewards[:, 1]), jnp.where(first, rewards[:, 1], rewards[:, 0])
    values = {
        "reward/accuracy": (chosen > rejected).astype(jnp.float32),
        "reward/margin": chosen - rejected,
        "reward/chosen": chosen,
        "reward/rejected": rejected,
    }
    return {name: weighted_mean(value, decided) for name, value in values.items()}
