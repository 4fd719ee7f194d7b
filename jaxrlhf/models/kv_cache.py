"""Keys and values of the tokens read so far, as decoding keeps them: in float32, in bfloat16, or in int8 with a scale each.

A cache has two parts a layer: keys and values of the prompts [prompts, K, P, E], shared by the samples of each, and those of
the responses [prompts * n, K, R, E]. Rows that are decoded together write at one common place, or each at its own.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxrlhf.core import sharding

Dtype = Literal["float32", "bfloat16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@struct.dataclass
class Kept:
    """Keys or values x = values * scale."""

    values: Any  # [B, K, S, E] of the cache's type
    scale: Any = None  # [B, K, S] float32, where that is int8


def keep(x: Float[Array, "b k s e"], dtype: str) -> Kept:
    """Keys or values as the cache has them; in int8 each token of each head is rounded to 1/127 of its largest number.

    Raises:
        ValueError: another type.
    """
    if dtype not in DTYPES:
        raise ValueError(f"cache dtype '{dtype}' is not known: choose one of {', '.join(DTYPES)}")
    if dtype != "int8":
        return Kept(x.astype(dtype))
    scale = jnp.maximum(jnp.abs(x).max(-1), 1e-30) / 127
    return Kept(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def empty(rows: int, heads: int, width: int, head_width: int, dtype: str) -> Kept:
    """Room for keys or values of `width` tokens."""
    return _placed(keep(jnp.zeros((rows, heads, width, head_width)), dtype))


def write(kept: Kept, x: Float[Array, "b k e"], step: Int[Array, "*b"]) -> Kept:
    """With the keys or values of one more token a row, at the common place `step` [] or at each row's own [B]; a place past
    the end is not written by the latter, and by the former instead of the last."""
    new = keep(x[:, :, None], "int8" if kept.scale is not None else str(kept.values.dtype))
    if not step.ndim:
        return jax.tree.map(lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, step, axis=2), kept, new)
    rows = jnp.arange(x.shape[0])
    return jax.tree.map(lambda old, one: old.at[rows, :, step].set(one[:, :, 0], mode="drop"), kept, new)


def scores(query: Float[Array, "b k m e"], keys: Kept) -> Float[Array, "b k m s"]:
    """Products of queries and keys, float32."""
    operand = _operand(keys)
    products = jnp.matmul(query.astype(operand.dtype), operand.swapaxes(2, 3), preferred_element_type=jnp.float32)
    return products if keys.scale is None else products * keys.scale[:, :, None]


def mixed(weights: Float[Array, "b k m s"], values: Kept) -> Float[Array, "b k m e"]:
    """Sums of values by weight, float32."""
    operand = _operand(values)
    weights = weights if values.scale is None else weights * values.scale[:, :, None]
    return jnp.matmul(weights.astype(operand.dtype), operand, preferred_element_type=jnp.float32)


def _operand(kept: Kept) -> jax.Array:
    # A CPU has no fast product of many small narrow matrices: there the cache saves memory, not time.
    if kept.values.dtype == jnp.float32 or jax.default_backend() == "cpu":
        return kept.values.astype(jnp.float32)
    return kept.values.astype(jnp.bfloat16)


def take(tree: Any, rows: Int[Array, " m"]) -> Any:
    """Some rows of a part of the cache, in this order."""
    return _placed(jax.tree.map(lambda x: x[rows], tree))


def pick(tree: Any, place: Int[Array, "b r"]) -> Any:
    """The tokens of each row that stand in these places of it."""
    rows = jnp.arange(place.shape[0])[:, None]
    return _placed(jax.tree.map(lambda x: x[rows, :, place].swapaxes(1, 2), tree))


def put(tree: Any, rows: Int[Array, " m"], part: Any) -> Any:
    """A part of the cache with `part` in the place of some rows; a row past the end is left out."""
    return _placed(jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), tree, part))


def grow(tree: Any, extra: int) -> Any:
    """With room for so many tokens more."""
    return _placed(jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), *((0, 0),) * (x.ndim - 3))), tree))


def _placed(tree: Any) -> Any:
    """Split over the devices by row and head; else every device would hold all of it."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch", *("kv_heads", None, None)[: x.ndim - 1]), tree)
