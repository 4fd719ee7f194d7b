"""Masks from lengths, the masked mean, sum and whitening that every loss is written with, and masks packed into words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


def length_mask(length: Int[Array, "*b"], width: int) -> Bool[Array, "*b {width}"]:
    """True at the first `length` of `width` places."""
    return jnp.arange(width) < length[..., None]


def response_mask(
    response_len: Int[Array, " b"], width: int, written: Bool[Array, "b r"] | None = None
) -> Bool[Array, "b {width}"]:
    """The response tokens that the policy wrote: inside the response and, where given, `written`."""
    mask = length_mask(response_len, width)
    return mask if written is None else mask & written


def response_index(prompt_len: Int[Array, " b"], width: int) -> Int[Array, "b {width}"]:
    """Row position of each response token: token t of the response stands at prompt_len + t."""
    return prompt_len[:, None] + jnp.arange(width)


def masked(values: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, "*s"]:
    """`values` where the mask holds, else 0. A select, not a product: NaN and inf in masked places vanish."""
    return jnp.where(mask, values, 0.0)


def masked_sum(values: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """Sum over the places where the mask holds."""
    return masked(values, mask).sum()


def masked_mean(values: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """Mean over the places where the mask holds; 0 where it holds nowhere."""
    return masked_sum(values, mask) / jnp.maximum(mask.sum(), 1)


def masked_variance(values: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    """Mean squared distance from the mean over the places where the mask holds (sum / n); 0 where it holds nowhere."""
    values = masked(values, mask)  # before the square: the gradient of a masked NaN's square would be 0 * NaN
    return masked_mean(jnp.square(values - masked_mean(values, mask)), mask)


def whiten(
    values: Float[Array, "*s"], mask: Bool[Array, "*s"], shift_mean: bool = True, epsilon: float = 1e-8, bessel: bool = False
) -> Float[Array, "*s"]:
    """(values - mean) / sqrt(variance + epsilon) over the masked-in places, 0 elsewhere.

    `shift_mean=False` adds the mean back, which changes the scale alone. The variance is sum / n; with `bessel` sum / (n - 1).
    Source: openai/lm-human-preferences utils/core.py `whiten`, sum / n as there; sum / (n - 1) as in TRL 0.11 and verl.
    """
    values = masked(values, mask)
    mean, variance = masked_mean(values, mask), masked_variance(values, mask)
    if bessel:
        count = mask.sum()
        variance = variance * count / jnp.maximum(count - 1, 1)
    scaled = (values - mean) * jax.lax.rsqrt(variance + epsilon)
    return masked(scaled if shift_mean else scaled + mean, mask)


def pack_bits(kept: Bool[Array, "*s v"]) -> UInt32[Array, "*s w"]:
    """32 truth values a word: entry v is bit v % 32 of word v // 32; the last word is filled up with zeros."""
    vocab = kept.shape[-1]
    padded = jnp.pad(kept, [(0, 0)] * (kept.ndim - 1) + [(0, -vocab % 32)])
    words = padded.reshape(*kept.shape[:-1], -1, 32).astype(jnp.uint32)
    return (words << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def unpack_bits(words: UInt32[Array, "*s w"], vocab: int) -> Bool[Array, "*s {vocab}"]:
    """The first `vocab` truth values that `pack_bits` packed."""
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :vocab].astype(bool)
