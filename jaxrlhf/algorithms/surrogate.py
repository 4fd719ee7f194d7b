"""Clipped surrogate losses of each token, and their reduction to a `Term`.

Every array is masked before it is used, not after: a NaN in a masked place times a zero gradient would still be NaN.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.core import masking
from jaxrlhf.core.types import Term

LOG_RATIO_LIMIT = 20.0  # exp overflows float32 beyond 88; verl and OpenRLHF limit the log-ratio to the same


def log_ratio(
    logprobs: Float[Array, "b r"], old_logprobs: Float[Array, "b r"], mask: Bool[Array, "b r"]
) -> Float[Array, "b r"]:
    """log(policy / policy that is improved upon) of each token drawn, within +-LOG_RATIO_LIMIT; 0 where masked."""
    return jnp.clip(masking.masked(logprobs - old_logprobs, mask), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_policy(
    log_ratios: Float[Array, "b r"],
    advantages: Float[Array, "b r"],
    mask: Bool[Array, "b r"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "b r"], Bool[Array, "b r"]]:
    """PPO's loss of each token, and where the clip took effect (the gradient there is 0).

    max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)): for A > 0 only the upper limit acts, for A < 0 the lower.
    Source: Schulman et al. 2017, equation 7; two limits from DAPO (Yu et al. 2025, equation 10).
    """
    advantages = masking.masked(advantages, mask)
    ratio = jnp.exp(log_ratios)
    free = -advantages * ratio
    limited = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return masking.masked(jnp.maximum(free, limited), mask), mask & (limited > free)


def clipped_value(
    values: Float[Array, "b r"],
    old_values: Float[Array, "b r"],
    returns: Float[Array, "b r"],
    mask: Bool[Array, "b r"],
    clip: float | None,
) -> tuple[Float[Array, "b r"], Bool[Array, "b r"]]:
    """Half the squared error of the value function, the larger of the free and the clipped one; and where the clip acted.

    max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2. `clip=None` is the plain squared error.
    Source: openai/baselines ppo2 `vf_loss`, as in openai/lm-human-preferences train_policy.py `loss`.
    """
    values, old_values, returns = (masking.masked(x, mask) for x in (values, old_values, returns))
    free = jnp.square(values - returns)
    if clip is None:
        return 0.5 * free, jnp.zeros_like(mask)
    limited = jnp.square(jnp.clip(values, old_values - clip, old_values + clip) - returns)
    return 0.5 * jnp.maximum(free, limited), mask & (limited > free)


def token_mean(values: Float[Array, "b r"], mask: Bool[Array, "b r"], coefficient: float = 1.0) -> Term:
    """Mean over all real tokens of the whole optimizer batch: a long response weighs more than a short one."""
    return Term(masking.masked_sum(values, mask), mask.sum().astype(jnp.float32), coefficient)
