"""Where the time of a step goes, and what it achieves: stages that add up, tokens and FLOPs a second, memory, compilations.

A row of figures covers the time from one `Run.log` to the next, so that a row's `time/save` is that of the save before it.
Every moment belongs to one stage: the innermost one that is open, `compile` while jax compiles, `other` between stages.
Device work is asynchronous: with `Options.wait` a stage waits at its end for what it started, else the wait, and so the time,
falls to the stage that next needs the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxrlhf.training import chips, flops
from jaxrlhf.training.flops import Pass, Rows
from jaxrlhf.training.programs import Programs

Stage = Literal["data", "rollout", "score", "update", "evaluate", "record", "save", "compile", "profile", "other"]
Figures = dict[str, int | float]
FIGURES = ("time/", "throughput/", "memory/", "compile/")  # what a row of the clock's own begins with
ASIDE = ("evaluate", "record", "save", "compile", "profile")  # no part of a step's own time, which rates are taken over


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is watched; nothing that it computes depends on it."""

    wait: bool = True  # for a stage's results at its end, so that its time is its own; costs the overlap with the next
    profile_steps: tuple[int, ...] = ()  # steps of which jax.profiler writes a trace into the run's `profile` folder
    strict: bool = False  # refuse to compile once each stage has been through a step
    wandb: str = ""  # project of Weights & Biases that gets the rows of metrics too; '': none
    product_rate: float | None = None  # FLOP/s of one device, for MFU; None: that of the chip's name, on a CPU no MFU

    def __post_init__(self):
        if any(step < 0 for step in self.profile_steps):
            raise ValueError(f"profile_steps={self.profile_steps}: steps are 0, 1, 2, ...")
        if self.product_rate is not None and not self.product_rate > 0:
            raise ValueError(f"product_rate={self.product_rate} must be > 0, in FLOP/s of one device; None takes the chip's")


@dataclasses.dataclass
class Counted:
    """What was computed since the last row."""

    tokens: float = 0.0  # real ones learned from, each once
    computed: float = 0.0  # the same with padding
    written: float = 0.0  # response tokens sampled
    row_steps: float = 0.0  # rows x steps that sampling took
    model: Figures = dataclasses.field(default_factory=dict)  # FLOPs by stage, of real tokens
    hardware: Figures = dataclasses.field(default_factory=dict)  # the same with what is computed again

    def sampled(self, operations: int | float, written: int | float, chunks: Sequence[tuple[int, int]]) -> None:
        """Responses of so many tokens, and (rows, steps) of each chunk that was decoded for them."""
        for found in (self.model, self.hardware):
            found["rollout"] = found.get("rollout", 0.0) + operations
        self.written += float(written)
        self.row_steps += sum(rows * steps for rows, steps in chunks)

    def add(self, stage: str, passes: Sequence[Pass], rows: Rows, times: int | float = 1) -> None:
        """Passes of one stage over the same rows."""
        for found, count in ((self.model, flops.model), (self.hardware, flops.hardware)):
            found[stage] = found.get(stage, 0.0) + times * sum(count(one, rows) for one in passes)


class Clock:
    """Made by `Run`. Scripts wrap what they call (`timed`, `learner`) and leave their loop as it is."""

    def __init__(
        self, options: Options = Options(), out: Path | None = None, now: Callable[[], int | float] = time.perf_counter
    ):
        self.options = options
        self.programs = Programs(out, self._may_compile)
        self.count = Counted()
        self.spent: Figures = {}  # seconds by stage since the last row
        self._out, self._now = out, now
        self._open: list[str] = []  # stages, the innermost last
        self._since, self._compiled, self._programs = now(), 0.0, 0
        self._warm: set[str] = set()  # stages that have been through a step
        self._seen: set[str] = set()  # stages of this step
        self._profiling = False

    # ------------------------------------------------------------------------------------------------- for `Run`

    def steps(self, steps: Iterable[int], total: int) -> Iterator[int]:
        """The steps of a run of `total`, each with its trace of the profiler where one is asked for.

        Raises:
            ValueError: a step to profile that the run does not have.
        """
        if late := [step for step in self.options.profile_steps if step >= total]:
            asked = self.options.profile_steps
            raise ValueError(f"profile_steps={asked}: the run ends before step {total}, so {late} never come")
        self._restart()
        first = True
        try:
            for step in steps:
                self._profile(step)
                self._seen = {"other"}
                with self.programs.at("other", step):
                    yield step
                self._warm |= self._seen
                self.programs.explain(self.options.strict)
                if first:
                    self.programs.write()
                first = False
        finally:
            self._warm = set()
            self.programs.explain(False)
            self._profile(None)

    def row(self) -> Figures:
        """The figures of the time since the last row, or since `steps` began, for a row of metrics."""
        before = self._programs
        spent, count = self._restart()
        wall = sum(spent.values())
        found: Figures = {"time/step": wall} | {f"time/{stage}": seconds for stage, seconds in spent.items()}
        own = wall - sum(spent.get(stage, 0.0) for stage in ASIDE)
        found |= _rates(count, spent, own, self._product_rate()) | memory()
        return found | {"compile/programs": self._programs - before}

    def _restart(self) -> tuple[Figures, Counted]:
        """Seconds by stage, and what was counted, up to this moment; from it on both begin anew."""
        self._account()
        done = self.spent, self.count
        self.spent = dict.fromkeys(self.spent, 0.0)  # a stage that was has a column from then on
        self.count, self._programs = Counted(), len(self.programs.found)
        return done

    def _account(self) -> None:
        """Give the time since the last call to the stage that is open, but what jax compiled in it."""
        now, compiled = self._now(), self.programs.seconds
        stage = self._open[-1] if self._open else "other"
        spent, compiling = now - self._since, compiled - self._compiled
        for name, seconds in ((stage, spent - compiling), ("compile", compiling)):
            self.spent[name] = self.spent.get(name, 0.0) + seconds
        self._since, self._compiled = now, compiled

    def _may_compile(self) -> bool:
        return not self.options.strict or (self._open[-1] if self._open else "other") not in self._warm

    def _profile(self, step: int | None) -> None:
        out = self._out if step in self.options.profile_steps else None
        if self._profiling or out is not None:
            with self.within("profile"):
                if self._profiling:
                    jax.profiler.stop_trace()
                if out is not None:
                    jax.profiler.start_trace(out / "profile" / f"step_{step}")
        self._profiling = out is not None

    def _product_rate(self) -> int | float | None:
        """FLOP/s of all devices together, as far as it is known."""
        chip = chips.of(jax.devices()[0])
        rate = self.options.product_rate or (None if chip is None else chip.product)
        return None if rate is None else rate * jax.device_count()

    # --------------------------------------------------------------------------------------------- for scripts

    @contextlib.contextmanager
    def within(self, stage: Stage) -> Iterator[None]:
        """The time inside is this stage's."""
        self._account()
        self._open.append(stage)
        self._seen.add(stage)
        try:
            with self.programs.at(stage, self.programs.step):
                yield
        finally:
            self._account()
            self._open.pop()

    def timed(self, stage: Stage, function: Callable, after: str = "") -> Callable:
        """`function`, whose time is this stage's; `after` the job of this name that compiles ahead (`Programs.ahead`)."""

        def call(*args, **named):
            self.compiled(after)
            with self.within(stage):
                return self.settled(function(*args, **named))

        return call

    def learner(self, step: Callable, *passes: Pass, times: int = 1) -> Callable:
        """A train step (state, frozen, batch) -> (state, metrics) whose time is the update's, and whose work is counted:
        `passes` over the batch's rows, `times` (epochs) each.

        A batch has `tokens` [..., T] with `segments`, or with `prompt_len` and `response_len`; and packed rows `text`, or none.
        """

        def call(state, frozen, batch):
            self.compiled("update")
            with self.within("update"):
                state, metrics = step(state, frozen, batch)
                self._learned(batch, passes, times)  # the device is at work meanwhile
                self.settled(metrics)
            return state, metrics

        call.lower = getattr(step, "lower", None)
        return call

    def compiled(self, name: str) -> None:
        """Wait for a job that compiles ahead, if there is one of this name; the time is the compiler's."""
        with self.within("compile"):
            self.programs.wait(name)

    def scored(self, batch: Any, *passes: Pass) -> None:
        """Count the work of reading a batch of rows, as `learner` does, without learning."""
        if (rows := rows_of(batch)) is not None:
            self.count.add("score", passes, rows)

    def settled(self, results: Any) -> Any:
        """`results`, waited for where that is asked for."""
        return jax.block_until_ready(results) if self.options.wait else results

    def _learned(self, batch: Any, passes: Sequence[Pass], times: int) -> None:
        rows = rows_of(batch)
        if rows is None:
            return
        self.count.add("update", passes, rows, times)
        self.count.tokens += rows.tokens
        self.count.computed += batch.tokens.size
        if getattr(batch, "text", None) is not None:
            self._learned(batch.text, [one for one in passes if one.logits and one.gradient], times)


def is_here(x: Any) -> bool:
    """Whether this process can read all of an array."""
    return isinstance(x, np.ndarray) or x.is_fully_addressable


def rows_of(batch: Any) -> Rows | None:
    """The real rows of a batch; None where another host holds a part of them."""
    segments = getattr(batch, "segments", None)
    read = (segments,) if segments is not None else (batch.prompt_len, batch.response_len)
    if not all(map(is_here, read)):
        return None
    return flops.packed(np.asarray(segments)) if segments is not None else flops.real(*(np.asarray(x) for x in read))


def _rates(count: Counted, spent: Figures, own: int | float, rate: int | float | None) -> Figures:
    """Figures a second of a step's own time, as far as anything was counted."""
    found: Figures = {}
    if own <= 0:
        return found
    if count.tokens:
        found["throughput/tokens_per_s"] = count.tokens / own
        found["throughput/padding_efficiency"] = count.tokens / count.computed
    if count.written and spent.get("rollout", 0.0) > 0:
        found["throughput/rollout_tokens_per_s"] = count.written / spent["rollout"]
        found["throughput/rollout_utilisation"] = count.written / count.row_steps
    if not (done := sum(count.model.values())):
        return found
    found["throughput/model_flops_per_s"] = done / own
    if rate is not None:
        found["throughput/mfu"] = done / own / rate
        found["throughput/hfu"] = sum(count.hardware.values()) / own / rate
        for stage, part in count.model.items():
            if spent.get(stage, 0.0) > 0:
                found[f"throughput/mfu_{stage}"] = part / spent[stage] / rate
    return found


def memory() -> Figures:
    """The most bytes that were ever held: by the fullest device, or where devices do not say (a CPU) by the process."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [size for size in found if size is not None]
    if known and len(known) == len(found):
        return {"memory/device_peak_bytes": max(known)}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory/process_peak_bytes": most if sys.platform == "darwin" else 1024 * most}
