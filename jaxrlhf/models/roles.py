"""Which trunk each role reads: policy, value function, reference and reward may have one each, or share one.

params = {"policy": tree, "value": head} shares the trunk, and the value's gradient trains the policy's features too;
params = {"policy": tree, "critic": {"trunk": tree, "head": head}} keeps both apart. A tree is a whole model's, or an adapter
(`models/lora.py`) over the frozen base that all roles share: then the reference is the base itself, the adapter off, and each
role costs no more than its adapter and its head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.models import lora
from jaxrlhf.models.model import Model


def attach(base: Any, params: Any, config: lora.LoraConfig) -> Any:
    """Parameters of which every adapter is laid over the base, so that a model can read them. Without adapters: as they are.

    `params` is one adapter, or the dict of a role that holds it at `policy` or `trunk`, with a critic's dict inside or none.
    """
    if not config.rank:
        return params
    if "critic" in params:
        params = params | {"critic": attach(base, params["critic"], config)}
    for name in ("policy", "trunk"):
        if name in params:
            return params | {name: lora.attach(base, params[name], config)}
    return lora.attach(base, params, config)


def base(frozen: dict[str, Any]) -> Any:
    """The model that adapters lie over: `frozen["base"]` or, where there is none, `frozen["reference"]`."""
    return frozen["base"] if "base" in frozen else frozen["reference"]


def has_value(params: dict[str, Any]) -> bool:
    """Whether there is a value function."""
    return "value" in params or "critic" in params


def value_states(
    model: Model, params: dict[str, Any], tokens: Int[Array, "b t"], hidden: Float[Array, "b t d"] | None
) -> tuple[dict[str, Any], Float[Array, "b t d"]]:
    """The value's head, and the states that it reads: `hidden`, the policy's own, or those of the critic's trunk.

    Raises:
        ValueError: there is neither a head nor a critic.
    """
    if "critic" in params:
        return params["critic"]["head"], model.hidden(params["critic"]["trunk"], tokens)
    if "value" not in params:
        raise ValueError(
            f"values need params['value'] (a head) or params['critic'] (trunk and head), not only {sorted(params)}"
        )
    if hidden is None:
        hidden = model.hidden(params["policy"], tokens)
    return params["value"], hidden


def critic(trunk: Any, width: int) -> dict[str, Any]:
    """A critic with a trunk of its own, copied from `trunk` (the policy's), and a head of zeros."""
    return {"trunk": jax.tree.map(jnp.copy, trunk), "head": {"weight": jnp.zeros(width), "bias": jnp.zeros([])}}


def critic_from_reward(reward: dict[str, Any], config: lora.LoraConfig = lora.NONE) -> dict[str, Any]:
    """A critic that starts as the reward model, its gain and bias folded into the head.

    Where the reward is an adapter over a base, and the policy trains one of this `config` over the same base, the critic's
    trunk is that adapter; else it is a whole model.

    Source: Stiennon et al. 2020, appendix G.1 (the value function starts from the reward model).
    """
    head, gain = reward["head"], reward["gain"]
    folded = {"weight": gain * head["weight"], "bias": gain * head["bias"] + reward["bias"]}
    adapter = lora.detach(reward["trunk"], config)[1] if config.rank else {}
    return {"trunk": jax.tree.map(jnp.copy, adapter or lora.whole(reward["trunk"])), "head": folded}
