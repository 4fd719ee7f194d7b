"""The MLP of a layer as a mixture of experts: a router gives each token to k of X gated MLPs, and none is ever dropped.

A token's places, k to each, are put into rows sorted by expert, and every product is one over groups of these rows. So what
comes out for a token does not depend on the others in the batch: a row decoded from a cache, alone, or packed with others
gives the same numbers. On a mesh each device sorts its own tokens (`data` and `fsdp` split the batch) and holds its part of
the width F of all experts (`tensor`); weights are gathered over `fsdp` as those of any layer are, and no token travels.

A product over such groups is in blocks: the rows of each expert are padded with zeros to whole blocks, and a loop multiplies
one block after another with the weights of its expert. That is at most a quarter more rows, or 8 to each expert where tokens
are few. On a TPU it is `jax.lax.ragged_dot`. Elsewhere XLA has none and makes it one product of every row with every expert:
X times the work, and the rows X times in memory (seen in programs of jax 0.10.2 for an H100, and of 0.10.2 and 0.12 for a CPU,
which took 13 to 17 times as long as a dense product at X = 16). Blocks take a CPU about twice as long as a dense MLP.

Source: Shazeer et al. 2017, arXiv 1701.06538; Jiang et al. 2024 (Mixtral), arXiv 2401.04088, section 2.1. Blocks: Gale et al.
2022 (MegaBlocks), arXiv 2211.15841.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import products
from jaxrlhf.models.config import TransformerConfig


def specs(config: TransformerConfig) -> dict[str, ParamSpec]:
    """The experts' parameters of all layers, stacked."""
    c = config

    def stacked(inner: int, out: int, axes: tuple[str, str], std: float) -> ParamSpec:
        return ParamSpec((c.layers, c.experts, inner, out), ("layers", "expert", *axes), sharding.normal(std))

    return {
        "router": ParamSpec((c.layers, c.width, c.experts), ("layers", "embed", "expert"), sharding.normal(0.02)),
        "gate": stacked(c.width, c.mlp_width, ("embed", "mlp"), c.width**-0.5),
        "up": stacked(c.width, c.mlp_width, ("embed", "mlp"), c.width**-0.5),
        "down": stacked(c.mlp_width, c.width, ("mlp", "embed"), (c.mlp_width * 2 * c.layers) ** -0.5),
    }


def gated(config: TransformerConfig, gate: Float[Array, "*s f"], up: Float[Array, "*s f"]) -> Float[Array, "*s f"]:
    """The inner states of SwiGLU or GEGLU. Source: Shazeer 2020, arXiv 2002.05202, equation 6."""
    return (jax.nn.silu(gate) if config.mlp == "swiglu" else jax.nn.gelu(gate, approximate=True)) * up


def decode_weights(config: TransformerConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """The experts as products read them, in `config.dtype`; the router stays as it is."""
    return {name: w if name == "router" else w.astype(config.dtype) for name, w in weights.items()}


def route(
    config: TransformerConfig, router: Float[Array, "d x"], x: Float[Array, "n d"]
) -> tuple[Int[Array, "n {config.experts_per_token}"], Float[Array, "n {config.experts_per_token}"]]:
    """Each token's experts, the likeliest first and of equals the lower number, and their weights.

    All in float32 whatever `config.dtype`: with narrow operands a token would change its experts between sampler and learner.
    """
    probs = jax.nn.softmax(jnp.matmul(x, router, precision="highest"), axis=-1)
    weight, chosen = jax.lax.top_k(probs, config.experts_per_token)
    if config.renormalise_experts:
        weight = weight / weight.sum(-1, keepdims=True)
    return chosen, weight


def load(chosen: Int[Array, "*s k"], experts: int, mask: Bool[Array, "*s"] | None = None) -> Float[Array, " {experts}"]:
    """Share of the places of all tokens (in the mask) that each expert has; 1 / X everywhere where they are in balance."""
    counted = jnp.ones(chosen.shape) if mask is None else jnp.broadcast_to(mask[..., None], chosen.shape).astype(jnp.float32)
    found = jnp.zeros(experts).at[chosen].add(counted)
    return found / jnp.maximum(found.sum(), 1)


def mlp(
    config: TransformerConfig, weights: dict[str, Any], x: Float[Array, "b *s d"], blocks: bool | None = None
) -> Float[Array, "b *s d"]:
    """The sum of what each token's experts make of it, by their weights. `weights`: parameters of one layer. `blocks`: the
    form of the products; None: as the backend asks."""
    blocks = jax.default_backend() != "tpu" if blocks is None else blocks
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return _mlp(config, weights, x, blocks)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = sharding.partition_spec(("batch",) if x.shape[0] % ways == 0 else ())  # few rows: each device computes all
    # Of the axes that split a weight only `tensor` stays: every device has tokens for all experts.
    kept = {
        name: sharding.partition_spec(tuple(axis if axis == "mlp" else None for axis in spec.axes[1:]))
        for name, spec in specs(config).items()
    }

    def part(weights: dict[str, Any], x: jax.Array) -> jax.Array:
        return jax.lax.psum(_mlp(config, weights, x, blocks), sharding.RULES["mlp"])

    # Unchecked: what varies over which axis cannot be said of a loop's zeros without naming the mesh inside of it.
    return jax.shard_map(part, in_specs=(kept, rows), out_specs=rows, check_vma=False)(weights, x)


def _mlp(config, weights, x, blocks):
    """Of the part of F that is here."""
    tokens = x.reshape(-1, x.shape[-1])
    chosen, weight = route(config, weights["router"], tokens)
    k, size = config.experts_per_token, _block_size(chosen.size, config.experts) if blocks else 1
    places = _places(chosen.reshape(-1), config.experts, size)
    # Every place is written and read once: said, because else the gradient would add, on a GPU in a new order each time.
    rows = jnp.zeros((places.total, x.shape[-1])).at[places.of].set(jnp.repeat(tokens, k, axis=0), unique_indices=True)

    def product(rows, weights):  # named for `TransformerConfig.remat`
        form = _in_blocks if blocks else _ragged
        return checkpoint_name(form(jnp.dtype(config.dtype), rows, weights, places.groups), "product")

    inner = gated(config, product(rows, weights["gate"]), product(rows, weights["up"]))
    out = product(inner, weights["down"]).at[places.of].get(unique_indices=True).reshape(*chosen.shape, -1)
    return (weight[..., None] * out).sum(1).reshape(x.shape)


class _Places(NamedTuple):
    """Where the places of all tokens stand among the rows that are sorted by expert."""

    of: jax.Array  # [N * k] the row of each
    total: int  # rows
    groups: jax.Array  # rows of each expert [X] or, in blocks, the expert of each block


def _places(chosen: Int[Array, " m"], experts: int, size: int) -> _Places:
    """Rows sorted by expert; with `size` > 1 each expert's fill whole blocks of this size, as many as there can be."""
    m = chosen.shape[0]
    sizes = jnp.bincount(chosen, length=experts)
    order = jnp.argsort(chosen, stable=True)
    place = jnp.zeros(m, jnp.int32).at[order].set(jnp.arange(m, dtype=jnp.int32), unique_indices=True)
    if size == 1:
        return _Places(place, m, sizes)
    full = -(-sizes // size)
    ends = jnp.cumsum(full)
    place = place - (jnp.cumsum(sizes) - sizes)[chosen] + size * (ends - full)[chosen]
    count = min(m, (m + experts * (size - 1)) // size)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), experts - 1)
    return _Places(place, count * size, owner)


def _block_size(m: int, experts: int) -> int:
    """A quarter of what an expert has on average, so that the padding is at most a quarter of the rows, but no block so small
    that reading the weights is all it does, and none larger than fills a GPU."""
    return max(8, min(1024, m // (4 * experts)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(dtype, rows, weights, groups):
    return _ragged_forward(dtype, rows, weights, groups)[0]


def _ragged_forward(dtype, rows, weights, groups):
    rows, weights = rows.astype(dtype), weights.astype(dtype)
    return jax.lax.ragged_dot(rows, weights, groups, preferred_element_type=jnp.float32), (rows, weights, groups)


def _ragged_backward(dtype, residual, g):
    # The rule that autodiff derives would multiply a float32 gradient with narrow operands, in float32.
    rows, weights, groups = residual
    g = g.astype(dtype)
    back = jax.lax.ragged_dot(g, weights.swapaxes(1, 2), groups, preferred_element_type=jnp.float32)
    over_rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    slope = jax.lax.ragged_dot_general(rows, g, groups, over_rows, preferred_element_type=jnp.float32)
    return back, slope, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(dtype, rows, weights, groups):
    return _in_blocks_forward(dtype, rows, weights, groups)[0]


def _in_blocks_forward(dtype, rows, weights, groups):
    # Narrow before the loop, and so before they are gathered over `fsdp`.
    rows, weights = rows.astype(dtype).reshape(len(groups), -1, rows.shape[-1]), weights.astype(dtype)
    _, out = jax.lax.scan(lambda _, xs: (None, products.product(dtype.name, xs[0], weights[xs[1]])), None, (rows, groups))
    return out.reshape(-1, out.shape[-1]), (rows, weights, groups)


def _in_blocks_backward(dtype, residual, g):
    # That of the scan would add a gradient of all experts at every block.
    rows, weights, groups = residual

    def block(slope, xs):
        x, g, expert = xs
        _, pull = jax.vjp(functools.partial(products.product, dtype.name), x, weights[expert])
        dx, dweight = pull(g)
        return slope.at[expert].add(dweight), dx

    start = jnp.zeros(weights.shape, jnp.float32)
    slope, back = jax.lax.scan(block, start, (rows, g.reshape(*rows.shape[:2], -1), groups))
    return back.reshape(-1, back.shape[-1]), slope, None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)
