"""Top-k, top-p and min-p as thresholds found by bisection, without sorting the vocabulary.

A sort of [256, 4096] logits takes ten times as long on a CPU as the thirty masked sums that find the exact border, and
is more than half of a whole generation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models.heads import IMPOSSIBLE

TILE = 2**15  # weights, 128 KiB


def apply(logits: Float[Array, "b v"], spec: SamplingSpec) -> Float[Array, "b v"]:
    """Policy logits with the tokens that `spec` removes made impossible, in the order top-k, top-p, min-p.

    top-k keeps the k most probable tokens; top-p then the fewest most probable ones whose renormalised mass reaches p, the
    token that crosses p included; min-p then those at least `min_p` times as probable as the first. Of tokens equal at the
    border all are kept, so a kept set never depends on the order of the vocabulary. At least one token stays.
    Source: transformers logits_process.py (`TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`), which breaks ties
    at the border of top-p by position.
    """
    if 0 < spec.top_k < logits.shape[-1]:
        logits = jnp.where(_by_tile(functools.partial(_top_k, k=spec.top_k), logits), logits, IMPOSSIBLE)
    if spec.top_p == 1 and spec.min_p == 0:
        return logits
    weight = jnp.exp(logits - logits.max(-1, keepdims=True))  # probability over that of the first token, whose weight is 1
    least = _by_tile(functools.partial(_top_p, p=spec.top_p), weight) if spec.top_p < 1 else jnp.zeros(logits.shape[0])
    return jnp.where(weight >= jnp.maximum(least, spec.min_p)[:, None], logits, IMPOSSIBLE)


def nucleus_of_each(logits: Float[Array, "b v"], top_p: Float[Array, " b"]) -> Float[Array, "b v"]:
    """`apply` of top-p alone, with a share of its own for each row; 1 keeps every token."""
    weight = jnp.exp(logits - logits.max(-1, keepdims=True))
    least = jnp.where(top_p < 1, _top_p(weight, top_p), 0.0)
    return jnp.where(weight >= least[:, None], logits, IMPOSSIBLE)


def _top_k(logits: Float[Array, "b v"], k: int) -> Bool[Array, "b v"]:
    """True at every logit that is at least the k-th largest."""
    # A select makes -0.0 the 0.0 that it equals; XLA would simplify `logits + 0.0` away.
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.int32)
    # Read as integers, floats above 0 are in order and floats below 0 in reverse order.
    rank = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    positive = (rank >= 0).sum(-1) >= k
    sign = jnp.where(positive, jnp.int32(0), jnp.iinfo(jnp.int32).min)
    border = _largest(lambda least: (rank >= least[:, None]).sum(-1) >= k, sign)
    return rank >= border[:, None]


def _top_p(weight: Float[Array, "b v"], p: float | Float[Array, " b"]) -> Float[Array, " b"]:
    """A weight such that tokens of at least this weight are the fewest that hold the share p of all; exact for float32 sums.

    Tokens of less than (1 - p) / V of all together hold less than 1 - p, so the border is not below that.
    """
    total = weight.sum(-1)
    target = p * total
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    least = jax.lax.bitcast_convert_type(0.999 * (1 - p) / weight.shape[-1] * total, jnp.int32)

    def mass(bits: Int[Array, " b"]) -> Float[Array, " b"]:
        return jnp.where(weight >= _as_float(bits)[:, None], weight, 0.0).sum(-1)

    if jax.default_backend() != "cpu":  # a loop of unknown length would ask the host after every pass
        return _as_float(_largest(lambda bits: mass(bits) >= target, jnp.zeros_like(least)))

    def apart(state: tuple) -> Bool[Array, ""]:
        """Whether there may be two tokens, each of at least `low`, between the two weights."""
        low, high, above_low, above_high = state
        return ((high - low > 1) & (above_low - above_high >= 1.5 * _as_float(low))).any()

    def halve(state: tuple) -> tuple:
        low, high, above_low, above_high = state
        middle = low + (high - low) // 2
        above = mass(middle)
        enough = above >= target
        return tuple(
            jnp.where(enough, *pair) for pair in ((middle, low), (high, middle), (above, above_low), (above_high, above))
        )

    start = (least, jnp.full_like(least, one + 1), total, jnp.zeros_like(total))
    return _as_float(jax.lax.while_loop(apart, halve, start)[0])


def _as_float(bits: Int[Array, " b"]) -> Float[Array, " b"]:
    """Floats from 0 up are in the order of their bits read as integers."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _largest(holds: Callable[[Int[Array, " b"]], Bool[Array, " b"]], start: Int[Array, " b"]) -> Int[Array, " b"]:
    """The largest integer `start` + 0 .. 2^31 - 1 at which `holds`, true up to some place and false after it, is true."""

    def bit(i, found):
        larger = found | (jnp.int32(1) << (30 - i))
        return jnp.where(holds(larger), larger, found)

    return jax.lax.fori_loop(0, 31, bit, start)


def _by_tile(search: Callable[[jax.Array], jax.Array], rows: Float[Array, "b v"]) -> Shaped[Array, "b ..."]:
    """`search` of all rows; on a single CPU device of a few at a time, so that its passes read one core's own cache.

    At [256, 4096] that takes a third of the processor time.
    """
    count, vocab = rows.shape
    tile = math.gcd(count, 1 << max(0, (TILE // vocab).bit_length() - 1))
    if jax.default_backend() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return search(rows)
    found = jax.lax.map(search, rows.reshape(-1, tile, vocab))
    return found.reshape(count, *found.shape[2:])
