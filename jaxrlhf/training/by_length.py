"""Microbatches of rows of about equal length, each as wide as its longest row: next to no padding, the same gradient.

The rows of one optimizer step are sorted by length and cut into parts of at most so many tokens, padding included, whose
gradients are added. Sorting happens within a step only, and SUMs are divided by the COUNTs of the whole step, so that neither
order nor split changes what is minimised. Widths are multiples of `Microbatches.multiple` and rows powers of two, so that few
shapes occur; each is a program of its own. The host looks at the lengths, once a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.core import sharding
from jaxrlhf.core.types import Term, TrainState
from jaxrlhf.training import gradient
from jaxrlhf.training.gradient import LossFn, Metrics, Seen
from jaxrlhf.training.objective import OutputsFn


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How the rows of one optimizer step are split, so that few of them stand in memory at a time. The gradient is the same."""

    parts: int = 1  # equal parts of the rows, one after the other
    tokens: int = 0  # > 0, in their place: rows sorted by length, in parts of at most so many tokens, padding included
    multiple: int = 32  # of which the widths of sorted parts are, to compile few shapes

    def __post_init__(self):
        if self.parts < 1 or self.tokens < 0 or self.multiple < 1:
            raise ValueError(f"microbatches {self}: parts and multiple must be at least 1, tokens at least 0")
        if self.tokens and self.parts > 1:
            raise ValueError(f"microbatches parts={self.parts} with tokens={self.tokens}: choose equal parts, or sorted ones")


class Part(NamedTuple):
    """Some rows of a batch, cut to the longest of them."""

    rows: np.ndarray  # [r] int32
    width: int  # tokens of a row
    response: int  # of them, at most, the response


def parts(lengths: np.ndarray, responses: np.ndarray, widths: tuple[int, int], texts: int, split: Microbatches) -> list[Part]:
    """Rows [B] of `lengths` tokens, `responses` of them the response, in parts, the longest first; `widths` are those of the
    whole batch. A row holds `texts` texts of at most its length. Every part is shared by all devices that split the batch.

    Raises:
        ValueError: the rows are no multiple of these devices.
    """
    gradient.check_split(len(lengths), 1, "microbatches")
    ways, order = sharding.ways(), np.argsort(-lengths, kind="stable").astype(np.int32)

    def rounded(longest: int, most: int) -> int:
        return min(most, max(1, -(-longest // split.multiple)) * split.multiple)

    found, first = [], 0
    while first < len(order):
        width = rounded(int(lengths[order[first]]), widths[0])
        rows = ways
        while 2 * rows * texts * width <= split.tokens and first + 2 * rows <= len(order):
            rows *= 2
        own = order[first : first + rows]
        found.append(Part(own, width, rounded(int(responses[own].max()), widths[1])))
        first += rows
    return found


def cut(batch: Any, rows: jax.Array, width: int, response: int) -> Any:
    """The rows of a batch, cut to `width` tokens of which at most `response` are the response's.

    Per token are `tokens` and `segments`, of the row, and every array [B, R, ...] (of sets [B, N, R, ...]) as wide as the mask.
    """
    lead = batch.tokens.ndim - 1
    mask = getattr(batch, "mask", None)
    shape = None if mask is None else (*batch.tokens.shape[:lead], mask.shape[-1])

    def one(name: str, x: Any) -> Any:
        x = jax.tree.map(lambda leaf: sharding.constrain(leaf[rows], "batch", *[None] * (leaf.ndim - 1)), x)
        if name in ("tokens", "segments"):
            return None if x is None else x[..., :width]
        if shape is not None and getattr(x, "shape", ())[1 : lead + 1] == shape[1:]:
            return jax.lax.slice_in_dim(x, 0, response, axis=lead)
        return x

    return dataclasses.replace(
        batch, **{field.name: one(field.name, getattr(batch, field.name)) for field in dataclasses.fields(batch)}
    )


class Programs(NamedTuple):
    """The compiled functions of one train step."""

    zeros: Any  # (params, frozen, batch, key) -> sums: a gradient and terms of nothing
    counts: Any  # (params, frozen, batch, rows, key) -> COUNT of each loss term over the rows of a step
    add: Any  # (sums, params, frozen, batch, rows, key, number, counts, width, response) -> sums with those of one part
    apply: Any  # (params, opt_state, sums, counts) -> both updated, sums of nothing, what there is to report
    pool: Any  # (reports) -> metrics

    def compiled(self) -> int:
        """Programs compiled so far."""
        return sum(program._cache_size() for program in self)


def programs(
    outputs_fn: OutputsFn, loss_fn: LossFn, config: Any, optimizer: optax.GradientTransformation, placed: tuple[Any, Any]
) -> Programs:
    """The functions of a step whose parameters and optimizer state are `placed` (shardings), and stay so."""
    slope = gradient.of_part(outputs_fn, loss_fn, config)

    def zeros(params, frozen, batch, key):
        seen = jax.eval_shape(slope, params, frozen, batch, key, None)[1]
        return gradient.zeros(params), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), seen)

    def counts(params, frozen, batch, rows, key):
        batch = jax.tree.map(lambda x: x[rows], batch)
        return gradient.counts_of(outputs_fn, loss_fn, config, params, frozen, batch, key)(batch)

    def add(sums, params, frozen, batch, rows, key, number, counts, width, response):
        part, key = cut(batch, rows, width, response), jax.random.fold_in(key, number)
        found, seen = slope(params, frozen, part, key, counts)
        return gradient.added(sums[0], found), _added(sums[1], seen)

    def apply(params, opt_state, sums, counts):
        terms = {name: term._replace(count=counts[name]) for name, term in sums[1][0].items()}
        seen = terms, sums[1][1]
        params, opt_state, report = gradient.update_from(optimizer, params, opt_state, sums[0], seen)
        return params, opt_state, jax.tree.map(jnp.zeros_like, sums), (seen, report)

    summed = (placed[0], None)
    return Programs(
        zeros=jax.jit(zeros, out_shardings=summed),
        counts=jax.jit(counts),
        add=jax.jit(add, static_argnames=("width", "response"), donate_argnames="sums", out_shardings=summed),
        # The sums are donated too: their memory holds the next step's.
        apply=jax.jit(apply, donate_argnames=("params", "opt_state", "sums"), out_shardings=(*placed, summed, None)),
        pool=jax.jit(lambda reports: gradient.over_updates(*jax.tree.map(lambda *xs: jnp.stack(xs), *reports))),
    )


def _added(sums: Seen, seen: Seen) -> Seen:
    return jax.tree.map(
        lambda a, b: Term(a.sum + b.sum, a.count + b.count, b.coefficient), sums, seen, is_leaf=lambda x: isinstance(x, Term)
    )


def run(
    own: Programs, split: Microbatches, state: TrainState, frozen: Any, batch: Any, steps: Iterable[tuple[np.ndarray, Any]]
) -> tuple[Any, Any, Metrics]:
    """Parameters, optimizer state and metrics after an update on each of `steps`: (rows of the batch, key)."""
    batch, seen = jax.device_put(batch), _looked_at(batch)
    params, opt_state, sums, reports, places, real = state.params, state.opt_state, None, [], 0, 0
    for rows, key in steps:
        sums = own.zeros(params, frozen, batch, key) if sums is None else sums
        counts = own.counts(params, frozen, batch, rows, key)
        found = parts(seen.length[rows], seen.response[rows], seen.widths, seen.texts, split)
        for number, part in enumerate(found):
            chosen = rows[part.rows]
            sums = own.add(sums, params, frozen, batch, chosen, key, number, counts, width=part.width, response=part.response)
            places += chosen.size * seen.texts * part.width
        real += seen.real[rows].sum()
        params, opt_state, sums, report = own.apply(params, opt_state, sums, counts)
        reports.append(report)
    return params, opt_state, own.pool(reports) | {"train/padding_efficiency": np.float32(real / places)}


class _Seen(NamedTuple):
    length: np.ndarray  # [B] tokens of each row, of sets of texts that of the longest
    response: np.ndarray  # [B] of them the response
    real: np.ndarray  # [B] tokens of all texts of a row
    widths: tuple[int, int]  # of the whole batch: tokens, response
    texts: int  # of a row


def _looked_at(batch: Any) -> _Seen:
    """What the host must know of a batch.

    Raises:
        ValueError: it holds no rows with lengths, or another host holds a part of them.
    """
    if not all(hasattr(batch, name) for name in ("tokens", "prompt_len", "response_len")):
        raise ValueError(f"rows of a {type(batch).__name__} have no lengths to sort by: set microbatches.tokens=0, and parts")
    both = (batch.prompt_len, batch.response_len)
    if not all(getattr(x, "is_fully_addressable", True) for x in both):
        raise ValueError("microbatches.tokens sorts rows on one host, but others hold a part of them: set parts in its place")
    width = batch.tokens.shape[-1]
    rows = len(batch.tokens)
    prompt, response = (np.asarray(x).reshape(rows, -1) for x in both)
    length = np.minimum(prompt + response, width)
    mask = getattr(batch, "mask", None)
    widths = width, width if mask is None else mask.shape[-1]
    return _Seen(length.max(1), response.max(1), length.sum(1), widths, length.shape[1])
