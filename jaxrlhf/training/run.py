"""A run's directory: lock, settings, signals, alarms, metrics, events, checkpoints, result.

with Run.open(config.out, config) as run:
    state = run.restore(state)
    for step in run.steps(run.start, total, "ppo"):
        state, metrics = train_step(state, frozen, batch(step))
        run.log(step, metrics, batch)
        run.maybe_save(step, state)
    run.done({"loss": ...})

`run.best(step, metric, value, params)` keeps the best of the steps that were measured.

In a job of several processes all call the same methods in the same order. The first one holds the lock and writes; it tells
the others what it read, and all agree when to save and to end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxrlhf
from jaxrlhf.core import processes
from jaxrlhf.training import directory, events, guards, recorder, saves, session, timing
from jaxrlhf.training.ending import Ending
from jaxrlhf.training.metrics import Metrics, check_wandb, write_atomic
from jaxrlhf.training.metrics import read as read_metrics
from jaxrlhf.training.progress import Progress


class Run:
    """A run in its own directory. Made by `Run.open`, used as a context manager."""

    def __init__(
        self, out: Path, lock: int | None, save_seconds: int | float, tensorboard: bool, watch: timing.Options | None = None
    ):
        self.out = out
        self.clock = timing.Clock(watch or timing.Options(), out if processes.is_first() else None)
        self._watched = watch is not None
        self.start = 0  # number of steps already done, set by `restore`
        # Of a run that is done, else None.
        self.result: dict[str, Any] | None = processes.by_first(lambda: directory.read_json(out / "result.json"))
        mark = processes.by_first(lambda: directory.read_json(out / directory.MARK))
        self._mark: dict[str, Any] = mark or {"seconds": 0.0, "cpu_seconds": 0.0}
        self._lock = lock
        self._save_seconds = save_seconds
        self._tensorboard = tensorboard
        self._metrics: Metrics | None = None
        self._samples: recorder.Samples | None = None
        self._total = 0  # steps
        self._events = events.Events(out, writes=processes.is_first())
        self._saves = saves.Saves(out, self._events)
        self._described = False  # environment.json is of this process
        self._watch: guards.Watch | None = None
        self._batch: Any = None  # of the last step logged
        self._ending = Ending()
        self._saved_at = self._opened = time.monotonic()
        self._cpu_opened = time.process_time()

    @classmethod
    def open(
        cls,
        out: str | Path,
        config: Any,
        save_seconds: int | float = 30,
        tensorboard: bool = True,
        free: tuple[str, ...] = ("out", "mesh", "watch", "offload"),
    ) -> Run:
        """Take the directory `out`: a new or empty one, or that of a run with the same settings but those in `free`.

        Where the settings have a `watch` (`timing.Options`), its clock hears of every program that jax compiles, and rows have
        its figures.

        Raises:
            ValueError: it belongs to something else, to a run with other settings or to one that is running, or cannot
                be written; or wandb is asked for and absent. It is left as it was.
        """
        out, watch = Path(out).expanduser().absolute(), getattr(config, "watch", None)
        check_wandb("" if watch is None else watch.wandb)
        try:
            lock = processes.by_first(lambda: directory.take(out, config, free))
            lock = lock if processes.is_first() else None  # the number means nothing to another process
            try:
                asked = session.current().save_seconds
                seconds = save_seconds if asked is None else asked
                return cls(out, lock, seconds, tensorboard, watch)
            except BaseException:
                if lock is not None:
                    os.close(lock)
                raise
        except OSError as error:
            raise ValueError(f"cannot write to the run directory {out}: {error.strerror}; choose another --out") from error

    def __enter__(self) -> Run:
        self._ending.listen()
        if self._watched:
            self.clock.programs.open()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if self._watched:
                self.clock.programs.close()
            if not self._ending.at_once:
                self._finish_saving()
        except (OSError, ValueError) as unsaved:
            if error is None:
                raise
            print(f"{unsaved}", file=sys.stderr)  # and what ended the run goes on its way
        finally:
            try:
                if self._metrics is not None:
                    self._metrics.close()
                if self._samples is not None:
                    self._samples.close()
                self._write_times()
                self._events.close()
            finally:
                self._ending.leave()
                if self._lock is not None:
                    os.close(self._lock)  # which gives the lock back

    def restore(self, state: Any) -> Any:
        """`state` as the newest checkpoint has it (or that of `--from-step`), or as it is where there is none. Sets `start`.

        Raises:
            ValueError: the checkpoint, or the best step that it names, is damaged or of another model.
            FileNotFoundError: there are checkpoints, but none of `--from-step`.
        """
        self._describe()
        state, self.start = self._saves.restore(state)
        return state

    def once(self, name: str, value: Callable[[], Any]) -> Any:
        """A fact from outside, as JSON, that this run goes by: asked for once, and then saved with every checkpoint.

        Such as the last event of a feedback store: a run that goes on reads what it read before, whatever came since.
        """
        return self._saves.once(name, value)

    def rejects(self) -> Path:
        """Where a reader of a data file writes the lines that it leaves out: all processes read, the first one writes."""
        return self.out / "rejects.jsonl" if processes.is_first() else Path(os.devnull)

    def left_out(self, path: Path, rejects: Path) -> None:
        """Say how many lines of a data file are not used, which a reader wrote to `rejects`."""
        if not processes.is_first():
            return
        count = rejects.read_text(encoding="utf-8").count("\n")
        self._events.write("left out", file=str(path), lines=count)
        if count:
            print(f"{path}: {count} bad line(s) left out; {rejects} says which and why", file=sys.stderr)

    def steps(self, start: int, total: int, name: str, show: tuple[str, ...] = ()) -> Iterator[int]:
        """start, ..., total - 1 with progress on a terminal: step, rate, time left, and the metrics named in `show`.

        Raises:
            SystemExit: before the next step, when a signal came or the time is up and no `maybe_save` took it.
        """
        self._describe()
        self._total = total
        progress = Progress(name, start, total) if sys.stderr.isatty() and processes.is_first() else None
        try:
            for step in self.clock.steps(self._ending.steps(start, total), total):
                if progress is not None:
                    last = self._metrics.last if self._metrics else {}
                    progress.show(step, {k: last[k] for k in show if k in last})
                yield step
        finally:
            if progress is not None:
                progress.end()

    def log(self, step: int, metrics: dict[str, Any], batch: Any = None) -> None:
        """Append a row to metrics.jsonl and to TensorBoard, with the clock's figures where it is watched. Device scalars are
        fetched one step later.

        `batch` is what the step learned from: it is written down if it stops the run.

        Raises:
            ValueError: three updates in a row were left out because a gradient was not finite, or under `--stop-on-alarm`
                the loss jumped or the KL ran away.
        """
        self._log().log(step, metrics | (self.clock.row() if self._watched else {}))
        self._look()
        self._batch = batch

    def sample(self, step: int, rows: Callable[..., list[dict[str, Any]]], *given: Any) -> None:
        """Keep a few rollouts of this step, made by `rows(*given)`, in samples.jsonl, if it is one of those kept there."""
        if not recorder.due(step, self._total):
            return
        with self.clock.within("record"):
            found = rows(*given)
            if not self._kept_samples().write(step, found):
                self._events.write("samples left out", step=step, reason=f"{recorder.FILE} would pass {recorder.LARGEST} bytes")

    def best(self, step: int, metric: str, value: int | float, params: Any, higher: bool = True) -> None:
        """After `step` updates the held-out figure `metric` was `value`: if no step before was better, keep `params` as the
        best, a checkpoint of its own in `best/` that is never removed as long as the run counts it as the best.

        Raises:
            ValueError: the best so far is by another metric.
            OSError, ValueError: this or the last save could not be written.
        """
        # Not of "save": a strict run would hold that to be warm after the first step, before the whole state was ever saved.
        with self.clock.within("evaluate"):
            self._saves.best(step, metric, float(value), params, higher)

    def best_params(self, like: Any) -> Any:
        """The parameters of the best step, verified; `like` gives their structure and where they go.

        Raises:
            ValueError: `best` was never called with a number, or what is kept is damaged.
        """
        return self._saves.best_params(like)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl so far, without the clock's figures: what the run found, the same on any machine."""
        self._log().flush()
        rows = processes.by_first(lambda: read_metrics(self.out))
        return [{k: v for k, v in row.items() if not k.startswith(timing.FIGURES)} for row in rows]

    def maybe_save(self, step: int, state: Any, last: bool = False) -> None:
        """After step `step`: save when it is time, when `last`, or when a signal or the clock asks the run to end.

        The save goes on in the background; what it could not write is told by the next call.

        Raises:
            SystemExit: 128 + the signal, or 75 when the time is up (`--max-minutes`), after a whole save.
            OSError, ValueError: this or the last save could not be written.
        """
        ready = self._saves.ready()
        # Of several processes one may be past the time and another not: they agree.
        ending, due = self._ending.asked(ready and time.monotonic() - self._saved_at >= self._save_seconds)
        if ready:
            self._finish_saving()
        if last or ending or due:
            with self.clock.within("save"):
                self._save(step, state)
        if ending:
            self._finish_saving()
            self._events.write("asked to end", step=step + 1, reason=self._ending.reason)
            self._ending.end_if_asked()

    def _save(self, step: int, state: Any) -> None:
        """Begin to save the state after step `step`. The metrics up to it are on the disk before the checkpoint counts."""
        self._finish_saving()
        self._log().sync()
        self._look()
        self._write_times()
        guard = self._watch.guard.state if self._watch else {}
        has = processes.by_first((self.out / recorder.FILE).is_file)  # of a run that keeps any
        kept = {"metrics_bytes": self._log().size(), "samples_bytes": self._kept_samples().sync() if has else 0}
        self._saved_at = time.monotonic()
        self._saves.begin(step + 1, state, {"guard": guard} | kept)

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        self._saves.finish()
        self._ending.save_took = self._saves.took

    def _look(self) -> None:
        """Let the watch read a row that was written since it last did."""
        if self._watch is None:
            self._watch = guards.Watch(self.out, self._events, self._saves.notes().get("guard"))
        self._watch.read(self._log().last, self._batch)

    def done(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json, with the best step where there is one and the seconds that the run took in all its sessions; a
        run that has one is not done again."""
        self._finish_saving()
        if (best := self._saves.best_so_far()) is not None:
            result = {**result, "best": best}
        self.result = written = processes.by_first(lambda: self._write_result(result))
        self._events.write("done")
        return written

    def _write_result(self, result: dict[str, Any]) -> dict[str, Any]:
        self._write_times()
        times = {k: round(self._mark[k], 3) for k in ("seconds", "cpu_seconds")}
        result = {**result, **times}
        write_atomic(self.out / "result.json", json.dumps(result, indent=1, default=lambda x: x.item()) + "\n")
        return result

    def _log(self) -> Metrics:
        if self._metrics is None:
            size = self._saves.notes().get("metrics_bytes", 0)

            def first() -> None:
                self._metrics = Metrics(self.out, self.start, size, self._tensorboard, wandb=self.clock.options.wandb)

            processes.by_first(first)
        if self._metrics is None:
            self._metrics = Metrics(self.out, self.start, writes=False)
        return self._metrics

    def _kept_samples(self) -> recorder.Samples:
        if self._samples is None:
            size = self._saves.notes().get("samples_bytes", 0)

            def first() -> None:
                self._samples = recorder.Samples(self.out, self.start, size)

            processes.by_first(first)
        if self._samples is None:
            self._samples = recorder.Samples(self.out, self.start, writes=False)
        return self._samples

    def _describe(self) -> None:
        """Write environment.json once a process, and say what is another than before."""
        if not self._described:
            self._described = True
            changed = processes.by_first(lambda: events.settle_environment(self.out))
            self._events.write("started", version=jaxrlhf.__version__, changed=changed)

    def _write_times(self) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self._mark["seconds"] += now - self._opened
        self._mark["cpu_seconds"] += cpu - self._cpu_opened
        self._opened, self._cpu_opened = now, cpu
        self._mark["version"] = jaxrlhf.__version__
        if processes.is_first():
            write_atomic(self.out / directory.MARK, json.dumps(self._mark, indent=1) + "\n")
