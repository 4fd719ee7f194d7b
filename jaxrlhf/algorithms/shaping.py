"""From a response's score to what its tokens earn: penalties, limits, and the place of the score."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms import checks
from jaxrlhf.core import masking


@dataclasses.dataclass(frozen=True)
class Config:
    scale: float = 1.0
    clip: float | None = None  # scores are kept within +-clip, after the scale
    missing_eos: Literal["subtract", "replace"] = "subtract"  # what becomes of the score of a response that was cut
    missing_eos_penalty: float = 1.0

    def __post_init__(self):
        checks.at_least(self, 0, "missing_eos_penalty")
        checks.above(self, 0, "clip")


def score(raw: Float[Array, " b"], finished: Bool[Array, " b"], config: Config) -> Float[Array, " b"]:
    """The score that is learned from: `raw` times the scale, limited, then the penalty of a response that was cut.

    "subtract" takes the penalty off its score (TRL 0.24 `missing_eos_penalty`); "replace" puts -penalty in its place, so
    that nothing that a cut response says earns anything (Ziegler et al. 2019, appendix A; Huang et al. 2024, EOS trick).
    """
    limited = raw * config.scale
    if config.clip is not None:
        limited = jnp.clip(limited, -config.clip, config.clip)
    replaced = jnp.zeros_like(limited) if config.missing_eos == "replace" else limited
    return jnp.where(finished, limited, replaced - config.missing_eos_penalty)


def token_rewards(
    score: Float[Array, " b"],
    token_kl: Float[Array, "b r"],
    mask: Bool[Array, "b r"],
    kl_coef: Float[Array, ""] | float,
) -> Float[Array, "b r"]:
    """Reward of each response token: -kl_coef * KL, plus the score at the last real one; 0 where masked.

    Source: Ziegler et al. 2019, equation 2, spread over the tokens as in their code. The score stands at the last real
    token, not at the first place after it (Huang et al. 2024, TRL 0.24), which no value describes.
    """
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)  # one real token from here to the end
    return masking.masked(jnp.where(last, score[:, None], 0.0) - kl_coef * token_kl, mask)


def overlong(length: Int[Array, " b"], limit: int, buffer: int, penalty: float) -> Float[Array, " b"]:
    """What a long response loses: 0 up to limit - buffer tokens, then linearly more, `penalty` at `limit` tokens.

    Source: Yu et al. 2025, "DAPO", equation 13 (soft overlong punishment, there with penalty 1).
    """
    exceeded = jnp.clip(length - (limit - buffer), 0, buffer).astype(jnp.float32)
    return penalty * exceeded / max(buffer, 1)
