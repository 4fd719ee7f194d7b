"""The programs that jax compiles in a run: which, for how long, out of the cache or not; and, by choice, none after warm-up.

jax tells listeners (`jax.monitoring`) when it begins and ends to trace, lower and compile a function. What it tells within
another such span (functions inside functions, constants of a trace) is part of that.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.training.metrics import write_atomic

FILE = "programs.json"
_SPANS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_HIT = "/jax/compilation_cache/cache_hits"
_ASKED = "/jax/compilation_cache/compile_requests_use_cache"


@dataclasses.dataclass
class Program:
    """One compilation. Seconds by the wall clock; those of tracing and lowering where they were jax's own doing before it."""

    name: str
    during: str  # stage of the step, `start` before the first
    step: int | None  # before which it was compiled, None: before the first
    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    cached: bool | None = None  # read from the persistent cache; None: there is none


class Programs:
    """Listens from `open` to `close`. `allowed` says whether a program may be compiled now; where it may not, the call that
    needs it raises."""

    def __init__(self, out: Path | None = None, allowed: Callable[[], bool] = lambda: True, show: bool | None = None):
        self.found: list[Program] = []
        self.seconds = 0.0  # of the thread that opened this: what compiling has cost it so far
        self.during, self.step = "start", None
        self._out, self._allowed = out, allowed
        self._show = sys.stderr.isatty() if show is None else show
        self._threads = threading.local()
        self._main = threading.get_ident()
        self._reasons = _Reasons()
        self._explained = self._before = False
        self._lock = threading.Lock()
        self._jobs: dict[str, concurrent.futures.Future] = {}

    def open(self) -> Programs:
        """Begin to listen."""
        self._main = threading.get_ident()
        jax.monitoring.register_scalar_listener(self._begins)
        jax.monitoring.register_event_duration_secs_listener(self._ends)
        jax.monitoring.register_event_listener(self._happens)
        return self

    def close(self) -> None:
        """End to listen, and write the table."""
        for job in self._jobs.values():
            job.cancel()
        with contextlib.suppress(ValueError, AssertionError):  # someone has cleared all listeners
            jax.monitoring.unregister_scalar_listener(self._begins)
            jax.monitoring.unregister_event_duration_listener(self._ends)
            jax.monitoring.unregister_event_listener(self._happens)
        self.explain(False)
        self.write()

    def explain(self, on: bool) -> None:
        """Have jax say why it traces a function again, for the message of a refusal."""
        if on != self._explained:
            self._explained = on
            self._before = explaining() if on else self._before
            jax.config.update("jax_explain_cache_misses", on or self._before)
            self._reasons.listen(on)

    @contextlib.contextmanager
    def at(self, during: str, step: int | None) -> Iterator[None]:
        """Programs compiled inside belong to this stage of this step."""
        before, (self.during, self.step) = (self.during, self.step), (during, step)
        try:
            yield
        finally:
            self.during, self.step = before

    def ahead(self, jobs: dict[str, Callable[[], None]], context: Callable[[], Any]) -> None:
        """Run jobs that compile, one after another, in a thread of their own, inside `context()`. One that fails ends those
        after it, and `wait` for any of them raises what it raised."""
        pool = concurrent.futures.ThreadPoolExecutor(1, initializer=lambda: self.name_thread("ahead"))
        for name, job in jobs.items():
            self._jobs[name] = pool.submit(_after, list(self._jobs.values()), job, context)
        pool.shutdown(wait=False)

    def name_thread(self, name: str) -> None:
        """What the thread that calls this compiles belongs to the stage of this name, whatever the main one is at."""
        self._mine().update(name=name)

    def wait(self, name: str) -> bool:
        """Wait until the job of this name is done; whether there was one that nobody had waited for."""
        job = self._jobs.pop(name, None)
        if job is not None:
            job.result()
        return job is not None

    def write(self) -> None:
        """The table as `programs.json` in the run's directory; a run that goes on adds to it."""
        if self._out is None or not self.found:
            return
        rows = [dataclasses.asdict(program) for program in self.found]
        write_atomic(self._out / FILE, json.dumps({"programs": rows}, indent=1) + "\n")

    def table(self, least: float = 0.1) -> str:
        """Those that took `least` seconds or more, longest first, and the sum of all others, as text."""
        return table(self.found, least)

    # ---------------------------------------------------------------------------------------- what jax calls

    def _begins(self, event: str, value: float, **notes: Any) -> None:
        if event not in _SPANS:
            return
        mine, name = self._mine(), _plain(str(notes.get("fun_name", "")))
        if _SPANS[event] == "compile" and threading.get_ident() == self._main and not self._allowed():
            mine["open"].clear()
            raise ValueError(self._refusal(name))
        if not mine["open"]:
            mine["since"] = time.perf_counter()
        mine["open"].append(event)
        if _SPANS[event] == "compile":
            mine["asked"], mine["hit"] = False, False
            self._tell(f"compiling {name} ({len(self.found) + 1})")

    def _ends(self, event: str, duration_secs: float, **notes: Any) -> None:
        if event not in _SPANS:
            return
        mine, name, kind = self._mine(), _plain(str(notes.get("fun_name", ""))), _SPANS[event]
        # An exception may have left inner spans open.
        while mine["open"] and mine["open"].pop() != event:
            pass
        depth = len(mine["open"])  # functions traced within another are part of it, not waiting to be compiled
        if not depth and threading.get_ident() == self._main:
            self.seconds += time.perf_counter() - mine["since"]
        waiting = mine["waiting"].setdefault((depth, name), {"trace": 0.0, "lower": 0.0})
        if kind != "compile":
            waiting[kind] += duration_secs
            return
        del mine["waiting"][depth, name]
        cached = mine["hit"] if mine["asked"] else None
        during = mine.get("name", self.during)
        with self._lock:
            self.found.append(Program(name, during, self.step, waiting["trace"], waiting["lower"], duration_secs, cached))
        self._tell("")

    def _happens(self, event: str, **notes: Any) -> None:
        if event in (_ASKED, _HIT):
            self._mine()["asked" if event == _ASKED else "hit"] = True

    def _mine(self) -> dict[str, Any]:
        """What this thread has open."""
        found = self._threads.__dict__
        return found.setdefault("state", {"open": [], "since": 0.0, "waiting": {}, "asked": False, "hit": False})

    def _refusal(self, name: str) -> str:
        reason = self._reasons.of(name)
        why = f"jax says: {reason}" if reason else "jax gives no reason: shapes may be as before, and shardings or settings not"
        where = f"at step {self.step}, {self.during}" if self.step is not None else self.during
        return (
            f"strict: '{name}' would be compiled {where}, after warm-up. {why}. Give it equal shapes each time, warm it up in "
            "the first step, or run without --watch.strict"
        )

    def _tell(self, text: str) -> None:
        if self._show:
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)


# Where jax logs that it found nothing in a cache.
_LOGGERS = ("jax._src.interpreters.partial_eval", "jax._src.compiler", "jax._src.compilation_cache")


class _Reasons:
    """Keeps what jax logs about functions that it traces again, in place of printing it."""

    def __init__(self) -> None:
        self._last: list[str] = []

    def listen(self, on: bool) -> None:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            (logger.addFilter if on else logger.removeFilter)(self._hear)

    def _hear(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "CACHE MISS" not in text:
            return True
        if "TRACING" in text:
            self._last = [*self._last[-20:], " ".join(text.split())]
        return False

    def of(self, name: str) -> str:
        """The last reason that names this function."""
        return next((text for text in reversed(self._last) if f"for {name} defined" in text), "")


def table(found: list[Program], least: float = 0.1) -> str:
    """Programs as text: those that took `least` seconds or more in the order of their time, and the sum of the others."""
    whole = sorted(found, key=lambda p: p.trace + p.lower + p.compile, reverse=True)
    large = [p for p in whole if p.trace + p.lower + p.compile >= least]
    lines: list[tuple[str, ...]] = [("program", "during", "trace s", "lower s", "compile s", "cache")]
    for p in large:
        cache = {True: "read", False: "compiled", None: "none"}[p.cached]
        lines.append((p.name, p.during, f"{p.trace:.2f}", f"{p.lower:.2f}", f"{p.compile:.2f}", cache))
    small = whole[len(large) :]
    sums = [sum(getattr(p, kind) for p in part) for part in (small, whole) for kind in ("trace", "lower", "compile")]
    hits = f"{sum(p.cached is True for p in whole)} of {len(whole)} read"
    if small:
        lines.append((f"{len(small)} smaller ones", "", *(f"{x:.2f}" for x in sums[:3]), ""))
    lines.append((f"{len(whole)} in all", "", *(f"{x:.2f}" for x in sums[3:]), hits))
    widths = [max(len(line[i]) for line in lines) for i in range(6)]

    def row(line: tuple[str, ...]) -> str:
        cells = zip(line, widths, (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust), strict=True)
        return "  ".join(align(cell, width) for cell, width, align in cells).rstrip()

    return "\n".join(map(row, lines))


def _after(before: list[concurrent.futures.Future], job: Callable[[], None], context: Callable[[], Any]) -> None:
    for each in before:
        each.result()
    with context():
        job()


def explaining() -> bool:
    """Whether jax is asked to say why it traces."""
    config: Any = jax.config
    return config.jax_explain_cache_misses


def _plain(name: str) -> str:
    """`jit(f)` as f."""
    return name[4:-1] if name.startswith("jit(") and name.endswith(")") else name
