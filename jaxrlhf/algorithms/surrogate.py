"""Clipped surrogate losses of each token, and their reduction to a `Term`.

Every array is masked before it is used, not after: a NaN in a masked place times a zero gradient would still be NaN.
"""

from __future__ import annotations

from typing import Literal

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
    dual_clip: float | None = None,
) -> tuple[Float[Array, "b r"], Bool[Array, "b r"]]:
    """PPO's loss of each token, and where the clip took effect (the gradient there is 0).

    max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)): for A > 0 only the upper limit acts, for A < 0 the lower.
    With `dual_clip` > 1 the loss for A < 0 is at most -A dual_clip, however large the ratio.
    Source: Schulman et al. 2017, equation 7; two limits from DAPO (Yu et al. 2025, equation 10); dual clip from Ye et al.
    2020, "Mastering complex control in MOBA games", equation 5.
    """
    advantages = masking.masked(advantages, mask)
    ratio = jnp.exp(log_ratios)
    free = -advantages * ratio
    limited = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss, clipped = jnp.maximum(free, limited), limited > free
    if dual_clip is not None:
        most = jnp.where(advantages < 0, -advantages * dual_clip, jnp.inf)
        loss, clipped = jnp.minimum(loss, most), clipped | (loss > most)
    return masking.masked(loss, mask), mask & clipped


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


Level = Literal["token", "response", "response_mean"]


def at_level(log_ratios: Float[Array, "b r"], mask: Bool[Array, "b r"], level: Level) -> Float[Array, "b r"]:
    """Log-ratio at each token of what is taken for one action: the token, the whole response, or its geometric mean.

    "response" is the sum over the response's tokens at each of them, "response_mean" their mean; 0 where masked, within
    +-LOG_RATIO_LIMIT. The gradient flows to all tokens of a response alike.
    Source: Ahmadian et al. 2024 (the response as one action); Zheng et al. 2025, "Group sequence policy optimization",
    equation 7 (the mean).
    """
    if level == "token":
        return log_ratios
    total = masking.masked(log_ratios, mask).sum(axis=1, keepdims=True)
    ratio = total if level == "response" else total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return masking.masked(jnp.broadcast_to(jnp.clip(ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), mask.shape), mask)


def token_mean(values: Float[Array, "b r"], mask: Bool[Array, "b r"], coefficient: float = 1.0) -> Term:
    """Mean over all real tokens of the whole optimizer batch: a long response weighs more than a short one."""
    return Term(masking.masked_sum(values, mask), mask.sum().astype(jnp.float32), coefficient)


Reduction = Literal["token", "sequence", "width"]


def reduce(values: Float[Array, "b r"], mask: Bool[Array, "b r"], reduction: Reduction, coefficient: float = 1.0) -> Term:
    """A `Term` from a number at each token. Responses without a real token count nowhere.

    "token": `token_mean` (DAPO). "sequence": mean over responses of the mean over a response's tokens, so that every
    response weighs the same and a token of a long one less (GRPO). "width": sum over tokens / (responses x R), where the
    width R of the arrays is the longest response allowed: no weight depends on a response's length (Dr. GRPO).
    Source: Shao et al. 2024, equation 3; Yu et al. 2025, equation 12; Liu et al. 2025, "Understanding R1-Zero-like
    training", section 3.2 (there a constant in the place of R).
    """
    if reduction == "token":
        return token_mean(values, mask, coefficient)
    values, tokens = masking.masked(values, mask), mask.sum(axis=1)
    responses = (tokens > 0).sum().astype(jnp.float32)
    if reduction == "sequence":
        return Term((values.sum(axis=1) / jnp.maximum(tokens, 1)).sum(), responses, coefficient)
    return Term(values.sum(), responses * mask.shape[1], coefficient)
