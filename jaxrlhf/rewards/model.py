"""A learned reward: a trunk, a linear head on its hidden states, and a scale fixed after training.

params = {"trunk": tree, "head": tree, "gain": [], "bias": []}; the first two are what training changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.core.types import Rollout
from jaxrlhf.models import heads
from jaxrlhf.models.model import Model

Pooling = Literal["last", "mean"]


def with_scale(trained: dict[str, Any]) -> dict[str, Any]:
    """Reward parameters from a trained {"trunk", "head"}: gain 1, bias 0."""
    return {"trunk": trained["trunk"], "head": trained["head"], "gain": jnp.float32(1.0), "bias": jnp.float32(0.0)}


def score(
    model: Model, params: dict[str, Any], tokens: Int[Array, "b t"], length: Int[Array, " b"], pooling: Pooling
) -> Float[Array, " b"]:
    """gain * head(hidden) + bias of rows of `length` real tokens (prompt and response): read at the last one, or their mean."""
    raw = heads.score(params["head"], model.hidden(params["trunk"], tokens), length, pooling)
    return params["gain"] * raw + params["bias"]


def reward(model: Model, pooling: Pooling) -> Callable[[dict[str, Any], Rollout], jax.Array]:
    """The model as a reward: (params, rollout) -> score of each row [B], compiled."""

    @jax.jit
    def of_rollout(params: dict[str, Any], rollout: Rollout) -> jax.Array:
        return score(model, params, rollout.tokens, rollout.prompt_len + rollout.response_len, pooling)

    return of_rollout


def normalise(params: dict[str, Any], scores: Float[Array, " n"]) -> dict[str, Any]:
    """Parameters under which `scores`, given by `params` to samples of the reference policy, have mean 0 and deviation 1.

    A reward is known up to an offset and a unit only; this fixes both, so that a KL coefficient means the same for any
    reward model. Source: Ziegler et al. 2019, section 2.1; openai/lm-human-preferences rewards.py `set_reward_norm`.

    Raises:
        ValueError: fewer than two scores, a score that is not finite, or scores that are all equal.
    """
    deviation = float(jnp.std(scores)) if scores.size > 1 else 0.0
    if not (deviation > 0 and deviation < float("inf")):
        raise ValueError(
            f"cannot normalise the reward on {scores.size} scores with standard deviation {deviation}: "
            "it needs at least two finite scores that differ"
        )
    return params | {"gain": params["gain"] / deviation, "bias": (params["bias"] - jnp.mean(scores)) / deviation}
