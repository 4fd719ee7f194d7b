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
    # [B,K,G,T,E]: batch axes in front, so that each head is one matrix product.
    query = query.reshape(b, t, k, h // k, e).transpose(0, 2, 3, 1, 4) / math.sqrt(e)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgte,bkse->bkgts", query, key, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((t, t), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    mixed = jnp.einsum("bkgts,bkse->bkgte", weights, value, preferred_element_type=jnp.float32)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


def _cudnn(query, key, value, segments):  # pragma: no cover (gpu)
    if segments is not None:
        # cuDNN's kernel takes lengths only: packed texts would see each other in silence.
        raise ValueError("attention implementation 'cudnn' cannot keep packed segments apart: choose xla, or do not pack")
    if jax.default_backend() != "gpu":
        raise ValueError(f"attention implementation 'cudnn' needs a GPU, this is {jax.default_backend()}: choose xla")
    half = [x.astype(jnp.bfloat16) for x in (query, key, value)]
    return jax.nn.dot_product_attention(*half, is_causal=True, implementation="cudnn").astype(query.dtype)
