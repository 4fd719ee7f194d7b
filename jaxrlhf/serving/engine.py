"""Answers many requests in one batch: a thread that fills free slots between two chunks of decode steps.

All rows of a policy stand in one `decode.State` of a fixed number of slots and a fixed prompt width, so three programs do
everything: read one prompt, read several, write a chunk. Temperature and top-p are numbers of each row (`types.Draw`): a client
that asks for new ones causes no compilation. What a request is given depends on its own uid and prompt alone, not on who else
is being answered (`sampling/generate.py` says why).

A policy is swapped by standing a second bench of slots beside the first. What was asked before is answered to its end by the
weights that it began with; the old bench goes when it is empty.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxrlhf.core.types import Draw, Prompts, SamplingSpec
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models.model import EXACT, CacheConfig, Model
from jaxrlhf.sampling import decode, generate


class Busy(RuntimeError):
    """More requests wait than may, or the service ends."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is served. `spec`: what all requests share (stop ids, constraints, most tokens), at temperature 1, unfiltered."""

    model: Model
    params: Any
    tokenizer: Tokenizer
    spec: SamplingSpec
    version: str  # told to clients, and kept with what people say of its answers


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes of the programs, and how many may wait."""

    slots: int = 32  # rows decoded at once
    width: int = 0  # tokens that a prompt may have; 0: what the context leaves beside the answer
    chunk: int = 4  # decode steps between two looks at who waits
    waiting: int = 256  # requests that wait for a slot; one more is refused
    cache: CacheConfig = EXACT

    def __post_init__(self):
        for name in ("slots", "chunk", "waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Ask:
    """One row. `uid` names its random numbers: the same uid and prompt give the same tokens."""

    ids: tuple[int, ...]
    uid: int
    max_tokens: int
    temperature: float
    top_p: float


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a row has written since the last one. `end` is set in its last: stop, length or error."""

    tokens: list[int]
    logprobs: list[float]
    end: str = ""


@dataclasses.dataclass(eq=False)
class Running:
    """A row that waits or is being answered."""

    ask: Ask
    emit: Callable[[Piece], None]  # called in the engine's thread
    bench: Bench
    sent: int = 0
    cancelled: bool = False


class Bench:
    """The slots of one policy. All but `waiting` belongs to the engine's thread."""

    def __init__(self, policy: Policy, options: Options):
        """Raises:
        ValueError: prompt and answer do not fit the model, or the cache the memory.
        """
        self.policy, self.slots = policy, options.slots
        self.width = options.width or policy.model.max_length - policy.spec.max_tokens
        if self.width < 1:
            raise ValueError(
                f"max_tokens={policy.spec.max_tokens} leaves no place for a prompt in the context of "
                f"{policy.model.max_length} tokens: lower it"
            )
        given = generate.Options(chunk=options.chunk, cache=options.cache)
        self._key = jax.random.key(0)
        self._job = generate.make_job(
            policy.model, policy.params, self._nothing(self.slots), policy.spec, self._key, 1, given, None
        )
        self.waiting: collections.deque[Running] = collections.deque()
        self._several = max(1, self.slots // 4)  # prompts read at a time, where so many slots are free
        self.start()

    def start(self) -> None:
        """Empty slots."""
        job, empty = self._job, self._nothing(self.slots)
        self.rows: list[Running | None] = [None] * self.slots
        given = (job.weights, empty, self._key, None)
        _, self._state = decode.start_slots(job.model, job.spec, job.shape, self.slots, *given)

    def warm(self) -> None:
        """Compile all programs by running each once."""
        for count in {1, self._several}:
            self._read(self._nothing(count), np.arange(count, dtype=np.int32))
        self._advance()
        self.start()

    @property
    def busy(self) -> bool:
        """Whether somebody is being answered or waits."""
        return bool(self.waiting) or any(row is not None for row in self.rows)

    def turn(self) -> None:
        """Fill free slots, write a chunk, and hand out what was written."""
        self.rows = [None if row is None or row.cancelled else row for row in self.rows]
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        while free and (taken := self._next(len(free))):
            count = 1 if len(taken) == 1 else self._several
            slots, free = free[:count], free[len(taken) :]
            self._read(self._prompts([one.ask for one in taken], count), np.array(slots, np.int32))
            for slot, one in zip(slots, taken, strict=False):
                self.rows[slot] = one
        if any(row is not None for row in self.rows):
            self._hand_out(*self._advance())

    def fail(self) -> None:
        """Tell everybody that something went wrong, and begin with empty slots."""
        given = [row for row in self.rows if row is not None]
        self.start()
        for one in given:
            one.emit(Piece([], [], "error"))

    def _next(self, free: int) -> list[Running]:
        """Those who are next: several only where several slots are free, because the places left over are filled too."""
        most, taken = self._several if free >= self._several else 1, []
        while self.waiting and len(taken) < most:
            one = self.waiting.popleft()
            if not one.cancelled:
                taken.append(one)
        return taken

    def _hand_out(self, written: decode.Written, live: np.ndarray) -> None:
        for slot, one in enumerate(self.rows):
            if one is None:
                continue
            end = int(written.length[slot])
            new = slice(one.sent, end)
            reason = "" if live[slot] else "stop" if written.finished[slot] else "length"
            one.sent = end
            if reason:
                self.rows[slot] = None
            one.emit(Piece(written.tokens[slot, new].tolist(), written.logprobs[slot, new].tolist(), reason))

    def _read(self, prompts: Prompts, slots: np.ndarray) -> None:
        """Prompts into these slots."""
        job, count = self._job, slots.size
        given = (job.weights, prompts, 0, self._key, slots, None, self._state)
        _, self._state = decode.refill(job.model, job.spec, job.shape, count, *given)

    def _advance(self) -> tuple[decode.Written, np.ndarray]:
        job = self._job
        self._state, live = decode.advance(job.model, job.spec, job.steps, job.weights, self._state)
        written = self._state.rows.written
        told = (written.tokens, written.logprobs, written.length, written.finished, live)
        tokens, logprobs, length, finished, live = jax.device_get(told)
        return decode.Written(tokens, logprobs, logprobs, None, length, finished), live

    def _prompts(self, asks: list[Ask], count: int) -> Prompts:
        """Rows of these, and fillers up to `count`, which end at once."""
        made, draw = self._nothing(count), _no_draw(count)
        limit = np.zeros(count, np.int32)
        for row, ask in enumerate(asks):
            made.tokens[row, : len(ask.ids)] = ask.ids
            made.length[row], made.uid[row], limit[row] = len(ask.ids), ask.uid, ask.max_tokens
            draw.temperature[row], draw.top_p[row] = ask.temperature, ask.top_p
        return dataclasses.replace(made, limit=limit, draw=draw)

    def _nothing(self, count: int) -> Prompts:
        def filled(value: int) -> np.ndarray:
            return np.full(count, value, np.int32)

        tokens = np.zeros((count, self.width), np.int32)
        return Prompts(tokens, filled(1), filled(0), filled(0), limit=filled(0), draw=_no_draw(count))


def _no_draw(count: int) -> Draw:
    return Draw(np.ones(count, np.float32), np.ones(count, np.float32))


class Engine:
    """The thread that answers. Close it when done (`contextlib.closing`)."""

    def __init__(self, policy: Policy, options: Options = Options()):
        """Compiles the programs. Raises: ValueError, as `Bench`."""
        self._options = options
        self._changed = threading.Condition()
        self._ending = False
        self._benches = [Bench(policy, options)]  # the last is that of new requests
        self._benches[0].warm()
        self._thread = threading.Thread(target=self._work, name="serving engine", daemon=True)
        self._thread.start()

    @property
    def bench(self) -> Bench:
        """That which answers new requests."""
        return self._benches[-1]

    @property
    def settled(self) -> bool:
        """Whether one policy alone is in memory."""
        return len(self._benches) == 1

    def submit(self, bench: Bench, asks: list[Ask], emits: list[Callable[[Piece], None]]) -> list[Running]:
        """Ask the policy of this bench; `emits` are called in the engine's thread, one for each row.

        Raises:
            Busy: too many wait, or the service ends.
            ValueError: a row is empty or too long, or asks for more tokens than may be.
        """
        most = bench.policy.spec.max_tokens
        for ask in asks:
            if not 1 <= len(ask.ids) <= bench.width:
                raise ValueError(f"the prompt has {len(ask.ids)} tokens; 1 to {bench.width} are read")
            if not 1 <= ask.max_tokens <= most:
                raise ValueError(f"max_tokens={ask.max_tokens}: 1 to {most}")
        running = [Running(ask, emit, bench) for ask, emit in zip(asks, emits, strict=True)]
        with self._changed:
            if self._ending:
                raise Busy("the service ends")
            waiting = sum(len(each.waiting) for each in self._benches)
            if waiting + len(running) > self._options.waiting:
                raise Busy(f"{waiting} requests wait for a free slot")
            if bench not in self._benches:  # it was swapped and emptied between the request's reading and now
                self._benches.insert(0, bench)
            bench.waiting.extend(running)
            self._changed.notify()
        return running

    def cancel(self, running: list[Running]) -> None:
        """Give up rows whose client has gone; their slots are free at the next turn."""
        for one in running:
            one.cancelled = True

    def swap(self, policy: Policy) -> None:
        """Answer new requests by another policy, from when its programs are warm.

        Raises:
            ValueError: as `Bench`; the policy that is served goes on.
        """
        bench = Bench(policy, self._options)
        bench.warm()
        with self._changed:
            self._benches.append(bench)
            self._changed.notify()

    def close(self) -> None:
        """Answer what was asked, and end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._benches = [one for one in self._benches if one.busy or one is self._benches[-1]]
                while not any(one.busy for one in self._benches):
                    if self._ending:
                        return
                    self._changed.wait()
                    self._benches = [one for one in self._benches if one.busy or one is self._benches[-1]]
                benches = [one for one in self._benches if one.busy]
            for bench in benches:
                try:
                    bench.turn()
                except Exception:
                    logging.getLogger("uvicorn.error").exception("a chunk failed; its requests are told")
                    bench.fail()
