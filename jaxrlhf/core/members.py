"""Ensembles as one program: trees whose leaves hold all members stacked along the first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def stack(trees: Sequence[Any]) -> Any:
    """Members' trees as one tree of leaves [M, ...]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def one(tree: Any, member: int) -> Any:
    """One member's own tree."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


def each(function: Callable[..., Any], *stacked: Any) -> Any:
    """`function` of every member's arguments, the results stacked along the first axis; under vmap, on a CPU in a loop."""
    # A CPU runs products of two matrices in bfloat16, but not those of stacks, which a vmap would make of them.
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda arguments: function(*arguments), stacked)
    return jax.vmap(function)(*stacked)
