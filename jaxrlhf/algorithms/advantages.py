"""Advantages and returns: of each token by a value function, of each response by the others of its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


def explained_variance(returns: Float[Array, "b r"], values: Float[Array, "b r"], mask: Bool[Array, "b r"]) -> Float[Array, ""]:
    """Share of the returns' variance that the values foresaw: 1 at best, 0 for a constant, negative if worse than that."""
    spread = jnp.maximum(masking.masked_variance(returns, mask), 1e-8)
    return 1.0 - masking.masked_variance(returns - values, mask) / spread


def returns_to_go(rewards: Float[Array, "b r"], mask: Bool[Array, "b r"], gamma: float) -> Float[Array, "b r"]:
    """G_t = r_t + gamma G_{t+1} at each real token, 0 where masked; masked places are skipped undecayed, as in `gae`.

    Source: Sutton and Barto 2018, equation 3.9.
    """
    zero = jnp.zeros(rewards.shape[0])
    return gae(rewards, jnp.zeros_like(rewards), mask, zero, gamma, 1.0)[0]


def group_mean(
    score: Float[Array, " b"], group: Int[Array, " b"], counted: Bool[Array, " b"], leave_out: bool = False
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """Mean score over the counted responses of each response's group, and how many these are (0: the mean is 0).

    `leave_out`: over the others only, which makes it independent of the response's own score.
    """
    same = (group[:, None] == group[None, :]) & counted[None, :]
    if leave_out:
        same &= ~jnp.eye(len(group), dtype=bool)
    number = same.sum(axis=1)
    return jnp.where(same, score[None, :], 0.0).sum(axis=1) / jnp.maximum(number, 1), number


def group_normalised(
    score: Float[Array, " b"], group: Int[Array, " b"], counted: Bool[Array, " b"], scale: bool, epsilon: float = 1e-4
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """score - mean of its group, by option over (deviation + epsilon); and where a group's scores differ at all.

    The deviation is that of a sample (sum / (n - 1)). 0 where not counted, and where a response is alone in its group.
    Source: Shao et al. 2024, "DeepSeekMath", section 4.1.2; epsilon and n - 1 as in TRL `GRPOTrainer`; without the
    deviation Dr. GRPO (Liu et al. 2025).
    """
    mean, number = group_mean(score, group, counted)
    centred = jnp.where(counted, score - mean, 0.0)
    # An equal score leaves rounding, which the division would blow up to an advantage of the order of 1.
    largest = jnp.where((group[:, None] == group[None, :]) & counted[None, :], jnp.abs(score)[None, :], 0.0).max(axis=1)
    centred = jnp.where(jnp.abs(centred) <= 1e-6 * largest, 0.0, centred)
    squares, _ = group_mean(jnp.square(centred), group, counted)
    variance = squares * number / jnp.maximum(number - 1, 1)
    differs = counted & (variance > 0)
    if not scale:
        return centred, differs
    deviation = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))  # the root's slope at 0 is infinite
    return jnp.where(differs, centred / (deviation + epsilon), 0.0), differs
