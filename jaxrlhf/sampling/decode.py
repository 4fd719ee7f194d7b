"""The programs of sampling: read prompts, write a fixed number of tokens a row, and rearrange rows in between.

`sampling/generate.py` decides on the host when each of them runs. Rows live in a `State`. Either all of them stand at one
common step, a wave, or each at its own, in slots that are refilled.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Draw, Prompts, Rollout, SamplingSpec
from jaxrlhf.models import heads
from jaxrlhf.models.model import CacheConfig, Model, decode_changes
from jaxrlhf.sampling import filters, nucleus, stop_strings


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


# ------------------------------------------------------------------------------------------------ reading prompts


def decode_params(model: Model, params: Any) -> Any:
    """Weights as the other programs read them. What stays as it is is handed on: a program would copy it."""
    return over(params, _decode_changes(model, params))


def over(params: Any, changes: Any) -> Any:
    """The leaves that sampling has of its own, and in the place of None those of the parameters."""
    given = dict(jax.tree_util.tree_leaves_with_path(params))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: given.get(path) if leaf is None else leaf, changes, is_leaf=lambda leaf: leaf is None
    )


@functools.partial(jax.jit, static_argnums=0)
def _decode_changes(model: Model, params: Any) -> Any:
    return decode_changes(model, params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def start(
    model: Model,
    spec: SamplingSpec,
    shape: Shape,
    room: int,
    weights: Any,
    prompts: Prompts,
    key: PRNGKeyArray,
    stops: Int[Array, "m v"] | None,
) -> State:
    """Read all prompts. The cache has room for `room` response tokens."""
    first = jnp.arange(prompts.length.shape[0], dtype=jnp.int32) * shape.n
    return read(model, spec, shape, room, weights, prompts, first, key, stops)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def start_slots(
    model: Model,
    spec: SamplingSpec,
    shape: Shape,
    count: int,
    weights: Any,
    prompts: Prompts,
    key: PRNGKeyArray,
    stops: Int[Array, "m v"] | None,
) -> tuple[Written, State]:
    """Read the first `count` prompts; what all rows have written, nothing yet; and slots, each at a step of its own."""
    return _nothing(model, spec, shape, prompts), _slots(model, spec, shape, count, weights, prompts, 0, key, stops)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames=("done", "state"))
def refill(
    model: Model,
    spec: SamplingSpec,
    shape: Shape,
    count: int,
    weights: Any,
    prompts: Prompts,
    first: Int[Array, ""] | int,
    key: PRNGKeyArray,
    slots: Int[Array, " m"],
    done: Written | None,
    state: State,
) -> tuple[Written, State]:
    """Put down what the rows in `slots` have written, and give these to the samples of `count` prompts from `first` on."""
    own = jax.tree.map(lambda x: x[slots], (state.rows.row, state.rows.written))
    done = _collected(done, *own)
    part = _slots(model, spec, shape, count, weights, prompts, first, key, state.stops)
    rows, step = jax.tree.map(lambda old, new: old.at[slots].set(new), (state.rows, state.step), (part.rows, part.step))
    cache = model.put(state.cache, slots, part.cache)
    return by_row(done), dataclasses.replace(state, step=by_row(step), cache=cache, rows=by_row(rows))


def _slots(model, spec, shape, count, weights, prompts, first, key, stops) -> State:
    """Rows of some prompts, each with a step and a prompt of its own. Where fewer prompts are left, the places before `first`
    are read once more as fillers, which end at once."""
    total = prompts.length.shape[0]
    begin = jnp.minimum(first, total - count)
    some = jax.tree.map(lambda x: by_row(jax.lax.dynamic_slice_in_dim(x, begin, count)), prompts)
    place = begin + jnp.arange(count, dtype=jnp.int32)
    mine = place >= first
    some = dataclasses.replace(some, limit=jnp.where(mine, limits(some, spec), 0))
    at = jnp.where(mine, place, total) * shape.n
    state = read(model, spec, shape, spec.max_tokens, weights, some, at, key, stops)
    rows = jnp.arange(count * shape.n, dtype=jnp.int32)
    return dataclasses.replace(state, step=jnp.zeros_like(rows), cache=model.take(state.cache, rows))


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
        written=_blank(model, spec, shape, count),
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


def _blank(model: Model, spec: SamplingSpec, shape: Shape, rows: int) -> Written:
    words = -(-model.vocab_size // 32)
    return Written(
        tokens=jnp.zeros((rows, shape.width), jnp.int32),
        logprobs=jnp.zeros((rows, shape.width)),
        sampled_logprobs=jnp.zeros((rows, shape.width)),
        kept=jnp.zeros((rows, shape.width, words), jnp.uint32) if spec.replayed else None,
        length=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
    )


def _nothing(model: Model, spec: SamplingSpec, shape: Shape, prompts: Prompts) -> Written:
    return by_row(_blank(model, spec, shape, prompts.length.shape[0] * shape.n))


def uniforms(key: PRNGKeyArray, uid: Int[Array, " b"], sample: Int[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """One number in [0, 1) for each token, from fold_in(fold_in(fold_in(key, uid), sample), position)."""
    position = jnp.tile(jnp.arange(width, dtype=jnp.int32), uid.shape[0])
    names = jnp.stack([jnp.repeat(uid, width), jnp.repeat(sample, width), position])
    keys = jnp.broadcast_to(key, position.shape)
    # A loop over the three names, because XLA takes 2 s to compile hashes nested in one another, 0.4 s so.
    keys, _ = jax.lax.scan(lambda keys, name: (jax.vmap(jax.random.fold_in)(keys, name), None), keys, names)
    return jax.vmap(jax.random.uniform)(keys).reshape(-1, width)


# ------------------------------------------------------------------------------------------------ writing tokens


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def advance(model: Model, spec: SamplingSpec, steps: int, weights: Any, state: State) -> tuple[State, Bool[Array, " b"]]:
    """Write `steps` more tokens of every row; also which rows go on, on every device."""
    state, _ = jax.lax.scan(lambda s, _: (_step(model, spec, weights, s), None), state, length=steps)
    return state, sharding.constrain(live(state), None)


def live(state: State) -> Bool[Array, " b"]:
    """Rows that go on: not stopped, and with tokens left to write."""
    return ~state.rows.written.finished & (state.step < state.rows.limit)


def _step(model: Model, spec: SamplingSpec, weights: Any, state: State) -> State:
    rows, t = state.rows, state.step
    old, going = rows.written, live(state)
    logits = model.logits(weights, rows.hidden)
    logits = heads.policy_logits(logits, jnp.broadcast_to(t, going.shape), spec, rows.seen)
    token, logprob, sampled_logprob, kept = _choose(logits, _column(rows.uniforms, t), spec, rows.draw)
    token = jnp.where(going, token, spec.pad)
    stopped = (token[:, None] == jnp.array(spec.stop, jnp.int32)).any(-1)
    match, seen = rows.match, rows.seen
    if state.stops is not None and match is not None:
        match = jnp.where(going, state.stops[match, token], match)
        stopped |= match == state.stops.shape[0] - 1
    if seen is not None:
        seen = seen.at[jnp.arange(token.size), token].max(going)
    # Past the end, the cache's last place is overwritten, or none; nothing reads it any more.
    hidden, cache = model.decode(weights, state.cache, token, t)
    written = Written(
        tokens=_set_column(old.tokens, token, t),
        logprobs=_set_column(old.logprobs, masking.masked(logprob, going), t),
        sampled_logprobs=_set_column(old.sampled_logprobs, masking.masked(sampled_logprob, going), t),
        kept=None if old.kept is None else _set_column(old.kept, masking.pack_bits(kept & going[:, None]), t),
        length=old.length + going,
        finished=old.finished | (going & stopped),
    )
    rows = dataclasses.replace(rows, hidden=hidden, seen=seen, match=match, written=written)
    # A slot waits at its row's end until it is refilled.
    return dataclasses.replace(state, step=t + (going if t.ndim else 1), cache=cache, rows=by_row(rows))


def _column(x: Float[Array, "b w"], step: Int[Array, "*b"]) -> Float[Array, " b"]:
    if not step.ndim:
        return jax.lax.dynamic_index_in_dim(x, step, axis=1, keepdims=False)
    return jnp.take_along_axis(x, step[:, None], axis=1, mode="clip")[:, 0]


def _set_column(x: jax.Array, column: jax.Array, step: Int[Array, "*b"]) -> jax.Array:
    """x [B, W, ...] with `column` [B, ...] at the common place `step` [] or at each row's own [B], there none past the end."""
    if not step.ndim:
        return jax.lax.dynamic_update_slice_in_dim(x, column[:, None], step, axis=1)
    return x.at[jnp.arange(x.shape[0]), step].set(column, mode="drop")


def _choose(
    logits: Float[Array, "b v"], uniform: Float[Array, " b"], spec: SamplingSpec, draw: Draw | None = None
) -> tuple[Int[Array, " b"], Float[Array, " b"], Float[Array, " b"], Bool[Array, "b v"]]:
    """A token from policy logits, its log-prob under the policy, that under the distribution drawn from, and the kept set."""
    drawable = logits
    if draw is not None:
        sure = draw.temperature == 0
        logits = logits / jnp.where(sure, 1.0, draw.temperature)[:, None]
        drawable = filters.nucleus_of_each(logits, draw.top_p)
        token, sampled_logprob = nucleus.draw(drawable, uniform)
        token = jnp.where(sure, nucleus.greedy(logits), token)
        sampled_logprob = jnp.where(sure, 0.0, sampled_logprob)
    elif spec.greedy:
        token = nucleus.greedy(logits)
        sampled_logprob = jnp.zeros(token.shape)  # drawn with certainty
    else:
        drawable = filters.apply(logits, spec) if spec.filtered else logits
        token, sampled_logprob = nucleus.draw(drawable, uniform)
    kept = drawable > heads.IMPOSSIBLE / 2
    if not spec.filtered and draw is None:
        return token, sampled_logprob, sampled_logprob, kept
    picked = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, picked - jax.nn.logsumexp(logits, axis=-1), sampled_logprob, kept


# ------------------------------------------------------------------------------------------------ rearranging rows


@functools.partial(jax.jit, static_argnums=0, donate_argnames="done")
def halve(model: Model, done: Written | None, state: State) -> tuple[Written, State]:
    """Put down what all rows have written, and go on with half of them, those among them that go on."""
    done = _collected(done, state.rows.row, state.rows.written)
    going = live(state)
    keep = jnp.argsort(~going, stable=True)[: going.size // 2]
    rows, step = jax.tree.map(lambda x: x[keep] if x.ndim else x, (state.rows, state.step))
    state = dataclasses.replace(state, step=by_row(step), cache=model.take(state.cache, keep), rows=by_row(rows))
    return by_row(done), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def grow(model: Model, extra: int, cache: Any) -> Any:
    """The entries of the cache that change when it gets room for `extra` response tokens more."""
    return model.grow(cache, extra)


@functools.partial(jax.jit, static_argnums=(0, 1))
def finish(
    spec: SamplingSpec, n: int, prompts: Prompts, done: Written | None, rows: Rows, version: Int[Array, ""] | int
) -> Rollout:
    """Rows with each response directly after its prompt, and `spec.pad` after that."""
    written = _collected(done, rows.row, rows.written)
    prompt, prompt_len = jnp.repeat(prompts.tokens, n, axis=0), jnp.repeat(prompts.length, n)
    count, width = prompt.shape
    place = jnp.arange(width + spec.max_tokens)
    prompt = jnp.pad(prompt, ((0, 0), (0, spec.max_tokens)))
    response = jnp.take_along_axis(written.tokens, jnp.clip(place - prompt_len[:, None], 0, spec.max_tokens - 1), axis=1)
    row = jnp.where(masking.length_mask(prompt_len, place.size), prompt, response)
    row = jnp.where(masking.length_mask(prompt_len + written.length, place.size), row, spec.pad)
    rollout = Rollout(
        tokens=row,
        prompt_len=prompt_len,
        response_len=written.length,
        finished=written.finished,
        group=jnp.repeat(prompts.uid, n),
        sample=jnp.tile(jnp.arange(n, dtype=jnp.int32), prompts.length.shape[0]),
        version=jnp.full(count, version, jnp.int32),
        logprobs=written.logprobs[:, : spec.max_tokens],
        sampled_logprobs=written.sampled_logprobs[:, : spec.max_tokens],
        kept=None if written.kept is None else written.kept[:, : spec.max_tokens],
    )
    return by_row(rollout)


def _collected(done: Written | None, row: Int[Array, " b"], written: Written) -> Written:
    """What all rows of the batch have written; before any has left, these are all."""
    if done is None:
        return written
    return jax.tree.map(lambda every, own: every.at[row].set(own, mode="drop"), done, written)


def by_row(tree: Any) -> Any:
    """Split every array of rows over the devices; so it has the same sharding, and a program the same input, at each chunk."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else x, tree)


def whole(
    model: Model,
    spec: SamplingSpec,
    shape: Shape,
    params: Any,
    prompts: Prompts,
    key: PRNGKeyArray,
    version: Int[Array, ""] | int,
) -> Rollout:
    """What `generate.generate` gives, as one pure function for programs that compose it with more: no host looks at rows in
    between, so all of them take W steps, and nothing is checked. Without stop strings."""
    weights = model.decode_params(params)
    state = start(model, spec, shape, spec.max_tokens, weights, prompts, key, None)
    state, _ = advance(model, spec, shape.width, weights, state)
    return finish(spec, shape.n, prompts, None, state.rows, version)
