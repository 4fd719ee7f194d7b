"""The programs of sampling: read prompts, write a fixed number of tokens a row, and rearrange rows in between.

`sampling/generate.py` decides on the host when each of them runs. Rows live in a `State` of `sampling/rows.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Draw, Prompts, Rollout, SamplingSpec
from jaxrlhf.models import heads
from jaxrlhf.models.model import Model, decode_changes
from jaxrlhf.sampling import filters, nucleus
from jaxrlhf.sampling.rows import Rows, Shape, State, Written, blank, by_row, collected, limits, live, read

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
    done = collected(done, *own)
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


def _nothing(model: Model, spec: SamplingSpec, shape: Shape, prompts: Prompts) -> Written:
    return by_row(blank(model, spec, shape, prompts.length.shape[0] * shape.n))


# ------------------------------------------------------------------------------------------------ writing tokens


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def advance(model: Model, spec: SamplingSpec, steps: int, weights: Any, state: State) -> tuple[State, Bool[Array, " b"]]:
    """Write `steps` more tokens of every row; also which rows go on, on every device."""
    state, _ = jax.lax.scan(lambda s, _: (_step(model, spec, weights, s), None), state, length=steps)
    return state, sharding.constrain(live(state), None)


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
    done = collected(done, state.rows.row, state.rows.written)
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
    written = collected(done, rows.row, rows.written)
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
