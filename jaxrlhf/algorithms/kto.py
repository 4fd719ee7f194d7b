"""KTO: from single responses marked desirable or undesirable to a policy (Ethayarajh et al. 2024).

No pairs are needed. A response's value is its implicit reward beta (log policy - log reference) against a reference point z0,
the KL divergence of policy and reference, which is estimated on prompts joined with the responses of other prompts. The
estimate is made by `prepare`, over the whole batch with the policy before the update, so that no split of the batch changes
the loss; no gradient flows through it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from jaxrlhf.algorithms import checks, preference
from jaxrlhf.core import masking
from jaxrlhf.core.types import Outputs, Preferences, Term


@dataclasses.dataclass(frozen=True)
class Config:
    beta: float = 0.1  # implicit reward per nat
    # Where the sides differ in number: (desirable_weight * desirable rows) / (undesirable_weight * the others) in 1 .. 4/3.
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self):
        checks.above(self, 0, "beta", "desirable_weight", "undesirable_weight")


@struct.dataclass
class Examples:
    """Single responses that somebody judged, with what `prepare` needs of the models."""

    tokens: jax.Array  # [B, T] int32
    prompt_len: jax.Array  # [B] int32
    response_len: jax.Array  # [B] int32
    desirable: jax.Array  # [B] bool
    weight: jax.Array  # [B], 0 leaves the row out
    ref_logprobs: jax.Array | None = None  # [B, R] of the reference
    other_ratio: jax.Array | None = None  # [B], log policy - log reference of the rows of `mismatched`, before the update
    other_weight: jax.Array | None = None  # [B], their weight


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, T] int32
    prompt_len: jax.Array  # [B] int32
    response_len: jax.Array  # [B] int32
    mask: jax.Array  # [B, R] bool, response tokens of the rows that count
    desirable: jax.Array  # [B] bool
    weight: jax.Array  # [B]
    ref_logprobs: jax.Array  # [B, R]
    baseline: jax.Array  # [B], z0 in nats, the same for all


def from_preferences(preferences: Preferences) -> Examples:
    """Both responses of each pair as rows [2B], first all responses 0, then all responses 1.

    The one that is more probably preferred is desirable, the other undesirable; ties (label 0.5) and identical pairs have
    weight 0.

    Raises:
        ValueError: sets of other than two responses.
    """
    _, label, weight, _ = preference.pairs(preferences, 1)

    def both(x: Array) -> Array:
        return jnp.concatenate([x[:, 0], x[:, 1]])

    weight = jnp.where(label == 0.5, 0.0, weight)
    return Examples(
        tokens=both(jnp.asarray(preferences.tokens)),
        prompt_len=both(jnp.asarray(preferences.prompt_len)),
        response_len=both(jnp.asarray(preferences.response_len)),
        desirable=jnp.concatenate([label > 0.5, label < 0.5]),
        weight=jnp.concatenate([weight, weight]),
        ref_logprobs=None if preferences.ref_logprobs is None else both(jnp.asarray(preferences.ref_logprobs)),
    )


def mismatched(examples: Examples) -> Examples:
    """Each prompt with the response of the next row, for the reference point; `weight` 0 where that row's prompt is the same.

    Rows keep their width: a response that has no room is cut, so that the estimate is of its first tokens.
    Source: Ethayarajh et al. 2024, section 4.1 ("shift").
    """
    tokens, start = jnp.asarray(examples.tokens), jnp.asarray(examples.prompt_len)[:, None]
    following = jnp.roll(jnp.arange(len(tokens)), -1)
    width = tokens.shape[1]
    place = jnp.arange(width)
    source = jnp.clip(place - start + start[following], 0, width - 1)
    row = jnp.where(place < start, tokens, jnp.take_along_axis(tokens[following], source, axis=1))
    same = (start == start[following])[:, 0] & ((tokens == tokens[following]) | (place >= start)).all(axis=1)
    counted = (jnp.asarray(examples.weight) > 0) & (jnp.asarray(examples.weight)[following] > 0) & ~same
    return Examples(
        tokens=row,
        prompt_len=start[:, 0],
        response_len=jnp.minimum(jnp.asarray(examples.response_len)[following], width - start[:, 0]),
        desirable=jnp.asarray(examples.desirable)[following],
        weight=counted.astype(jnp.float32),
    )


def prepare(examples: Examples, state: tuple, config: Config) -> tuple[Batch, tuple, dict[str, Array]]:
    """The reference point of the whole batch, z0 = max(0, mean of `other_ratio`), and the rows that count. There is no state.

    Source: Ethayarajh et al. 2024, section 4.1.

    Raises:
        ValueError: a batch of one row, or a field that the models fill is missing.
    """
    del config
    if len(examples.tokens) < 2:
        raise ValueError("KTO's reference point needs responses of other prompts: a batch of 1 row has none, take at least 2")
    checks.given(examples, "KTO", "ref_logprobs", "other_ratio", "other_weight")
    counted = jnp.asarray(examples.weight) > 0
    others = jnp.asarray(examples.other_weight) > 0
    divergence = masking.masked_mean(jnp.asarray(examples.other_ratio), others)
    baseline = jax.lax.stop_gradient(jnp.maximum(divergence, 0.0))  # a KL is not negative; its estimate may be
    reference = jnp.asarray(examples.ref_logprobs)
    mask = masking.length_mask(jnp.asarray(examples.response_len), reference.shape[1]) & counted[:, None]
    desirable = jnp.asarray(examples.desirable) & counted
    batch = Batch(
        tokens=jnp.asarray(examples.tokens),
        prompt_len=jnp.asarray(examples.prompt_len),
        response_len=jnp.asarray(examples.response_len),
        mask=mask,
        desirable=desirable,
        weight=jnp.where(counted, examples.weight, 0.0),
        ref_logprobs=masking.masked(reference, mask),
        baseline=jnp.full(len(counted), baseline),
    )
    metrics = {
        "policy/kl_mismatched": divergence,
        "examples/counted": counted.sum().astype(jnp.float32),
        "examples/desirable": desirable.sum().astype(jnp.float32),
    }
    return batch, state, metrics


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Weighted mean over the rows of lambda - value: lambda_D sigmoid(beta (z0 - r)), or lambda_U sigmoid(beta (r - z0)).

    r = log policy - log reference of the whole response. Reads `outputs.logprobs` [B, R].
    Source: Ethayarajh et al. 2024, equation 8.

    Raises:
        ValueError: the outputs hold no log-probs.
    """
    checks.given(outputs, "kto.loss", "logprobs")
    ratio = preference.response_logprob(outputs.logprobs, batch.mask, "sum")
    ratio = ratio - preference.response_logprob(batch.ref_logprobs, batch.mask, "sum")
    lead = config.beta * (ratio - batch.baseline)
    desired = config.desirable_weight * jax.nn.sigmoid(-lead)
    undesired = config.undesirable_weight * jax.nn.sigmoid(lead)
    terms = {"loss/kto": preference.weighted_mean(jnp.where(batch.desirable, desired, undesired), batch.weight)}
    good, bad = (jnp.where(batch.desirable == side, batch.weight, 0.0) for side in (True, False))
    return terms, {
        "reward/desirable": preference.weighted_mean(config.beta * ratio, good),
        "reward/undesirable": preference.weighted_mean(config.beta * ratio, bad),
    }
