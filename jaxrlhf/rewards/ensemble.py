"""Several learned rewards as one: M heads on one trunk, M adapters over it, or M whole models, their scores taken together.

params = {"trunk", "head", "gain" [M], "bias" [M]} as in `rewards/model.py`, every leaf of the head (of heads and adapters) or
of trunk and head (of models) stacked [M, ...]; of adapters also {"adapters"}, stacked, over the one trunk. Each member has its
own scale, so that members are compared in one unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.core import members
from jaxrlhf.core.types import Rollout
from jaxrlhf.models import heads, lora
from jaxrlhf.models.model import Model
from jaxrlhf.rewards.model import Pooling

Of = Literal["heads", "adapters", "models"]
Aggregation = Literal["mean", "worst", "uncertainty"]


@dataclasses.dataclass(frozen=True)
class Config:
    members: int
    of: Of = "heads"
    aggregation: Aggregation = "mean"
    uncertainty_coef: float = 0.5  # of the variance over the members, where aggregation='uncertainty'
    lora: lora.LoraConfig = lora.NONE  # of the adapters, where of='adapters'

    def __post_init__(self):
        if self.members < 2:
            raise ValueError(f"an ensemble of {self.members} member(s): it needs 2 or more")
        if self.of not in ("heads", "adapters", "models"):
            raise ValueError(f"ensemble of '{self.of}' must be of heads, of adapters or of models")
        if (self.of == "adapters") != (self.lora.rank > 0):
            raise ValueError(
                f"ensemble of {self.of} with lora rank={self.lora.rank}: adapters need a rank, 8 say, others have 0"
            )
        if self.aggregation not in ("mean", "worst", "uncertainty"):
            raise ValueError(f"aggregation='{self.aggregation}' must be mean, worst or uncertainty")
        if self.uncertainty_coef < 0:
            raise ValueError(f"uncertainty_coef={self.uncertainty_coef} must be >= 0; 0 is the mean")


def scores(
    model: Model, params: dict[str, Any], tokens: Int[Array, "b t"], length: Int[Array, " b"], pooling: Pooling, config: Config
) -> Float[Array, "m b"]:
    """Every member's gain * head(hidden) + bias of rows of `length` real tokens."""
    trunk, head = params["trunk"], params["head"]
    if config.of == "heads":
        hidden = model.hidden(trunk, tokens)
        raw = jax.vmap(lambda one: heads.score(one, hidden, length, pooling))(head)
    else:

        def of_member(own: Any, head: Any) -> jax.Array:
            tree = own if config.of == "models" else lora.attach(trunk, own, config.lora)
            return heads.score(head, model.hidden(tree, tokens), length, pooling)

        raw = members.each(of_member, trunk if config.of == "models" else params["adapters"], head)
    return params["gain"][:, None] * raw + params["bias"][:, None]


def aggregate(scores: Float[Array, "m b"], config: Config) -> Float[Array, " b"]:
    """The mean over the members, the worst of them, or the mean less `uncertainty_coef` times their variance (sum / M).

    Source: Coste et al. 2023, "Reward model ensembles help mitigate overoptimization", section 3.2 (mean, WCO, UWO).
    """
    if config.aggregation == "worst":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    if config.aggregation == "mean":
        return mean
    return mean - config.uncertainty_coef * jnp.square(scores - mean).mean(axis=0)


def score(
    model: Model, params: dict[str, Any], tokens: Int[Array, "b t"], length: Int[Array, " b"], pooling: Pooling, config: Config
) -> Float[Array, " b"]:
    """The members' scores taken together."""
    return aggregate(scores(model, params, tokens, length, pooling, config), config)


def reward(model: Model, pooling: Pooling, config: Config) -> Callable[[dict[str, Any], Rollout], jax.Array]:
    """The ensemble as a reward: (params, rollout) -> score of each row [B], compiled."""

    @jax.jit
    def of_rollout(params: dict[str, Any], rollout: Rollout) -> jax.Array:
        return score(model, params, rollout.tokens, rollout.prompt_len + rollout.response_len, pooling, config)

    return of_rollout


def member(params: dict[str, Any], number: int, config: Config) -> dict[str, Any]:
    """One member's parameters, as of a reward model of its own."""
    own = {name: members.one(params[name], number) for name in ("head", "gain", "bias")}
    if config.of == "models":
        return own | {"trunk": members.one(params["trunk"], number)}
    if config.of == "heads":
        return own | {"trunk": params["trunk"]}
    return own | {"trunk": lora.attach(params["trunk"], members.one(params["adapters"], number), config.lora)}
