"""Causal self-attention of whole rows behind one argument that names the implementation."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["xla", "cudnn"]

# Finite, so that a row in which nothing may be seen gives a uniform average and not NaN.
MASKED = -1e30


def attention(
    query: Float[Array, "b t h e"],
    key: Float[Array, "b t k e"],
    value: Float[Array, "b t k e"],
    segments: Int[Array, "b t"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "b t h e"]:
    """softmax(q k / sqrt(E)) v over earlier places of the same segment; each key/value head serves H / K query heads.

    Source: Vaswani et al. 2017 equation 1; grouped heads: Ainslie et al. 2023 (arXiv 2305.13245).

    Raises:
        ValueError: an implementation that does not exist or cannot do what is asked.
    """
    if implementation == "xla":
        return _xla(query, key, value, segments)
    if implementation == "cudnn":
        return _cudnn(query, key, value, segments)
    raise ValueError(f"attention implementation '{implementation}' is not known: choose xla or cudnn")


def _xla(query, key, value, segments):
    b, t, h, e = query.shape
    k = key.shape[2]
    visible = jnp.tril(jnp.ones((t, t), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    # [B,K,G*T,E]: one matrix product for all query heads that share a key/value head.
    query = query.reshape(b, t, k, h // k, e).transpose(0, 2, 3, 1, 4).reshape(b, k, h // k * t, e) / math.sqrt(e)
    mixed = _core(query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), visible)
    return mixed.reshape(b, k, h // k, t, e).transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


@jax.custom_vjp
def _core(query, key, value, visible):
    return _core_forward(query, key, value, visible)[0]


def _core_forward(query, key, value, visible):
    scores = _scores(query, key, visible)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    mixed = jnp.matmul(weights, value, preferred_element_type=jnp.float32) / total
    return mixed, (query, key, value, visible, top + jnp.log(total), mixed)


def _core_backward(residual, g):
    """Source: Dao et al. 2022 (arXiv 2205.14135) appendix B.2: dS = P (dP - sum(dO O)); weights recomputed, not stored."""
    query, key, value, visible, logsum, mixed = residual
    weights = jnp.exp(_scores(query, key, visible) - logsum)
    slope = weights * (jnp.matmul(g, value.swapaxes(-1, -2)) - (g * mixed).sum(-1, keepdims=True))
    dvalue = jnp.matmul(weights.swapaxes(-1, -2), g)
    return jnp.matmul(slope, key), jnp.matmul(slope.swapaxes(-1, -2), query), dvalue, None


_core.defvjp(_core_forward, _core_backward)


def _scores(query, key, visible):
    """Scores [B, K, G*T, T] of scaled queries, those of invisible places MASKED."""
    b, k, rows, _ = query.shape
    t = key.shape[2]
    scores = jnp.matmul(query, key.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None, None], scores.reshape(b, k, rows // t, t, t), MASKED).reshape(b, k, rows, t)


def _cudnn(query, key, value, segments):  # pragma: no cover (gpu)
    if segments is not None:
        # cuDNN's kernel takes lengths only: packed texts would see each other in silence.
        raise ValueError("attention implementation 'cudnn' cannot keep packed segments apart: choose xla, or do not pack")
    if jax.default_backend() != "gpu":
        raise ValueError(f"attention implementation 'cudnn' needs a GPU, this is {jax.default_backend()}: choose xla")
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    return jax.nn.dot_product_attention(*half, is_causal=True, implementation="cudnn").astype(query.dtype)
