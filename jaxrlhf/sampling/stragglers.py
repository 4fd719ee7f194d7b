"""Responses that are stopped early and carried on: no batch waits for its longest rows.

A batch has `stragglers` groups more under way than it gives back. Once enough groups have ended, the others stop where they
are, with their tokens and log-probs, and go on in the next batch under the policy of that time. So every group is trained on
in the end, a long one some updates later; each token keeps the log-prob that it was drawn with, which is what importance
weights (`algorithms/offpolicy.py`) need. What is trained on first is what ends first: lengths of the first batches are short.

Source: Kimi team 2025, "Kimi k1.5: scaling reinforcement learning with LLMs" (arXiv 2501.12599), partial rollouts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, PRNGKeyArray

from jaxrlhf.core import types
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.models.model import Model
from jaxrlhf.sampling import decode, generate
from jaxrlhf.sampling.generate import Job, Options
from jaxrlhf.sampling.rows import Rows, Shape, State, Written, by_row, limits, read, reopen

AT_ONCE = Options()


@struct.dataclass
class Begun:
    """Responses under way, whole groups of n rows one after another. `row` and `limit` are those of their prompts."""

    rollout: Rollout
    row: types.Array  # [S*n] int32
    limit: types.Array  # [S*n] int32


def begin(prompts: Prompts, model: Model, spec: SamplingSpec, n: int = 1) -> Begun:
    """Responses to these prompts of which no token is written yet, on the host."""
    count = prompts.tokens.shape[0]
    words = -(-model.vocab_size // 32)

    def each(x):
        return np.repeat(np.asarray(x), n, axis=0)

    nothing = np.zeros((count * n, spec.max_tokens), np.float32)
    rollout = Rollout(
        tokens=np.concatenate([each(prompts.tokens), np.full(nothing.shape, spec.pad, np.int32)], axis=1),
        prompt_len=each(prompts.length),
        response_len=np.zeros(count * n, np.int32),
        finished=np.zeros(count * n, bool),
        group=each(prompts.uid),
        sample=np.tile(np.arange(n, dtype=np.int32), count),
        version=np.zeros(count * n, np.int32),
        logprobs=nothing,
        sampled_logprobs=nothing.copy(),
        kept=np.zeros((*nothing.shape, words), np.uint32) if spec.replayed else None,
    )
    limit = np.full(count, spec.max_tokens, np.int32) if prompts.limit is None else np.asarray(prompts.limit)
    return Begun(rollout, each(prompts.row), np.minimum(each(limit), spec.max_tokens).astype(np.int32))


def carry_on(
    model: Model,
    params: Any,
    prompts: Prompts,
    begun: Begun,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    version: int | jax.Array = 0,
    options: Options = AT_ONCE,
    stop_table: jax.Array | None = None,
) -> tuple[Rollout, Prompts, Begun, list[tuple[int, int]]]:
    """As many groups of n responses as there are prompts, those that ended first among the new ones and the begun ones; their
    prompts; the others as far as they are; and (rows, steps) of every chunk.

    Rows come in the order in which their groups ended, older ones first. Row i answers prompt i // n of those returned, and its
    `version` is that of the policy that began it. A row that goes on under the same policy and key is written as if it had
    never stopped (up to the last bits of its logits).

    Raises:
        ValueError: as `generate.generate`; slots, or begun rows that are not whole groups of n, or of another width.
    """
    _check(prompts, begun, n, options, spec)
    job = generate.make_job(model, params, prompts, spec, key, n, options, stop_table, besides=begun.limit.shape[0])
    state = _start(model, spec, job.shape, job.weights, prompts, begun, key, job.stop_table)
    done, state, ended = _until(job, state)
    # Groups that have ended in the order in which they did, then the others; of equals the older first.
    groups = np.argsort(ended, kind="stable")
    order = (groups[:, None] * n + np.arange(n)).reshape(-1).astype(np.int32)
    full, left, asked = _part(spec, n, prompts, begun, done, state.rows, jnp.asarray(version, jnp.int32), order)
    return full, asked, left, job.chunks


def _check(prompts: Prompts, begun: Begun, n: int, options: Options, spec: SamplingSpec) -> None:
    if options.slots:
        raise ValueError(f"slots={options.slots} with stragglers: rows that wait for a slot cannot be left over; set slots=0")
    rows, width = begun.rollout.tokens.shape
    if rows % n or rows == 0:
        raise ValueError(f"{rows} begun rows are not groups of n={n}: begin as many prompts as shall be under way, n each")
    if width != prompts.tokens.shape[1] + spec.max_tokens:
        raise ValueError(
            f"begun rows have {width} places, but prompts here have {prompts.tokens.shape[1]} and responses {spec.max_tokens}: "
            "pad the prompts of all batches to one width"
        )


def _until(job: Job, state: State) -> tuple[Written | None, State, np.ndarray]:
    """Decode until as many groups have ended as there are prompts; also the chunk in which each group did, or a later one."""
    done, n, chunks = None, job.shape.n, job.shape.width // job.steps
    row = np.arange(state.rows.row.size)  # of the batch, that each row decoded is
    ended = np.full(row.size, chunks + 1)
    for chunk in range(1, chunks + 1):
        state, live = job.advance(state)
        live = np.asarray(live)
        ended[row[~live]] = np.minimum(ended[row[~live]], chunk)
        if (ended.reshape(-1, n).max(axis=1) <= chunk).sum() >= job.count:
            break
        done, state = job.shrunk(done, state, int(live.sum()))
        while row.size > state.rows.row.size:  # as `decode.halve` chose them
            keep = np.argsort(~live, kind="stable")[: row.size // 2]
            row, live = row[keep], live[keep]
    return done, state, ended.reshape(-1, n).max(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(
    model: Model,
    spec: SamplingSpec,
    shape: Shape,
    weights: Any,
    prompts: Prompts,
    begun: Begun,
    key: PRNGKeyArray,
    stops: Int[Array, "m v"] | None,
) -> State:
    """Begun rows where they stopped, then the samples of all prompts at their first token; each at a step of its own."""
    rest = reopen(model, spec, shape, weights, begun.rollout, begun.limit, key, stops)
    old, first = begun.limit.shape[0], jnp.arange(prompts.length.shape[0], dtype=jnp.int32) * shape.n
    new = read(model, spec, shape, spec.max_tokens, weights, prompts, old + first, key, stops)
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rest.rows, new.rows)
    every = jnp.arange(rows.row.shape[0])
    # The samples' places in the cache, and before them any rows', which those of the begun ones replace.
    cache = model.put(model.take(new.cache, jnp.maximum(every - old, 0)), every[:old], rest.cache)
    step = jnp.where(every < old, jnp.pad(rest.step, (0, every.size - old)), 0)
    return State(step=by_row(step), cache=cache, stops=stops, rows=by_row(rows))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _part(
    spec: SamplingSpec,
    n: int,
    prompts: Prompts,
    begun: Begun,
    done: Written | None,
    rows: Rows,
    version: Int[Array, ""],
    order: Int[Array, " b"],
) -> tuple[Rollout, Begun, Prompts]:
    """The rows that come first in `order`, as many as the samples of the prompts; the others; and the prompts of the first."""
    old, width, count = begun.rollout, prompts.tokens.shape[1], prompts.length.shape[0] * n
    samples = jnp.tile(jnp.arange(n, dtype=jnp.int32), prompts.length.shape[0])
    limit = limits(prompts, spec)

    def all_of(a, b):
        return jnp.concatenate([a, jnp.repeat(b, n, axis=0)])

    every = Prompts(
        tokens=all_of(old.tokens[:, :width], prompts.tokens),
        length=all_of(old.prompt_len, prompts.length),
        uid=all_of(old.group, prompts.uid),
        row=all_of(begun.row, prompts.row),
        limit=all_of(begun.limit, limit),
    )
    rollout = decode.finish(spec, 1, every, done, rows, version)
    rollout = dataclasses.replace(
        rollout,
        sample=jnp.concatenate([old.sample, samples]),
        version=jnp.concatenate([jnp.where(old.response_len > 0, old.version, version), jnp.full(count, version)]),
    )
    rollout, every = jax.tree.map(lambda x: x[order], (rollout, every))
    full = by_row(jax.tree.map(lambda x: x[:count], rollout))
    left = Begun(*jax.tree.map(lambda x: x[count:], (rollout, every.row, every.limit)))
    return full, by_row(left), by_row(jax.tree.map(lambda x: x[:count:n], every))
