"""The MLP of a layer as a mixture of experts: a router gives each token to k of X gated MLPs, and none is ever dropped.

A token's places, k to each, are put into rows sorted by expert, and every product is one over groups of these rows. So what
comes out for a token does not depend on the others in the batch: a row decoded from a cache, alone, or packed with others
gives the same numbers. On a mesh each device sorts its own tokens and holds its part of the width F of all experts (`tensor`);
weights are gathered over `fsdp` as those of any layer are. The axis `expert` keeps experts apart: a device has whole ones, X
over the size of the axis, and tokens travel in the place of weights. The devices of the axis gather their tokens, narrow as
products read them, and the choices that each made of its own; each device computes what its experts make of all of them, and
the sums are scattered back in float32. So a token's numbers are the same to rounding, and none is dropped however many go to
one expert, which an exchange in places of a fixed number could not say. Gathered are A tokens for each of a device's own where
at best min(k, A) need travel, A the size of the axis. Rows are sorted a device's tokens at a time where these are many
(`AT_ONCE`), since the room that sorted rows take must be that of the case that all of them go to one device's experts.

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
        "router": ParamSpec((c.layers, c.width, c.experts), ("layers", "embed", None), sharding.normal(0.02)),
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
    shared = x.shape[0] % sharding.ways() == 0  # few rows: each device has all
    rows = sharding.partition_spec(("batch",) if shared else ())
    # Of the axes that split a weight those stay that split its width F and the experts: a device has tokens for all of D.
    kept = {
        name: sharding.partition_spec(tuple(axis if axis in ("mlp", "expert") else None for axis in spec.axes[1:]))
        for name, spec in specs(config).items()
    }

    def part(weights: dict[str, Any], x: jax.Array) -> jax.Array:
        if mesh.shape["expert"] == 1:
            return jax.lax.psum(_mlp(config, weights, x, blocks), sharding.RULES["mlp"])
        return _apart(config, weights, x, blocks, shared)

    # Unchecked: what varies over which axis cannot be said of a loop's zeros without naming the mesh inside of it.
    return jax.shard_map(part, in_specs=(kept, rows), out_specs=rows, check_vma=False)(weights, x)


def _mlp(config, weights, x, blocks):
    """Of the part of F that is here."""
    tokens = x.reshape(-1, x.shape[-1])
    return _mixed(config, blocks, weights, tokens, *route(config, weights["router"], tokens)).reshape(x.shape)


AT_ONCE = 1024  # tokens of a device: of no more, those of all devices that keep experts apart are sorted together


def _apart(config, weights, x, blocks, shared):
    """Of whole experts, those that are here of all that the devices of the mesh axis `expert` have together. `shared`: these
    devices have the tokens in parts; else each has all."""
    axis, here = sharding.RULES["expert"], weights["gate"].shape[0]
    tokens = x.reshape(-1, x.shape[-1])
    own, parts = tokens.shape[0], config.experts // here
    chosen, weight = route(config, weights["router"], tokens)  # before they are narrow
    if shared:
        tokens = _to_all(jnp.dtype(config.dtype), axis, tokens)
        chosen, weight = (jax.lax.all_gather(each, axis, tiled=True) for each in (chosen, weight))
    chosen = chosen - here * jax.lax.axis_index(axis)
    given = tokens, jnp.where((chosen >= 0) & (chosen < here), chosen, here), weight

    @functools.partial(jax.checkpoint, prevent_cse=False)  # else the backward pass would keep sorted rows of all parts
    def mixed(given):
        return _mixed(config, blocks, weights, *given)

    if shared and own > AT_ONCE:
        one_by_one = jax.tree.map(lambda each: each.reshape(parts, own, -1), given)
        out: jax.Array = jax.lax.map(mixed, one_by_one)
        out = out.reshape(-1, x.shape[-1])
    else:
        out = mixed(given)
    if shared:
        return jax.lax.psum(jax.lax.psum_scatter(out, axis, tiled=True), sharding.RULES["mlp"]).reshape(x.shape)
    return jax.lax.psum(out, (axis, sharding.RULES["mlp"])).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_all(dtype, axis, x):
    """The tokens of all devices of a mesh axis, sent in this type; their gradients come back in float32."""
    return jax.lax.all_gather(x.astype(dtype), axis, tiled=True).astype(jnp.float32)


_to_all.defvjp(
    lambda dtype, axis, x: (_to_all(dtype, axis, x), None),
    lambda dtype, axis, _, g: (jax.lax.psum_scatter(g, axis, tiled=True),),
)


def _mixed(config, blocks, weights, tokens, chosen, weight):
    """The sum of what the experts that are here make of tokens [N, D]. `chosen` [N, k] counts these from 0; a number past them
    is one that lies elsewhere, whose share in the sum is 0."""
    k, size = config.experts_per_token, _block_size(chosen.size, config.experts) if blocks else 1
    here = weights["gate"].shape[0]
    apart = here < config.experts
    places = _places(chosen.reshape(-1), here, size, apart)
    given = jnp.repeat(tokens, k, axis=0)
    mine = (chosen < here)[..., None]
    if apart:  # 0, whatever a product over groups makes of rows past all groups
        given = jnp.where(mine.reshape(-1, 1), given, 0.0)
    # Every place is written and read once: said, because else the gradient would add, on a GPU in a new order each time.
    rows = jnp.zeros((places.total, tokens.shape[-1])).at[places.of].set(given, unique_indices=True)

    def product(rows, weights):  # named for `TransformerConfig.remat`
        dtype = jnp.dtype(config.dtype)
        if not blocks:
            return checkpoint_name(_ragged(dtype, rows, weights, places.groups), "product")
        return checkpoint_name(_in_blocks(dtype, rows, weights, places.groups, places.used), "product")

    inner = gated(config, product(rows, weights["gate"]), product(rows, weights["up"]))
    out = product(inner, weights["down"]).at[places.of].get(unique_indices=True).reshape(*chosen.shape, -1)
    return (weight[..., None] * (jnp.where(mine, out, 0.0) if apart else out)).sum(1)


class _Places(NamedTuple):
    """Where the places of all tokens stand among the rows that are sorted by expert."""

    of: jax.Array  # [N * k] the row of each
    total: int  # rows
    groups: jax.Array  # rows of each expert [X] or, in blocks, the expert of each block
    used: jax.Array | None = None  # of the blocks the first so many, where those after them are of experts elsewhere


def _places(chosen: Int[Array, " m"], here: int, size: int, apart: bool = False) -> _Places:
    """Rows sorted by expert; with `size` > 1 each expert's fill whole blocks of this size, as many as there can be. With
    `apart` there are more experts than are here: their rows, chosen = `here`, come last, and no product is taken of them."""
    m, experts = chosen.shape[0], here + apart
    sizes = jnp.bincount(chosen, length=experts)
    order = jnp.argsort(chosen, stable=True)
    place = jnp.zeros(m, jnp.int32).at[order].set(jnp.arange(m, dtype=jnp.int32), unique_indices=True)
    if size == 1:
        return _Places(place, m, sizes[:here])
    full = -(-sizes // size)
    ends = jnp.cumsum(full)
    place = place - (jnp.cumsum(sizes) - sizes)[chosen] + size * (ends - full)[chosen]
    count = min(m, (m + experts * (size - 1)) // size)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), experts - 1)
    return _Places(place, count * size, owner, ends[here - 1] if apart else None)


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
def _in_blocks(dtype, rows, weights, groups, used):
    return _in_blocks_forward(dtype, rows, weights, groups, used)[0]


def _in_blocks_forward(dtype, rows, weights, groups, used):
    # Narrow before the loop, and so before they are gathered over `fsdp`.
    rows, weights = rows.astype(dtype).reshape(len(groups), -1, rows.shape[-1]), weights.astype(dtype)

    def block(x, expert):
        return products.product(dtype.name, x, weights[expert])

    if used is None:
        _, out = jax.lax.scan(lambda _, xs: (None, block(*xs)), None, (rows, groups))
    else:
        out = jnp.zeros((*rows.shape[:2], weights.shape[-1]), jnp.float32)
        out = jax.lax.fori_loop(0, used, lambda i, out: out.at[i].set(block(rows[i], groups[i])), out)
    return out.reshape(-1, out.shape[-1]), (rows, weights, groups, used)


def _in_blocks_backward(dtype, residual, g):
    # That of the scan would add a gradient of all experts at every block.
    rows, weights, groups, used = residual
    g = g.reshape(*rows.shape[:2], -1)

    def block(slope, xs):
        x, g, expert = xs
        _, pull = jax.vjp(functools.partial(products.product, dtype.name), x, weights[expert])
        dx, dweight = pull(g)
        return slope.at[expert].add(dweight), dx

    def one(i, sums):
        slope, dx = block(sums[0], (rows[i], g[i], groups[i]))
        return slope, sums[1].at[i].set(dx)

    start = jnp.zeros(weights.shape, jnp.float32)
    if used is None:
        slope, back = jax.lax.scan(block, start, (rows, g, groups))
    else:
        slope, back = jax.lax.fori_loop(0, used, one, (start, jnp.zeros(rows.shape, jnp.float32)))
    return back.reshape(-1, back.shape[-1]), slope, None, None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)
