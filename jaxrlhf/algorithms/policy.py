"""What the policy-gradient algorithms without a value function share: their batch, its loss, and what is reported."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import checks, kl, offpolicy, surrogate
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Outputs, Term


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, T] int32
    prompt_len: jax.Array  # [B] int32
    response_len: jax.Array  # [B] int32
    mask: jax.Array  # [B, R] bool, tokens that the policy wrote, of rows that count
    old_logprobs: jax.Array  # [B, R]
    ref_logprobs: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R]
    importance: jax.Array  # [B, R], weight of a token's policy loss
    kept: jax.Array | None = None  # [B, R, W] uint32, see Rollout.kept


@dataclasses.dataclass(frozen=True)
class Clip:
    """How far the policy may move from the one that sampled before a response stops teaching."""

    level: surrogate.Level = "token"  # whose ratio
    low: float | None = 0.2  # the ratio counts from 1 - low; None: not limited
    high: float | None = None  # to 1 + high; None: as low
    dual: float | None = None  # > 1: most that a negative advantage is multiplied with

    def __post_init__(self):
        checks.above(self, 0, "low", "high")
        checks.above(self, 1, "dual")


def written(experience: Experience) -> Bool[Array, "b r"]:
    """The tokens that the policy wrote, of rows that count."""
    rollout = experience.rollout
    mask = masking.response_mask(rollout.response_len, experience.logprobs.shape[1], rollout.written)
    return mask & (experience.weight > 0)[:, None]


def batch(
    experience: Experience,
    mask: Bool[Array, "b r"],
    advantages: Float[Array, "b r"],
    importance: offpolicy.Config | None,
) -> tuple[Batch, dict[str, Float[Array, ""]]]:
    """The batch in which the tokens of `mask` learn, and the raw importance weights there."""
    rollout = experience.rollout
    weights, metrics = offpolicy.weights(experience.logprobs, rollout.sampled_logprobs, mask, importance)
    return Batch(
        tokens=rollout.tokens,
        prompt_len=rollout.prompt_len,
        response_len=rollout.response_len,
        mask=mask,
        old_logprobs=masking.masked(experience.logprobs, mask),
        ref_logprobs=masking.masked(experience.ref_logprobs, mask),
        advantages=masking.masked(advantages, mask),
        importance=weights,
        kept=rollout.kept,
    ), metrics


def report(experience: Experience, mask: Bool[Array, "b r"]) -> dict[str, Float[Array, ""]]:
    """KL to the reference in nats a response, and mean and deviation of the scores, of the rows that count."""
    counted = experience.weight > 0
    sequence_kl = kl.sequence_kl(experience.logprobs, experience.ref_logprobs, mask)
    return {
        "policy/kl_ref": masking.masked_mean(sequence_kl, counted),
        "reward/score": masking.masked_mean(experience.score, counted),
        "reward/score_std": jnp.sqrt(masking.masked_variance(experience.score, counted)),
    }


def loss(
    outputs: Outputs, batch: Batch, clip: Clip, reduction: surrogate.Reduction, kl_coef: float, kl_estimator: kl.Estimator
) -> tuple[dict[str, Term], dict[str, Term]]:
    """Clipped policy loss and, for `kl_coef` > 0, the KL to the reference, reduced alike.

    Reads `outputs.logprobs`; `outputs.ref_kl` for an exact KL; `outputs.entropy` to report it.
    Source: surrogate.py.

    Raises:
        ValueError: an output that is read is missing.
    """
    checks.given(outputs, "a policy loss", "logprobs")
    mask = batch.mask
    log_ratio = surrogate.at_level(surrogate.log_ratio(outputs.logprobs, batch.old_logprobs, mask), mask, clip.level)
    low = jnp.inf if clip.low is None else clip.low
    high = low if clip.high is None else clip.high
    gain, clipped = surrogate.clipped_policy(log_ratio, batch.advantages, mask, low, high, clip.dual)
    terms = {"loss/policy": surrogate.reduce(gain * batch.importance, mask, reduction)}
    if kl_coef > 0:
        token_kl = kl.estimate(outputs.logprobs, batch.ref_logprobs, mask, kl_estimator, outputs.ref_kl)
        terms["loss/kl"] = surrogate.reduce(token_kl, mask, reduction, kl_coef)
    metrics = {
        "policy/ratio": surrogate.token_mean(jnp.exp(log_ratio), mask),
        "policy/clip_fraction": surrogate.token_mean(clipped.astype(jnp.float32), mask),
        "policy/approx_kl": surrogate.token_mean(0.5 * jnp.square(log_ratio), mask),
    }
    if outputs.entropy is not None:
        metrics["policy/entropy"] = surrogate.token_mean(outputs.entropy, mask)
    return terms, metrics
