"""Sampling: which program of `sampling/decode.py` runs when.

Prompts are read once and shared by their samples; decoding runs in chunks of a fixed number of steps. Between two chunks the
host looks which rows go on. Where all rows are decoded at once, a wave, those that have ended leave whenever the others fill
no more than half of the batch. Where there are fewer slots than rows, slots that are free are refilled with the next prompts.
So the time of a batch follows its tokens, not its longest row.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxrlhf.core import offload, processes, sharding
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.models.model import EXACT, CacheConfig, Model
from jaxrlhf.sampling import decode
from jaxrlhf.sampling.rows import Shape, State, Written

HALVINGS = 3  # of a batch, at most: each number of rows is a program of its own
GROWING = 256  # response tokens from which on the cache starts with half of its room


@dataclasses.dataclass(frozen=True)
class Options:
    """How responses are made: a matter of speed and memory, not of what is drawn."""

    chunk: int = 8  # steps between two looks at which rows go on, at most
    slots: int = 0  # rows decoded at a time, the others waiting for one that is free; 0: all rows at once
    least: int = 8  # rows that a batch shrinks to at least; fewer take a product as long
    cache: CacheConfig = EXACT


def generate(
    model: Model,
    params: Any,
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    version: int | jax.Array = 0,
    options: Options = Options(),
    stop_table: jax.Array | None = None,
) -> Rollout:
    """n responses to each prompt; row i continues prompt i // n, and its `group` is that prompt's uid.

    Every token is drawn with one number that depends on key, uid, sample and position alone, so a response is the same in any
    batch, order, slot, n, chunk length or number of devices, whichever rows have left (up to the last bits of its logits).
    A spec with stop strings needs `stop_table` [M, V], which is `stop_strings.table`.

    Raises:
        ValueError: prompt and response do not fit the model, or the cache the memory; a prompt is empty or longer than its row;
            an id is not in the vocabulary; or an option is out of range.
    """
    return traced(model, params, prompts, spec, key, n, version, options, stop_table)[0]


def traced(
    model: Model,
    params: Any,
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    version: int | jax.Array = 0,
    options: Options = Options(),
    stop_table: jax.Array | None = None,
) -> tuple[Rollout, list[tuple[int, int]]]:
    """What `generate` gives, and (rows, steps) of every chunk that was decoded for it: tokens written over the sum of their
    products is the share of the work that was not wasted."""
    job = make_job(model, params, prompts, spec, key, n, options, stop_table)
    done, state = _in_slots(job) if job.in_slots else _in_a_wave(job)
    return decode.finish(spec, n, prompts, done, state.rows, version), job.chunks


def stream(
    model: Model,
    params: Any,
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    options: Options = Options(chunk=1),
    stop_table: jax.Array | None = None,
) -> Iterator[list[list[int]]]:
    """The tokens of `generate` as they are written: of each row those of one chunk, none of a row that has ended.

    The iterator ends when all rows have. Closing it before leaves the rest undone.

    Raises:
        ValueError: as `generate`; or slots, whose rows would not come in order.
    """
    if options.slots:
        raise ValueError(f"slots={options.slots}: a stream has all its rows at once; give fewer prompts and slots=0")
    job = make_job(model, params, prompts, spec, key, n, options, stop_table)
    state = job.start(job.spec.max_tokens)
    for begin in range(0, job.shape.width, job.steps):
        state, live = job.advance(state)
        tokens, length = processes.to_host((state.rows.written.tokens, state.rows.written.length))
        yield [row[begin:end].tolist() for row, end in zip(tokens, length, strict=True)]
        if not np.asarray(live).any():
            return


def warm(
    model: Model,
    params: Any,
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    options: Options = Options(),
    stop_table: jax.Array | None = None,
) -> None:
    """Compile every program that `generate` may want for batches of this shape, by running each once.

    Which of them a batch wants follows from the lengths of its responses: for runs that must not stop to compile.

    Raises:
        ValueError: as `generate`.
    """
    job = make_job(model, params, prompts, spec, key, n, options, stop_table)
    done, state = None, None
    if job.in_slots:
        done, state = job.start_slots()
        done, state = job.refill(done, state, 0, np.arange(job.refilled * n))
    else:
        state = job.start(job.rooms[0])
    while True:
        decode.finish(spec, n, prompts, done, state.rows, 0)
        last = job.fewest >= state.rows.row.size
        for room in job.rooms[1:]:
            large, _ = job.advance(job.grown(jax.tree.map(jnp.copy, state), room))
            if not last:
                decode.halve(model, jax.tree.map(jnp.copy, done), large)
        state, _ = job.advance(state)
        if last:
            return
        done, state = decode.halve(model, done, state)


def cache_bytes(
    model: Model, prompts: Prompts, spec: SamplingSpec, n: int = 1, options: Options = Options(), besides: int = 0
) -> int:
    """Size of the largest cache that `generate` keeps, over all devices; with rows besides, of `stragglers.carry_on`."""
    count, width = prompts.tokens.shape
    if besides or 0 < options.slots < count * n:
        # Each row has a prompt of its own.
        rows = count * n + besides if besides else options.slots
        return _cache_bytes(model, rows, width, 1, spec.max_tokens, options.cache)
    return _cache_bytes(model, count, width, n, spec.max_tokens, options.cache)


# ------------------------------------------------------------------------------------------------ the host's loops


@dataclasses.dataclass(frozen=True)
class Job:
    """One batch, and the programs that work on it."""

    model: Model
    spec: SamplingSpec
    shape: Shape
    steps: int  # of a chunk
    weights: Any
    prompts: Prompts
    key: PRNGKeyArray
    options: Options
    stop_table: jax.Array | None
    besides: int = 0  # rows that are under way already (`sampling/stragglers.py`)
    chunks: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (rows, steps) of each that was decoded

    @property
    def count(self) -> int:
        """Prompts."""
        return self.prompts.length.shape[0]

    @property
    def in_slots(self) -> bool:
        """Whether rows wait for a slot."""
        return 0 < self.options.slots < self.count * self.shape.n

    @property
    def rooms(self) -> tuple[int, ...]:
        """Response tokens that the cache of a wave has room for, at first and later: what is empty would be read too."""
        most = self.spec.max_tokens
        if most < GROWING or self.in_slots:
            return (most,)
        return (-(-most // (2 * self.steps)) * self.steps, most)

    @property
    def refilled(self) -> int:
        """Prompts read at a time into free slots: few programs, and products large enough."""
        ways = sharding.ways()
        return max(1, self.options.slots // (8 * self.shape.n * ways)) * ways

    @property
    def fewest(self) -> int:
        """Rows that the batch shrinks to at least: by halves, each split evenly over the devices."""
        rows = self.options.slots if self.in_slots else self.count * self.shape.n + self.besides
        for _ in range(HALVINGS):
            if rows // 2 < self.options.least or rows % (2 * sharding.ways()):
                break
            rows //= 2
        return rows

    def start(self, room: int) -> State:
        """All rows, with room for so many response tokens."""
        given = (self.weights, self.prompts, self.key, self.stop_table)
        return decode.start(self.model, self.spec, self.shape, room, *given)

    def start_slots(self) -> tuple[Written, State]:
        """The first rows, as many as there are slots."""
        given = (self.weights, self.prompts, self.key, self.stop_table)
        return decode.start_slots(self.model, self.spec, self.shape, self.options.slots // self.shape.n, *given)

    def refill(self, done: Written | None, state: State, first: int, slots: np.ndarray) -> tuple[Written | None, State]:
        """The samples of the prompts from `first` on in the place of what was in these slots."""
        given = (self.weights, self.prompts, first, self.key, slots, done, state)
        return decode.refill(self.model, self.spec, self.shape, self.refilled, *given)

    def advance(self, state: State) -> tuple[State, jax.Array]:
        """A chunk more; which rows go on after it. The host waits for the chunk only where it looks."""
        self.chunks.append((state.rows.row.size, self.steps))
        # A fixed number of steps a program, not one loop until all have ended: a GPU would ask the host after every token.
        return decode.advance(self.model, self.spec, self.steps, self.weights, state)

    def grown(self, state: State, room: int) -> State:
        """With room for so many response tokens, in place of that at the start."""
        return dataclasses.replace(state, cache=state.cache | decode.grow(self.model, room - self.rooms[0], state.cache))

    def shrunk(self, done: Written | None, state: State, live: int) -> tuple[Written | None, State]:
        """Without the rows that have ended, if those that go on fill no more than half."""
        while live <= state.rows.row.size // 2 and state.rows.row.size > self.fewest:
            done, state = decode.halve(self.model, done, state)
        return done, state


def _in_a_wave(job: Job) -> tuple[Written | None, State]:
    """All rows at once: what those that left have written, and the state of the last ones."""
    done, state, room = None, job.start(job.rooms[0]), job.rooms[0]
    for end in range(job.steps, job.shape.width + 1, job.steps):
        if min(end, job.spec.max_tokens) > room:
            room = job.rooms[1]
            state = job.grown(state, room)
        state, live = job.advance(state)
        if end == job.shape.width or not (going := int(np.asarray(live).sum())):
            break
        done, state = job.shrunk(done, state, going)
    return done, state


def _in_slots(job: Job) -> tuple[Written | None, State]:
    """Some rows at a time, the next ones in the slots of those that have ended."""
    done, state = job.start_slots()
    first, rows = job.options.slots // job.shape.n, job.refilled * job.shape.n
    while True:
        state, live = job.advance(state)
        live = np.asarray(live)
        going, free = int(live.sum()), np.flatnonzero(~live).astype(np.int32)
        while first < job.count and free.size >= rows:
            done, state = job.refill(done, state, first, free[:rows])
            first, free, going = first + job.refilled, free[rows:], going + rows
        if first >= job.count:
            if not going:
                return done, state
            done, state = job.shrunk(done, state, going)


# ------------------------------------------------------------------------------------------------ checks


def make_job(
    model: Model,
    params: Any,
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int,
    options: Options,
    stop_table: jax.Array | None,
    besides: int = 0,
) -> Job:
    """The batch, and so many rows besides that are under way already, checked before anything is compiled."""
    _check_numbers(model, prompts, spec, n, options)
    _check_draw(prompts, spec, besides)
    _check_prompts(model, prompts)
    _check_memory(cache_bytes(model, prompts, spec, n, options, besides))
    if spec.stop_strings and (stop_table is None or stop_table.shape[1] < model.vocab_size):
        raise ValueError(
            f"stop_strings={spec.stop_strings} need a stop_table with a column for each of {model.vocab_size} ids: "
            "stop_strings.table(spec.stop_strings, tokenizer.pieces(), model.vocab_size)"
        )
    chunks = -(-spec.max_tokens // options.chunk)
    steps = -(-spec.max_tokens // chunks)  # chunks of equal length: one compiled program, the fewest steps past the end
    shape = Shape(n, chunks * steps, options.cache)
    weights = decode.decode_params(model, offload.to_device_memory(params))
    stop_table = stop_table if spec.stop_strings else None
    return Job(model, spec, shape, steps, weights, prompts, key, options, stop_table, besides)


def _check_numbers(model: Model, prompts: Prompts, spec: SamplingSpec, n: int, options: Options) -> None:
    width = prompts.tokens.shape[1]
    if width + spec.max_tokens > model.max_length:
        raise ValueError(
            f"prompt width {width} + max_tokens {spec.max_tokens} = {width + spec.max_tokens} exceeds the model's context of "
            f"{model.max_length}: cut prompts to {model.max_length - spec.max_tokens} tokens, or lower max_tokens to "
            f"{model.max_length - width}, or use a model with a longer context"
        )
    if n < 1 or options.chunk < 1 or options.least < 1 or options.slots < 0:
        raise ValueError(
            f"n={n}, chunk={options.chunk}, least={options.least} must be at least 1, slots={options.slots} at least 0"
        )
    if 0 < options.slots < prompts.length.shape[0] * n and options.slots % (n * sharding.ways()):
        raise ValueError(
            f"slots={options.slots} must be a multiple of n={n} samples times {sharding.ways()} devices that split the batch: "
            f"choose {max(1, options.slots // (n * sharding.ways())) * n * sharding.ways()}"
        )
    outside = [i for i in (*spec.stop, *spec.forbidden, spec.pad) if not 0 <= i < model.vocab_size]
    if outside:
        raise ValueError(f"SamplingSpec names token ids {outside} outside the vocabulary 0 .. {model.vocab_size - 1}")


def _check_draw(prompts: Prompts, spec: SamplingSpec, besides: int) -> None:
    if prompts.draw is None:
        return
    if spec.temperature != 1 or spec.filtered or besides:
        raise ValueError(
            f"prompts with a draw of their own, but the spec has temperature={spec.temperature}, top_k={spec.top_k}, "
            f"top_p={spec.top_p}, min_p={spec.min_p}, greedy={spec.greedy} and {besides} rows are under way: leave the spec "
            "at temperature 1 without filters, and use no stragglers"
        )
    temperature, top_p = np.asarray(prompts.draw.temperature), np.asarray(prompts.draw.top_p)
    if not ((temperature >= 0) & np.isfinite(temperature)).all() or not ((top_p > 0) & (top_p <= 1)).all():
        raise ValueError(f"draw: temperature={temperature.tolist()} must be >= 0 and top_p={top_p.tolist()} in (0, 1]")


def _check_prompts(model: Model, prompts: Prompts) -> None:
    tokens, length = prompts.tokens, prompts.length
    if not all(isinstance(x, np.ndarray) or x.is_fully_addressable for x in (tokens, length)):
        return  # another host holds a part of them
    tokens, length = np.asarray(tokens), np.asarray(length)
    width = tokens.shape[1]
    if length.min() < 1 or length.max() > width:
        raise ValueError(
            f"prompt lengths {length.min()} .. {length.max()} must be in 1 .. {width}, the width of the rows: "
            "begin every prompt with a BOS token, and cut long ones"
        )
    outside = (np.arange(width) < length[:, None]) & ((tokens < 0) | (tokens >= model.vocab_size))
    if outside.any():
        row, place = np.argwhere(outside)[0]
        raise ValueError(
            f"prompt {row} has the id {tokens[row, place]} at place {place}, outside the vocabulary 0 .. "
            f"{model.vocab_size - 1}: is its tokenizer that of the model?"
        )


def _check_memory(size: int) -> None:
    mesh = jax.sharding.get_abstract_mesh()
    size //= 1 if mesh.empty else mesh.size
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limit = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > limit:
        raise ValueError(
            f"keys and values of all rows take {size / 2**30:.1f} GiB a device, more than its {limit / 2**30:.1f} GiB: set "
            "slots to fewer rows at a time, or cache.dtype to bfloat16 or int8, or lower max_tokens"
        )


@functools.lru_cache(maxsize=64)
def _cache_bytes(model: Model, prompts: int, width: int, n: int, room: int, cache: CacheConfig) -> int:
    def prefill(key, tokens, length):
        return model.prefill(model.decode_params(model.init(key)), tokens, length, n, room, cache)[1]

    given = (jax.random.key(0), np.zeros((prompts, width), np.int32), np.ones(prompts, np.int32))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(prefill, *given)))
