"""A learned reward: a trunk, a linear head on its hidden states, and a scale fixed after training.

params = {"trunk": tree, "head": tree, "gain": [], "bias": []}; the first two are what training changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrlhf.core.types import Rollout
from jaxrlhf.models import heads
from jaxrlhf.models.model import Model

Pooling = Literal["last", "mean"]


def with_scale(trained: dict[str, Any]) -> dict[str, Any]:
    """Reward parameters from a trained {"trunk", "head", ...}: gain 1, bias 0 (one of each a member of an ensemble)."""
    shape = trained["head"]["bias"].shape
    return trained | {"gain": jnp.ones(shape), "bias": jnp.zeros(shape)}


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


def normalise(params: dict[str, Any], scores: Float[Array, "*m n"]) -> dict[str, Any]:
    """Parameters under which `scores`, given by `params` to samples of the reference policy, have mean 0 and deviation 1;
    of an ensemble [M, n], each member's.

    A reward is known up to an offset and a unit only; this fixes both, so that a KL coefficient means the same for any
    reward model. Source: Ziegler et al. 2019, section 2.1; openai/lm-human-preferences rewards.py `set_reward_norm`.

    Raises:
        ValueError: fewer than two scores, a score that is not finite, or scores that are all equal.
    """
    deviation = np.asarray(jnp.std(scores, axis=-1)) if scores.shape[-1] > 1 else np.zeros(())
    if not ((deviation > 0) & (deviation < np.inf)).all():
        raise ValueError(
            f"cannot normalise the reward on {scores.shape[-1]} scores with standard deviation {deviation}: "
            "it needs at least two finite scores that differ"
        )
    return params | {"gain": params["gain"] / deviation, "bias": (params["bias"] - jnp.mean(scores, axis=-1)) / deviation}


def centre(params: dict[str, Any], scores: Float[Array, "*m n"]) -> dict[str, Any]:
    """Parameters under which `scores`, given by `params` to demonstrations, have mean 0; the unit stays that of the choices.

    Source: Huang et al. 2024 (N+ implementation details), the reward of the SFT demonstrations; vwxyzjn's
    summarize_from_feedback_details reward.py.

    Raises:
        ValueError: no score, or one that is not finite.
    """
    if not scores.size or not np.isfinite(np.asarray(scores)).all():
        raise ValueError(f"cannot centre the reward on {scores.size} scores: it needs at least one, and all of them finite")
    return params | {"bias": params["bias"] - jnp.mean(scores, axis=-1)}
