"""Importance weights between the distribution that was sampled and the policy that is trained.

They differ by filters (top-p, top-k, min-p), lower precision in the sampler, and weights that are some steps old. A policy
gradient on such samples is right in expectation only if each is weighted with policy / sampled. (With `SamplingSpec.replay`
the filters are part of what is trained, and need no weight.)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import checks, surrogate
from jaxrlhf.core import masking


@dataclasses.dataclass(frozen=True)
class Config:
    level: Literal["token", "response"] = "token"  # a weight for each token, or one for the whole response
    outside: Literal["truncate", "mask"] = "truncate"  # what becomes of a weight outside the limits: the limit, or 0
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self):
        checks.at_least(self, 0, "low")
        if self.high <= max(self.low, 0):
            raise ValueError(f"high={self.high} must be above low={self.low} and above 0: weights lie around 1")


def weights(
    logprobs: Float[Array, "b r"],
    sampled_logprobs: Float[Array, "b r"],
    mask: Bool[Array, "b r"],
    config: Config | None,
) -> tuple[Float[Array, "b r"], dict[str, Float[Array, ""]]]:
    """Weight of each token, 0 where masked (1 where `config` is None), and the raw weights' mean, least and largest.

    token: exp(log policy - log sampled) of the token. response: exp of its sum over the response, at each of its tokens.
    Truncated weights have a bounded variance and a small bias; masked ones leave the sample out. The gradient does not flow
    through them. What is reported is measured before any limit: a limit hides the very mismatch that it treats.
    Source: Espeholt et al. 2018 (IMPALA), truncation; Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training" (TIS); masking as in IcePop (Ling team 2025).
    """
    difference = surrogate.log_ratio(logprobs, sampled_logprobs, mask)
    difference = surrogate.at_level(difference, mask, "token" if config is None else config.level)
    raw = jnp.exp(difference)
    metrics = {
        "importance/mean": masking.masked_mean(raw, mask),
        "importance/min": jnp.exp(jnp.where(mask, difference, surrogate.LOG_RATIO_LIMIT).min()),
        "importance/max": masking.masked(raw, mask).max(),
    }
    if config is None:
        return mask.astype(jnp.float32), metrics
    inside = (raw >= config.low) & (raw <= config.high)
    limited = jnp.clip(raw, config.low, config.high) if config.outside == "truncate" else jnp.where(inside, raw, 0.0)
    metrics["importance/outside"] = masking.masked_mean((~inside).astype(jnp.float32), mask)
    return jax.lax.stop_gradient(masking.masked(limited, mask)), metrics
