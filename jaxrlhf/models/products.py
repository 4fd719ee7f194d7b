"""The product of activations and a weight with narrow operands and float32 sums, its gradient, and what a CPU needs for it.

A weight is an array, or `Quantised`: a frozen one in eight bits (`models/int8.py`), or `Adapted`: a frozen one of either kind
with a low-rank adapter beside it (`models/lora.py`).

On a CPU the backward pass of a language model is 2 to 3 times slower if left to autodiff and XLA: see the comments here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxrlhf.core import sharding


@struct.dataclass
class Quantised:
    """values * scale, a frozen weight or a stack of them: one scale for each output of a product, which it multiplies."""

    values: jax.Array  # int8 [..., in, out], or a table's [V, D]
    scale: jax.Array  # float32 [..., 1, out], or a table's [V, 1]


@struct.dataclass
class Adapted:
    """W + scale * A B, the weight of a linear layer or of a stack of them. Source: Hu et al. 2021, equation 3."""

    weight: jax.Array | Quantised  # W [..., in, out]
    a: jax.Array  # [..., in, r]
    b: jax.Array  # [..., r, out]
    scale: float = struct.field(pytree_node=False)


Weight = jax.Array | Quantised | Adapted
Axes = tuple[str | None, str | None]  # logical axes of a weight, as `ParamSpec` has them


def product(
    dtype: str,
    x: Float[Array, "*s i"],
    weight: Float[Array, "a b"] | Quantised | Adapted,
    flipped: bool = False,
    axes: Axes | None = None,
) -> Float[Array, "*s o"]:
    """x [..., in] @ weight [in, out] (`flipped`: [out, in]), operands rounded to `dtype`, sums and result float32.

    Of `axes` those that the mesh axis `fsdp` splits are gathered before the product, narrow, and the gradient is split so
    again. Left to the partitioner, a backward pass with recomputation would gather a weight twice, once to recompute and once,
    transposed, for the gradient of x.
    """
    if isinstance(weight, Adapted):  # never flipped: an embedding table has no adapter
        inner, outer = ((axes[0], None), (None, axes[1])) if axes else (None, None)
        low = product(dtype, product(dtype, x, weight.a, axes=inner), weight.b, axes=outer)
        return product(dtype, x, weight.weight, axes=axes) + weight.scale * low
    # Flattened: the gradient of a 3-D product contracts two axes, which XLA's CPU backend transposes first.
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, Quantised):
        shape = weight.values.shape
        values = _gathered(weight.values, axes) if axes else weight.values
        result: jax.Array = _matmul_int8(jnp.dtype(dtype), flipped, rows, values, weight.scale)
    else:
        shape = weight.shape
        result = _matmul(jnp.dtype(dtype), flipped, axes, rows, weight)
    # Named for `TransformerConfig.remat`.
    return checkpoint_name(result, "product").reshape(*x.shape[:-1], shape[0 if flipped else 1])


def look_up(table: Float[Array, "v d"] | Quantised, ids: Int[Array, "*s"]) -> Float[Array, "*s d"]:
    """Rows of a table, float32. Ids outside read its first or last row."""
    # Clipped, because the default fills with NaN, which 0 * NaN would spread.
    take = functools.partial(jnp.take, indices=ids, axis=0, mode="clip")
    if isinstance(table, Quantised):
        return take(table.values).astype(jnp.float32) * jax.lax.stop_gradient(take(table.scale))
    return take(table).astype(jnp.float32)  # of a table kept in bfloat16


def is_weight(x: Any) -> bool:
    """Whether this node of a tree is a weight that is more than one array."""
    return isinstance(x, Quantised | Adapted)


def whole(weight: Weight) -> jax.Array:
    """The weight as one array: itself, values * scale, or W + scale * A B."""
    if isinstance(weight, Quantised):
        return weight.values * weight.scale
    if isinstance(weight, Adapted):
        return whole(weight.weight) + weight.scale * jnp.matmul(weight.a, weight.b, precision="highest")
    return weight


def for_decoding(weight: Weight, dtype: str) -> Weight:
    """The weight as decoding reads it: one array in `dtype`, but one in eight bits as it is, with its adapter beside it.

    Merged, it would take the memory that eight bits save, and be rounded anew, apart from what the learner reads.
    """
    frozen = weight.weight if isinstance(weight, Adapted) else weight
    return weight if isinstance(frozen, Quantised) else whole(weight).astype(dtype)


def table_for_decoding(table: jax.Array | Quantised, dtype: str) -> jax.Array | Quantised:
    """A tied embedding table [V, D] as a head [D, V] of its own."""
    if isinstance(table, Quantised):
        return Quantised(table.values.T, table.scale.T)
    return transpose(table.astype(dtype))


def gathered(tree: Any, axes: Any) -> Any:
    """Weights with every device holding what the mesh axis `fsdp` splits; where it splits nothing, the tree as it is.

    `axes`: the logical axes of each.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return tree

    def one(weight: Weight, split: tuple[str | None, ...]) -> Weight:
        if isinstance(weight, Adapted):
            return dataclasses.replace(weight, weight=one(weight.weight, split))
        if isinstance(weight, Quantised):
            return Quantised(_gathered(weight.values, split), _gathered(weight.scale, split))
        return _gathered(weight, split)

    return jax.tree.map(one, tree, axes, is_leaf=is_weight)


def _gathered(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    kept = tuple(None if axis is not None and sharding.RULES[axis] == "fsdp" else axis for axis in axes)
    return x if kept == axes else _pinned(kept, axes, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pinned(now, before, x):
    """x with its axes split as `now`, and its gradient as `before`: that of a constraint would be gathered too."""
    del before
    return _constrained(x, now)


_pinned.defvjp(lambda now, before, x: (_constrained(x, now), None), lambda now, before, _, g: (_constrained(g, before),))


def _constrained(x, axes):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    # An axis that the mesh does not divide is whole everywhere (`sharding.WHOLE_IF_UNEVEN`), and so is one of size 1.
    divided = (None if size % sharding.parts(axis, mesh) else axis for size, axis in zip(x.shape, axes, strict=True))
    return sharding.constrain(x, *divided)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _matmul(dtype, flipped, axes, x, weight):
    return _matmul_forward(dtype, flipped, axes, x, weight)[0]


def _matmul_forward(dtype, flipped, axes, x, weight):
    x, weight = x.astype(dtype), weight.astype(dtype)
    if axes is not None:
        weight = _gathered(weight, axes)
    return _dot(x, transpose(weight) if flipped else weight), (x, weight)


def _matmul_backward(dtype, flipped, axes, residual, g):
    # The rule that autodiff derives would multiply a float32 gradient with narrow operands, in float32.
    x, weight = residual
    g = g.astype(dtype)
    dx = _dot(g, weight if flipped else transpose(weight))
    # One operand must be moved in memory: the narrower.
    wide = x.shape[1] > g.shape[1]
    dweight = _dot(transpose(g), x) if wide else _dot(transpose(x), g)
    dweight = dweight if wide == flipped else dweight.T
    return dx, dweight if axes is None else _constrained(dweight, axes)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul_int8(dtype, flipped, x, values, scale):
    return _matmul_int8_forward(dtype, flipped, x, values, scale)[0]


def _matmul_int8_forward(dtype, flipped, x, values, scale):
    # All of int8 is exact in bfloat16. The scale is of an output, so it multiplies the sum and not each weight.
    x, wide = _widened(dtype, x.astype(dtype), values)
    return _dot(x, transpose(wide) if flipped else wide) * (scale.T if flipped else scale), (values, scale)


def _matmul_int8_backward(dtype, flipped, residual, g):
    """To x alone: the weight is frozen."""
    values, scale = residual
    g, wide = _widened(dtype, (g * (scale.T if flipped else scale)).astype(dtype), values)
    return _dot(g, wide if flipped else transpose(wide)), None, None


_matmul_int8.defvjp(_matmul_int8_forward, _matmul_int8_backward)


def _widened(dtype, x, values):
    # Tied to x, which every turn of a loop has anew: else XLA takes the conversion out of the loop over tokens, and all wide
    # weights stand in memory at once.
    x, values = jax.lax.optimization_barrier((x, values))
    return x, values.astype(dtype)


def _dot(a, b):
    result = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    # The barrier keeps a later transposition of the result from being folded into the product, which XLA's CPU backend
    # does to narrow operands too and then cannot run (jax 0.10.2 and 0.12: "Unsupported element type for DotThunk").
    return jax.lax.optimization_barrier(result) if jax.default_backend() == "cpu" else result


def transpose(x: Float[Array, "a b"]) -> Float[Array, "b a"]:
    """x.T, on a CPU really moved in memory.

    A CPU product of bfloat16 is fast for row-major operands only: XLA widens all others to float32, four times slower, and
    decides that before it would insert this copy itself.
    """
    if jax.default_backend() != "cpu":
        return x.T
    return _moved(x) if jax.sharding.get_abstract_mesh().size <= 1 else _moved_on_mesh(x)


def _moved(x):
    rows = Layout(major_to_minor=(0, 1))
    # Both sides pinned: else x itself may be computed by columns, so that nothing need be moved, and that slowly.
    return with_layout_constraint(with_layout_constraint(x, rows).T, rows)


@custom_vmap
def _moved_on_mesh(x):
    return _moved_in_parts(x)


@_moved_on_mesh.def_vmap
def _(size, batched, x):
    """Under vmap, which the partitioned form does not know, without the copy."""
    del size, batched
    return x.swapaxes(-1, -2), True


# The partitioner of jax 0.10 would gather the operand of a layout constraint on every device: told how it is split.
@custom_partitioning
def _moved_in_parts(x):
    return _moved(x)


def _flipped_sharding(mesh, operands, result):
    del result
    spec = (*operands[0].sharding.spec, None, None)
    return NamedSharding(mesh, PartitionSpec(spec[1], spec[0]))


def _partition(mesh, operands, result):
    return mesh, _moved, _flipped_sharding(mesh, operands, result), (operands[0].sharding,)


_moved_in_parts.def_partition(partition=_partition, infer_sharding_from_operands=_flipped_sharding, sharding_rule="i j -> j i")
