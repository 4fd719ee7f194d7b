"""Causal self-attention of whole rows behind one argument that names the implementation."""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

Implementation = Literal["xla", "cudnn"]

# Finite, so that a row in which nothing may be seen gives a uniform average and not NaN.
MASKED = -1e30


def attention(
    query: Float[Array, "b t h e"],
    key: Float[Array, "b t k e"],
    value: Float[Array, "b t k e"],
    segments: Int[Array, "b t"] | None = None,
    implementation: str = "xla",
    window: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "b t h e"]:
    """softmax(q k / sqrt(E)) v over earlier places of the same segment; each key/value head serves H / K query heads.

    A query sees the last `window` places, its own included (None or 0: all). `scale` takes the place of 1 / sqrt(E); with
    `cap` a score s becomes cap * tanh(s / cap).

    Source: Vaswani et al. 2017 equation 1; grouped heads: Ainslie et al. 2023 (arXiv 2305.13245); window: Beltagy et al. 2020
    (arXiv 2004.05150); cap: Gemma Team 2024 (arXiv 2408.00118), section 2.

    Raises:
        ValueError: an implementation that does not exist or cannot do what is asked.
    """
    if implementation == "xla":
        return _xla(query, key, value, segments, window, scale, cap)
    if implementation == "cudnn":
        if (window, scale, cap) != (None, None, None):
            raise ValueError("attention implementation 'cudnn' knows no window, scale or cap: choose xla")
        return _cudnn(query, key, value, segments)
    raise ValueError(f"attention implementation '{implementation}' is not known: choose xla or cudnn")


def scaled(query: Float[Array, "*s e"], scale: float | None) -> Float[Array, "*s e"]:
    """The query times `scale`, or divided by sqrt(E)."""
    return query / math.sqrt(query.shape[-1]) if scale is None else query * scale


def capped(scores: Float[Array, "*s"], cap: float | None) -> Float[Array, "*s"]:
    """Scores or logits bent to lie between -cap and cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def near(distance: Int[Array, "*s"], window: Int[Array, ""] | int) -> Bool[Array, "*s"]:
    """Whether a place so far back lies within the window; 0 is a window without end."""
    return (distance < window) | (jnp.asarray(window) == 0)


def _xla(query, key, value, segments, window, scale, cap):
    b, t, h, e = query.shape
    k = key.shape[2]
    visible = jnp.tril(jnp.ones((t, t), bool))[None]
    if window is not None:
        place = jnp.arange(t)
        visible = visible & near(place[:, None] - place, window)
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    # [B,K,G*T,E]: one matrix product for all query heads that share a key/value head.
    query = scaled(query.reshape(b, t, k, h // k, e).transpose(0, 2, 3, 1, 4).reshape(b, k, h // k * t, e), scale)
    mixed: jax.Array = _core(cap, query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), visible)
    return mixed.reshape(b, k, h // k, t, e).transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(cap, query, key, value, visible):
    return _core_forward(cap, query, key, value, visible)[0]


def _core_forward(cap, query, key, value, visible):
    scores = _scores(cap, query, key, visible)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    mixed = jnp.matmul(weights, value, preferred_element_type=jnp.float32) / total
    # Named, so that a backward pass that stores them need not mix again.
    mixed, logsum = (checkpoint_name(x, "attention") for x in (mixed, top + jnp.log(total)))
    return mixed, (query, key, value, visible, logsum, mixed)


def _core_backward(cap, residual, g):
    """Source: Dao et al. 2022 (arXiv 2205.14135) appendix B.2: dS = P (dP - sum(dO O)); weights recomputed, not stored."""
    query, key, value, visible, logsum, mixed = residual
    scores = _scores(cap, query, key, visible)
    weights = jnp.exp(scores - logsum)
    slope = weights * (jnp.matmul(g, value.swapaxes(-1, -2)) - (g * mixed).sum(-1, keepdims=True))
    if cap is not None:  # d cap tanh(s / cap) / ds; clipped, because 0 * inf at masked places is NaN
        slope = slope * (1 - jnp.square(jnp.clip(scores / cap, -1, 1)))
    dvalue = jnp.matmul(weights.swapaxes(-1, -2), g)
    return jnp.matmul(slope, key), jnp.matmul(slope.swapaxes(-1, -2), query), dvalue, None


_core.defvjp(_core_forward, _core_backward)


def _scores(cap, query, key, visible):
    """Scores [B, K, G*T, T] of scaled queries, those of invisible places MASKED."""
    b, k, rows, _ = query.shape
    t = key.shape[2]
    scores = capped(jnp.matmul(query, key.swapaxes(-1, -2), preferred_element_type=jnp.float32), cap)
    return jnp.where(visible[:, None, None], scores.reshape(b, k, rows // t, t, t), MASKED).reshape(b, k, rows, t)


def _cudnn(query, key, value, segments):  # pragma: no cover (gpu)
    if segments is not None:
        # cuDNN's kernel takes lengths only: packed texts would see each other in silence.
        raise ValueError("attention implementation 'cudnn' cannot keep packed segments apart: choose xla, or do not pack")
    if jax.default_backend() != "gpu":
        raise ValueError(f"attention implementation 'cudnn' needs a GPU, this is {jax.default_backend()}: choose xla")
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    return jax.nn.dot_product_attention(*half, is_causal=True, implementation="cudnn").astype(query.dtype)
