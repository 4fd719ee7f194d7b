"""Rows of a batch while their responses are written: what each has of its own, how it begins, and what it has written.

All of them stand at one common step, a wave, or each at its own, in slots that are refilled. Nothing here is compiled:
`sampling/decode.py` makes programs of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Draw, Prompts, Rollout, SamplingSpec
from jaxrlhf.models.model import CacheConfig, Model
from jaxrlhf.sampling import stop_strings


@struct.dataclass
class Written:
    """What rows have written so far. W is max_tokens rounded up to whole chunks."""

    tokens: jax.Array  # [B, W] int32
    logprobs: jax.Array  # [B, W]
    sampled_logprobs: jax.Array  # [B, W]
    kept: jax.Array | None  # [B, W, ceil(V/32)] uint32, where the kept sets are recorded
    length: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool


@struct.dataclass
class State:
    """Rows between two decode steps: all of the batch, those that are left of it, or those that have a slot."""

    step: jax.Array  # int32, index of the response token to be written next, of all rows [] or of each [B]
    cache: Any
    stops: jax.Array | None  # [M, V] int32, `stop_strings.table`
    rows: Rows


@struct.dataclass
class Rows:
    """What each row has of its own, apart from the cache."""

    hidden: jax.Array  # [B, D], predicts the next token
    uniforms: jax.Array  # [B, W]
    limit: jax.Array  # [B] int32, most tokens of each row
    row: jax.Array  # [B] int32, its place in the batch; past its end: a filler
    seen: jax.Array | None  # [B, V] bool, tokens that stand in the row, where the spec has a repetition penalty
    match: jax.Array | None  # [B] int32, state of the search for stop strings, where there are any
    written: Written
    draw: Draw | None = None  # temperature and top-p of each, where each has its own


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the programs of one batch have in common beside model and spec."""

    n: int  # samples a prompt
    width: int  # W
    cache: CacheConfig


def read(model, spec, shape, room, weights, prompts, first, key, stops) -> State:
    """Rows of all of `prompts`, not compiled; the first sample of each has the place `first` in the batch."""
    hidden, cache = model.prefill(weights, prompts.tokens, prompts.length, shape.n, room, shape.cache)
    samples = jnp.arange(shape.n, dtype=jnp.int32)
    count = prompts.length.shape[0] * shape.n
    rows = Rows(
        hidden=jnp.repeat(hidden, shape.n, axis=0),
        uniforms=uniforms(key, jnp.repeat(prompts.uid, shape.n), jnp.tile(samples, prompts.length.shape[0]), shape.width),
        limit=jnp.repeat(limits(prompts, spec), shape.n),
        row=(first[:, None] + samples).reshape(-1),
        seen=jnp.repeat(standing(model, prompts.tokens, prompts.length), shape.n, axis=0) if spec.penalised else None,
        match=None if stops is None else jnp.full(count, stop_strings.START, jnp.int32),
        written=blank(model, spec, shape, count),
        draw=jax.tree.map(lambda x: jnp.repeat(x, shape.n), prompts.draw),
    )
    return State(step=jnp.int32(0), cache=cache, stops=stops, rows=by_row(rows))


def reopen(model, spec, shape, weights, rollout: Rollout, limit, key, stops) -> State:
    """Rows that have written a part of their response, each at its own step and with a prompt of its own; not compiled."""
    end = rollout.prompt_len + rollout.response_len
    hidden, cache = model.resume(
        weights, rollout.tokens, rollout.prompt_len, rollout.response_len, spec.max_tokens, shape.cache
    )
    written = _rewritten(rollout, shape.width)
    rows = Rows(
        hidden=hidden,
        uniforms=uniforms(key, rollout.group, rollout.sample, shape.width),
        limit=limit,
        row=jnp.arange(limit.shape[0], dtype=jnp.int32),
        seen=standing(model, rollout.tokens, end) if spec.penalised else None,
        match=None if stops is None else _matched(stops, written),
        written=written,
    )
    return State(step=rollout.response_len, cache=cache, stops=stops, rows=rows)


def _rewritten(rollout: Rollout, width: int) -> Written:
    """What rows of a rollout have written, with room for `width` tokens."""
    most = rollout.logprobs.shape[1]
    place = rollout.prompt_len[:, None] + jnp.arange(most)
    tokens = jnp.take_along_axis(rollout.tokens, jnp.minimum(place, rollout.tokens.shape[1] - 1), axis=1)
    tokens = jnp.where(masking.length_mask(rollout.response_len, most), tokens, 0)

    def wide(x):
        return jnp.pad(x, ((0, 0), (0, width - most), *((0, 0),) * (x.ndim - 2)))

    return Written(
        tokens=wide(tokens),
        logprobs=wide(rollout.logprobs),
        sampled_logprobs=wide(rollout.sampled_logprobs),
        kept=None if rollout.kept is None else wide(rollout.kept),
        length=rollout.response_len,
        finished=rollout.finished,
    )


def _matched(stops: Int[Array, "m v"], written: Written) -> Int[Array, " b"]:
    """State of the search for stop strings after what rows have written."""
    inside = masking.length_mask(written.length, written.tokens.shape[1])

    def read_token(match, column):
        token, real = column
        return jnp.where(real, stops[match, token], match), None

    start = jnp.full(written.length.shape, stop_strings.START, jnp.int32)
    return jax.lax.scan(read_token, start, (written.tokens.T, inside.T))[0]


def limits(prompts: Prompts, spec: SamplingSpec) -> Int[Array, " b"]:
    """Most tokens of the responses to each prompt."""
    if prompts.limit is None:
        return jnp.full(prompts.length.shape, spec.max_tokens, jnp.int32)
    return jnp.minimum(prompts.limit, spec.max_tokens).astype(jnp.int32)


def standing(model: Model, tokens: Int[Array, "b t"], length: Int[Array, " b"]) -> Bool[Array, "b v"]:
    """Which tokens stand among the first `length` of each row."""
    tokens = jnp.where(masking.length_mask(length, tokens.shape[1]), tokens, model.vocab_size)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], model.vocab_size), bool).at[rows, tokens].set(True, mode="drop")


def blank(model: Model, spec: SamplingSpec, shape: Shape, rows: int) -> Written:
    """What so many rows have written that have not begun."""
    words = -(-model.vocab_size // 32)
    return Written(
        tokens=jnp.zeros((rows, shape.width), jnp.int32),
        logprobs=jnp.zeros((rows, shape.width)),
        sampled_logprobs=jnp.zeros((rows, shape.width)),
        kept=jnp.zeros((rows, shape.width, words), jnp.uint32) if spec.replayed else None,
        length=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
    )


def uniforms(key: PRNGKeyArray, uid: Int[Array, " b"], sample: Int[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """One number in [0, 1) for each token, from fold_in(fold_in(fold_in(key, uid), sample), position)."""
    position = jnp.tile(jnp.arange(width, dtype=jnp.int32), uid.shape[0])
    names = jnp.stack([jnp.repeat(uid, width), jnp.repeat(sample, width), position])
    keys = jnp.broadcast_to(key, position.shape)
    # A loop over the three names, because XLA takes 2 s to compile hashes nested in one another, 0.4 s so.
    keys, _ = jax.lax.scan(lambda keys, name: (jax.vmap(jax.random.fold_in)(keys, name), None), keys, names)
    return jax.vmap(jax.random.uniform)(keys).reshape(-1, width)


def live(state: State) -> Bool[Array, " b"]:
    """Rows that go on: not stopped, and with tokens left to write."""
    return ~state.rows.written.finished & (state.step < state.rows.limit)


def collected(done: Written | None, row: Int[Array, " b"], written: Written) -> Written:
    """What all rows of the batch have written; before any has left, these are all."""
    if done is None:
        return written
    return jax.tree.map(lambda every, own: every.at[row].set(own, mode="drop"), done, written)


def by_row(tree: Any) -> Any:
    """Split every array of rows over the devices; so it has the same sharding, and a program the same input, at each chunk."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else x, tree)
