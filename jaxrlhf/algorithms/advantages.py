"""Advantages and returns of each response token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.core import masking


def gae(
    rewards: Float[Array, "b r"],
    values: Float[Array, "b r"],
    mask: Bool[Array, "b r"],
    bootstrap: Float[Array, " b"],
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "b r"], Float[Array, "b r"]]:
    """Generalised advantages, and the returns (advantage + value) that the value function learns; 0 where masked.

    `values[:, t]` is the value before response token t, `rewards[:, t]` what follows token t, `bootstrap` the value after
    the last token (0 where the response ended by itself). Masked places are skipped: value and advantage are carried
    across them undecayed, as if the tokens on both sides were neighbours.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1}

    Source: Schulman et al. 2016, equations 11, 12 and 16; skipping as in verl `compute_gae_advantage_return`.
    """
    rewards, values = masking.masked(rewards, mask), masking.masked(values, mask)

    def step(carry, column):
        next_value, next_advantage = carry
        reward, value, real = column
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return carry, jnp.where(real, advantage, 0.0)

    start = (bootstrap, jnp.zeros_like(bootstrap))
    _, advantages = jax.lax.scan(step, start, (rewards.T, values.T, mask.T), reverse=True)
    advantages = advantages.T
    return advantages, advantages + values
