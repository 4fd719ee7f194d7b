"""Bytes before a run: what training and sampling will hold, by role, from shapes and shardings alone.

A tree's leaves are arrays, or `jax.ShapeDtypeStruct`s for a model that is not there (`sharding.abstract`): nothing here puts
anything on a device. Parameters, gradients, the optimizer's moments, frozen models, the weights that are sampled with and
caches are counted exactly; activations and logits are estimated (`update`, `scoring`, `prefill`), since what a program needs
beside its arguments the compiler alone knows: `compiled`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.core import offload, sharding
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models.config import GATED, TransformerConfig
from jaxrlhf.models.model import EXACT, CacheConfig, Model, decode_changes
from jaxrlhf.training import step
from jaxrlhf.training.flops import Pass

When = Literal["always", "sampling", "scoring", "update"]
TOGETHER = get_args(When)[1:]  # of the rest, one after another


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of whole arrays, and of the parts of them that one device holds (the same on each)."""

    total: int = 0
    device: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.total + other.total, self.device + other.device)


@dataclasses.dataclass(frozen=True)
class Row:
    role: str  # policy, critic, reference, ...
    kind: str  # parameters, gradient, moments, ...
    when: When  # it stands in memory
    size: Size


def size(tree: Any) -> Size:
    """Of all leaves of a tree; one without a sharding stands whole on its device."""
    return sum((_leaf(x) for x in jax.tree.leaves(tree)), Size())


def _leaf(x: Any, place: jax.sharding.Sharding | None = None) -> Size:
    place = place or getattr(x, "sharding", None)
    shape, width = tuple(x.shape), jnp.dtype(x.dtype).itemsize
    if getattr(place, "memory_kind", None) == offload.KIND:
        return Size(math.prod(shape) * width, 0)
    return Size(math.prod(shape) * width, math.prod(place.shard_shape(shape) if place else shape) * width)


def training(
    params: dict[str, Any], optimizer: optax.GradientTransformation, average: bool = False, microbatches: int = 1
) -> tuple[Row, ...]:
    """What an update holds of each role of `params` ({"policy": ..., "critic": ...}; a model alone is the policy): parameters,
    moments, the gradient (of several microbatches their sum and that of one), and with `average` an average of the parameters.
    """
    roles = params if "policy" in params or "trunk" in params else {"policy": params}
    state = jax.eval_shape(optimizer.init, params)
    known = dict(jax.tree_util.tree_leaves_with_path(params))
    moments = dict.fromkeys(roles, Size())
    for owner, leaf in zip(step.owners(state, params), jax.tree.leaves(state), strict=True):
        role = owner[0].key if owner is not None and roles is params else next(iter(roles))  # counts go with the first role
        moments[role] += _leaf(leaf, None if owner is None else step.moment_sharding(leaf, known[owner]))
    rows = []
    for role, tree in roles.items():
        own = size(tree)
        rows += [
            Row(role, "parameters", "always", own),
            Row(role, "gradient", "update", own + own if microbatches > 1 else own),
        ]
        rows += [Row(role, "moments", "always", moments[role])]
        rows += [Row(role, "average", "always", own)] if average else []
    return tuple(rows)


def frozen(trees: dict[str, Any]) -> tuple[Row, ...]:
    """What is read and never trained, by role. An array that stands in several roles counts with the first of them."""
    seen: set[int] = set()
    rows = []
    for role, tree in trees.items():
        new = [x for x in jax.tree.leaves(tree) if id(x) not in seen]
        seen |= {id(x) for x in new}
        rows.append(Row(role, "frozen", "always", size(new)))
    return tuple(rows)


def sampling(
    model: Model, policy: Any, spec: SamplingSpec, prompts: tuple[int, int], n: int = 1, cache: CacheConfig = EXACT
) -> tuple[Row, ...]:
    """What drawing n responses to `prompts` (how many at a time, width) holds: the weights as they are sampled with, and the
    cache. `policy` is what `Model` reads, adapters attached. Call it under the mesh of the run.
    """
    weights = jax.eval_shape(model.decode_params, policy)
    # Backwards, so that of a weight and its adapter, which have one name, the weight stays.
    sources = {_names(path): x for path, x in reversed(jax.tree_util.tree_leaves_with_path(policy))}
    copied, mesh = Size(), jax.sharding.get_abstract_mesh()
    gathered = 1 if mesh.empty else mesh.shape["fsdp"]  # over which the sampler's weights are not split
    changed = jax.eval_shape(functools.partial(decode_changes, model), policy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(changed):
        source = _leaf(sources.get(_names(path), sources.get(("embed",), leaf)))  # a tied head is cut as the embedding
        whole = _leaf(leaf).total
        copied += Size(whole, min(whole, whole * gathered * source.device // max(source.total, 1)))
    rows, width = prompts
    tokens, length = jax.ShapeDtypeStruct((rows, width), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)

    def prefill(weights: Any, tokens: jax.Array, length: jax.Array) -> Any:
        return model.prefill(weights, tokens, length, n, spec.max_tokens, cache)[1]

    held = jax.eval_shape(prefill, weights, tokens, length)
    parts = {f"cache of {part}s": held.pop(part) for part in ("prompt", "response") if part in held}  # keys and values
    sizes = {"weights": copied} | {kind: _rows_size(tree) for kind, tree in (parts | {"rest of cache": held}).items()}
    return tuple(Row("sampling", kind, "sampling", size) for kind, size in sizes.items())


def _names(path: tuple) -> tuple[str, ...]:
    """The path of a weight, whether its layers are a stack, a tuple, or have adapters beside them."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _rows_size(tree: Any) -> Size:
    """Of arrays [rows, ...] or [rows, K, ...], split as the sampler splits them."""
    mesh = jax.sharding.get_abstract_mesh()
    total = Size()
    for leaf in jax.tree.leaves(tree):
        axes = ("batch", "kv_heads", None, None) if leaf.ndim == 4 else ()
        place = jax.sharding.NamedSharding(mesh, sharding.partition_spec(axes)) if axes and not mesh.empty else None
        total += _leaf(leaf, place)
    return total


# Arrays of a layer that stand at once, of widths D, H E (queries), K E (keys) and F, float32: fitted to what XLA gives our
# programs on a CPU (`tests/test_plan.py` compares them with it). A gated MLP has three arrays of width F, another one has two.
_LEARNING = {"width": 10, "query": 3, "key": 1, "gated": 7, "mlp": 4}
_READING = {"width": 4, "query": 0, "key": 0, "gated": 3, "mlp": 2}
_LOGITS = {True: 3, False: 2}  # arrays of a block of logits, with the gradient and without


def update(passes: Sequence[Pass], rows: int, width: int, predicted: int, block: int) -> tuple[Row, ...]:
    """What a gradient of `rows` rows of `width` tokens at a time holds beside itself: what the forward pass keeps for the
    backward pass, by `remat` layers one state a layer, by attention its result too, else all (a little more than by dots), and
    the layer at work, or a block of logits, of which there are `predicted` a row (`heads.token_logprobs`). Call it under
    the mesh of the run.
    """
    saved, working = Size(), Size()
    for one in passes:
        layer = _layer(one.shape, rows, width, _LEARNING)
        if one.gradient:
            mixed = one.shape.heads * one.shape.head_width * (one.shape.remat == "attention")
            by_name = one.shape.remat in ("layers", "attention")
            kept = _states(rows, width, one.shape.width + mixed) if by_name else layer
            saved += Size(one.shape.layers * kept.total, one.shape.layers * kept.device)
        logits = _logits(one.shape, rows, predicted, block, True) if one.logits else Size()
        working = max(working, layer + _scores(one.shape, rows, width, 2), logits, key=lambda size: size.device)
    found = [
        Row("activations", "kept for the backward pass", "update", saved),
        Row("activations", "at work in the update", "update", working),
    ]
    return tuple(found)


def scoring(passes: Sequence[Pass], rows: int, width: int, predicted: int, block: int) -> tuple[Row, ...]:
    """What reading `rows` rows at a time holds, one model after another. Call it under the mesh of the run."""
    working = Size()
    for one in passes:
        layer = _layer(one.shape, rows, width, _READING)
        logits = _logits(one.shape, rows, predicted, block, False) if one.logits else Size()
        working = max(working, layer + _scores(one.shape, rows, width, 1), logits, key=lambda size: size.device)
    return (Row("activations", "at work in scoring", "scoring", working),)


def prefill(shape: TransformerConfig, prompts: int, width: int) -> tuple[Row, ...]:
    """What reading prompts holds beside the cache, all of them at once. Call it under the mesh of the run."""
    layer = _layer(shape, prompts, width, _READING) + _scores(shape, prompts, width, 1)
    return (Row("activations", "reading prompts", "sampling", layer),)


def _layer(shape: TransformerConfig, rows: int, width: int, arrays: dict[str, int]) -> Size:
    """Arrays of one layer's states; those of heads and MLP are split over `tensor` too."""
    mlp = arrays["gated" if shape.mlp in GATED else "mlp"] * shape.mlp_width * max(1, shape.experts_per_token)
    query, key = arrays["query"] * shape.heads * shape.head_width, arrays["key"] * shape.kv_heads * shape.head_width
    # Experts that lie on other devices have their tokens sent: those of all of these devices, and what is made of them.
    sent = 2 * _ways("expert") if shape.experts and _ways("expert") > 1 else 0
    own = _states(rows, width, (arrays["width"] + sent) * shape.width)
    return own + _states(rows, width, mlp + query + key, _ways("tensor"))


def _scores(shape: TransformerConfig, rows: int, width: int, arrays: int) -> Size:
    """Attention's scores [B, H, T, T]."""
    return _states(rows, width, arrays * shape.heads * width, _ways("tensor"))


def _logits(shape: TransformerConfig, rows: int, predicted: int, block: int, gradient: bool) -> Size:
    """A block of logits, of as many positions as fit into `block` elements of a device, and what is computed of them."""
    positions = min(predicted, max(1, sharding.ways() * block // (rows * shape.vocab_size)))
    return _states(rows, positions, _LOGITS[gradient] * shape.vocab_size, _ways("tensor"))


def _states(rows: int, width: int, channels: int, ways: int = 1) -> Size:
    total = 4 * rows * width * channels
    return Size(total, total // (sharding.ways() * ways))


def _ways(axis: str) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[axis]


def peak(rows: Sequence[Row]) -> Size:
    """The most that stands at once: what is always there, and the largest of what stands while sampling, scoring, ..."""
    sums = stages(rows)
    return max(sums.values(), key=lambda size: size.device)


def stages(rows: Sequence[Row]) -> dict[When, Size]:
    """What stands in each stage, with what always does."""
    sums = {when: sum((row.size for row in rows if row.when == when), Size()) for when in get_args(When)}
    return {when: sums["always"] + sums[when] for when in TOGETHER}


def compiled(program: Any, *args: Any) -> dict[str, int]:
    """Bytes a device that the compiler gives a jitted function: its arguments, and the temporaries beside them."""
    sizes: Any = program.lower(*args).compile().memory_analysis()
    return {"arguments": sizes.argument_size_in_bytes, "temporaries": sizes.temp_size_in_bytes}


def limit(devices: Sequence[Any]) -> int | None:
    """The least number of bytes that one of the devices can hold; None where they do not say."""
    found = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [size for size in found if size is not None]
    return min(known) if known and len(known) == len(found) else None


def table(rows: Sequence[Row], limit: int | None = None) -> str:
    """Rows as text: a line a role, a column a kind, the sums, and the share of what a device can hold."""
    roles = dict.fromkeys(row.role for row in rows if row.size.total)
    lines = [("", "all devices", "one device", "")]
    for role in roles:
        own = [row for row in rows if row.role == role and row.size.total]
        whole = sum((row.size for row in own), Size())
        named = [f"{row.kind} {told(row.size.total)}" for row in own if told(row.size.total) != told(0)]
        lines.append((role, told(whole.total), told(whole.device), ", ".join(named)))
    most = peak(rows)
    of = "" if limit is None else f"{most.device / limit:.0%} of {told(limit)}"
    lines.append(("at most at once", told(most.total), told(most.device), of))
    left, *numbers = (max(len(line[i]) for line in lines) for i in range(3))
    shown = [f"{a:<{left}}  {b:>{numbers[0]}}  {c:>{numbers[1]}}  {d}".rstrip() for a, b, c, d in lines]
    return "\n".join(shown)


def check(rows: Sequence[Row], limit: int | None) -> None:
    """Refuse a run that a device cannot hold.

    Raises:
        ValueError: with the numbers, the largest rows and what would help.
    """
    most = peak(rows)
    if limit is None or most.device <= limit:
        return
    largest = sorted(rows, key=lambda row: row.size.device, reverse=True)[:3]
    named = ", ".join(f"{row.role} {row.kind} {told(row.size.device)}" for row in largest)
    raise ValueError(
        f"this run takes {told(most.device)} a device, {told(most.device - limit)} more than the {told(limit)} that it has "
        f"(largest: {named}): train adapters (--lora.rank 16), split the parameters over devices (--mesh.fsdp), or take fewer "
        "rows at a time (--microbatches, --batch)"
    )


def told(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
