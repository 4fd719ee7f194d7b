"""One token a row from one uniform number a row, by the inverse of the cumulative distribution."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.models.heads import IMPOSSIBLE


def draw(logits: Float[Array, "b v"], uniform: Float[Array, " b"]) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """A token of softmax(logits) and its log-prob, from a number in [0, 1).

    The cumulative sum runs over blocks first and then inside the block that holds the number, so that the vocabulary is
    read twice and nothing of its size is written. A token of weight 0 is never drawn, whatever the rounding.
    Source: Devroye 1986, Non-Uniform Random Variate Generation, section III.2 (inversion by sequential and indexed search).
    """
    rows, vocab = logits.shape
    block = 1 << max(3, (vocab.bit_length() + 1) // 2)  # about the square root: both sums are short
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % block)), constant_values=IMPOSSIBLE) if vocab % block else logits
    blocks = padded.reshape(rows, -1, block)
    top = logits.max(-1)
    mass = jnp.exp(blocks - top[:, None, None]).sum(-1)
    cumulative = jnp.cumsum(mass, axis=-1)
    total = cumulative[:, -1]
    target = uniform * total
    index = _first_beyond(cumulative, mass, target)
    inside = jnp.exp(jnp.take_along_axis(blocks, index[:, None, None], axis=1, mode="clip")[:, 0] - top[:, None])
    before = jnp.take_along_axis(cumulative - mass, index[:, None], axis=1, mode="clip")[:, 0]
    place = _first_beyond(jnp.cumsum(inside, axis=-1), inside, target - before)
    token = index * block + place
    return token, jnp.take_along_axis(logits, token[:, None], axis=1, mode="clip")[:, 0] - top - jnp.log(total)


def greedy(logits: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The most probable token, the lowest id among equals."""
    # Two vectorised reductions: XLA's CPU backend computes argmax one element at a time, 4 times as slowly.
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(logits == logits.max(-1, keepdims=True), ids, logits.shape[-1]).min(-1)


def _first_beyond(cumulative: Float[Array, "b m"], weight: Float[Array, "b m"], target: Float[Array, " b"]) -> Int[Array, " b"]:
    """The first place of positive weight whose cumulative sum exceeds the target; where rounding leaves none, the last."""
    # A parallel cumulative sum need not be monotone in its last bits: without `weight > 0` it could stop at a weight of 0.
    place = jnp.arange(weight.shape[-1], dtype=jnp.int32)
    first = jnp.where((cumulative > target[:, None]) & (weight > 0), place, weight.shape[-1]).min(-1)
    last = jnp.where(weight > 0, place, 0).max(-1)
    return jnp.minimum(first, last)
