"""Masks from lengths, and the masked mean, sum and whitening that every loss is written with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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


def whiten(
    values: Float[Array, "*s"], mask: Bool[Array, "*s"], shift_mean: bool = True, epsilon: float = 1e-8
) -> Float[Array, "*s"]:
    """(values - mean) / sqrt(variance + epsilon) over the masked-in places, 0 elsewhere; biased variance (sum / n).

    `shift_mean=False` adds the mean back, which changes the scale alone.
    Source: openai/lm-human-preferences utils/core.py `whiten`; biased variance as there.
    """
    values = masked(values, mask)  # before the square: the gradient of a masked NaN's square would be 0 * NaN
    mean = masked_mean(values, mask)
    variance = masked_mean(jnp.square(values - mean), mask)
    scaled = (values - mean) * jax.lax.rsqrt(variance + epsilon)
    return masked(scaled if shift_mean else scaled + mean, mask)
