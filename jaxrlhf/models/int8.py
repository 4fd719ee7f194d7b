"""Weights in eight bits, for models that are read and not trained: the base under adapters, and the reference.

Each column of a weight matrix [in, out] is an int8 times one float32, the column's largest magnitude / 127; so is each row of
the embedding table, which makes it one number for each logit of a tied head. Norms, biases and positions stay as they are. A
product reads the int8, widened to `config.dtype` one matrix at a time, and multiplies each sum by its scale
(`products.Quantised`): y = (x Q) * scale, which is x (Q * scale) but for the last bits. No gradient reaches the weight.

Not Google's qwix: it works by intercepting the operations of Flax modules, and ours are functions over a tree; of what is left,
the rounding is the three lines of `_narrow`, and the product must be our own for its gradient and its CPU layouts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.core import sharding
from jaxrlhf.models import products
from jaxrlhf.models.products import Quantised

LARGEST = 127  # of either sign: -128 is not used, so that a weight and its negative round alike
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")


def quantise(params: Any, places: Any = None) -> Any:
    """The parameters of a transformer, alone or within a larger tree, with `Quantised` in place of its weight matrices.

    With `places`, the sharding of each parameter, each is put there before it is narrowed, and dropped before the next: no
    device holds more than one of them wide. What is in eight bits already stays as it is.

    A weight that is not finite makes its column NaN.

    Source: Dettmers et al. 2022 (arXiv 2208.07339), section 2.1, absmax quantisation, vector-wise for the weights alone.

    Raises:
        ValueError: weights of experts, whose products do not read eight bits.
    """

    def one(path: tuple, leaf: Any, *place: Any) -> Any:
        if isinstance(leaf, Quantised):
            return leaf
        axis = _summed(path)
        if axis is not None and leaf.ndim != (3 if path[-1].key in MATRICES else 2):
            raise ValueError(
                f"{sharding.path_name(path)} {list(leaf.shape)}: only matrices, alone or one a layer, have eight bits; "
                "keep this model in float32"
            )
        if place:
            leaf = jax.device_put(leaf, *place)
        return leaf if axis is None else _narrow(leaf, axis)

    rest = () if places is None else (places,)
    return jax.tree_util.tree_map_with_path(one, params, *rest, is_leaf=products.is_weight)


def _summed(path: tuple) -> int | None:
    """The axis of a parameter that a product sums over; None: it is no operand of one."""
    names = [key.key for key in path]
    if names[-1] == "embed":
        return -1
    return -2 if names[-1] == "head" or (names[-1] in MATRICES and names[-2:-1] == ["layers"]) else None


def _narrow(weight: jax.Array, axis: int) -> Quantised:
    scale = jnp.abs(weight).max(axis, keepdims=True).astype(jnp.float32) / LARGEST
    scale = jnp.where(scale == 0, 1.0, scale)  # of a column of zeros; NaN stays
    return Quantised(jnp.round(weight / scale).astype(jnp.int8), scale)


def inside(params: Any) -> list[str]:
    """Names of the parameters that are in eight bits, with an adapter beside them or alone."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, Quantised))
    return [sharding.path_name(path) for path, leaf in leaves if isinstance(leaf, Quantised)]


def refuse(params: Any, done: str) -> None:
    """Raise where a parameter is in eight bits, which cannot be `done` (trained, saved).

    Raises:
        ValueError: it names the first such parameter.
    """
    if names := inside(params):
        raise ValueError(
            f"parameter {names[0]} is in eight bits (int8) and cannot be {done}: int8 is for frozen weights. Train an adapter "
            "over it (lora rank > 0), or the float weights; lora.merge makes plain weights of a base and its adapter"
        )
