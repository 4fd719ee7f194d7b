"""Where PPO's value function comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax

from experiments import stage
from jaxrlhf.core import processes, sharding
from jaxrlhf.models import heads, lora, roles
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import ensemble

Critic = Literal["shared", "separate", "reward"]  # value head on the policy's trunk; its own; the reward model's


def value_function(
    kind: Critic, start: stage.Trained, adapter: LoraConfig, reward: Path, mesh: jax.sharding.Mesh, seed: int
) -> dict[str, Any]:
    """{"value": head} on the policy's trunk, or {"critic": trunk (or an adapter) and head}: see models/roles.py."""
    if kind == "reward":  # of an ensemble, its first member
        judged = stage.load_reward(reward, mesh, start)
        several = stage.ensembled(judged.settings)
        params = judged.params if several is None else ensemble.member(judged.params, 0, several)
        shared = judged.settings["kind"] == "reward_adapter"
        return {"critic": roles.critic_from_reward(params, adapter if shared else lora.NONE)}
    if kind == "separate":
        return {"critic": roles.critic(stage.trainable(start, adapter, mesh, seed + 1), start.config.width)}
    value = sharding.init_params(heads.value_specs(start.config.width), jax.random.key(seed))
    return {"value": processes.from_host(value, sharding.replicated(mesh))}
