"""A run's directory: lock, settings, signals, progress, metrics, checkpoints, result.

with Run.open(config.out, config) as run:
    state = run.restore(state)
    for step in run.steps(run.start, total, "ppo"):
        state, metrics = train_step(state, frozen, batch(step))
        run.log(step, metrics)
        run.maybe_save(step, state)
    run.done({"loss": ...})
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxrlhf
from jaxrlhf.core import processes
from jaxrlhf.training import cli
from jaxrlhf.training.metrics import Metrics, write_atomic
from jaxrlhf.training.metrics import read as read_metrics

MARK = "run.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run:
    """A run in its own directory. Made by `Run.open`, used as a context manager."""

    def __init__(self, out: Path, lock: int | None, save_seconds: int | float, tensorboard: bool):
        self.out = out
        self.start = 0  # number of steps already done, set by `restore`
        self.result: dict[str, Any] | None = processes.by_first(
            lambda: _read_json(out / "result.json")
        )  # of a run that is done, else None
        self._mark = (_read_json(out / MARK) if processes.is_first() else None) or {"seconds": 0.0, "cpu_seconds": 0.0}
        self._lock = lock
        self._save_seconds = save_seconds
        self._tensorboard = tensorboard
        self._metrics: Metrics | None = None
        self._signal = 0  # that came to this process
        self._agreed = 0  # that came to one of them, as all know
        self._stepping = False
        self._handlers: dict[int, Any] = {}
        self._saved_at = self._opened = time.monotonic()
        self._cpu_opened = time.process_time()

    @classmethod
    def open(
        cls,
        out: str | Path,
        config: Any,
        save_seconds: int | float = 30,
        tensorboard: bool = True,
        free: tuple[str, ...] = ("out", "mesh", "offload"),
    ) -> Run:
        """Take the directory `out`: a new or empty one, or that of a run with the same settings (but those in `free`).

        Raises:
            ValueError: it belongs to something else, to a run with other settings or to one that is running, or cannot
                be written. It is left as it was.
        """
        out = Path(out).expanduser().absolute()
        try:
            lock = processes.by_first(lambda: _take(out, config, free))
            lock = lock if processes.is_first() else None  # the number means nothing to another process
            try:
                return cls(out, lock, save_seconds, tensorboard)
            except BaseException:
                if lock is not None:
                    os.close(lock)
                raise
        except OSError as error:
            raise ValueError(f"cannot write to the run directory {out}: {error.strerror}; choose another --out") from error

    def __enter__(self) -> Run:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if self._metrics is not None:
                self._metrics.close()
            self._write_times()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            if self._lock is not None:
                os.close(self._lock)  # which gives the lock back

    def restore(self, state: Any) -> Any:
        """`state` as the newest checkpoint has it, or as it is where there is none. Sets `start`.

        Raises:
            ValueError: the checkpoint is damaged or of another model.
        """
        from jaxrlhf.training import checkpoint

        if processes.by_first(lambda: checkpoint.latest(self._checkpoints)) is not None:
            state, self.start = checkpoint.restore(self._checkpoints, state)
        return state

    def steps(self, start: int, total: int, name: str, show: tuple[str, ...] = ()) -> Iterator[int]:
        """start, ..., total - 1 with progress on a terminal: step, rate, time left, and the metrics named in `show`.

        Raises:
            SystemExit: 128 + the signal, before the next step, when a signal came and no `maybe_save` took it.
        """
        progress = _Progress(name, start, total) if sys.stderr.isatty() and processes.is_first() else None
        self._stepping = True  # a signal waits for the end of the step
        try:
            for step in range(start, total):
                self.check_signal()
                if progress is not None:
                    last = self._metrics.last if self._metrics else {}
                    progress.show(step, {k: last[k] for k in show if k in last})
                yield step
            self.check_signal()
        finally:
            self._stepping = False
            if progress is not None:
                progress.end()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and to TensorBoard. Device scalars are fetched one step later.

        Raises:
            ValueError: three updates in a row were left out because a gradient was not finite.
        """
        self._log().log(step, metrics)
        if self._log().last.get("optimizer/skipped_in_a_row", 0) >= 3:
            raise ValueError(
                f"step {self._log().last['step']}: the gradient was not finite for 3 updates in a row; "
                f"{self.out} keeps the last good state. A lower learning rate or a smaller clip_norm may help"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl so far."""
        self._log().flush()
        return processes.by_first(lambda: read_metrics(self.out))

    def maybe_save(self, step: int, state: Any, last: bool = False) -> None:
        """After step `step`: save when it is time, when `last`, or when a signal asks the run to end.

        Raises:
            SystemExit: 128 + the signal, after saving.
        """
        due = self._agree(time.monotonic() - self._saved_at >= self._save_seconds)
        if last or self._agreed or due:
            self.save(step, state)
        self.check_signal()

    def save(self, step: int, state: Any) -> None:
        """Save the state after step `step`. The metrics up to it are on the disk before the checkpoint counts."""
        from jaxrlhf.training import checkpoint

        self._log().sync()
        self._write_times()
        checkpoint.save(self._checkpoints, step + 1, state)
        self._saved_at = time.monotonic()

    def check_signal(self) -> None:
        """End the process if a signal asked for it.

        Raises:
            SystemExit: 128 + the signal.
        """
        self._agree(False)
        if self._agreed:
            print(f"stopped by {signal.Signals(self._agreed).name}; the same command goes on from here", file=sys.stderr)
            raise SystemExit(128 + self._agreed)

    def _agree(self, due: bool) -> bool:
        """Take over a signal that came to any process of the job; whether one of them says that it is time to save."""
        self._agreed, due_somewhere = processes.largest(self._signal, int(due))
        return bool(due_somewhere)

    def done(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json, with the seconds that the run took in all its sessions; a run that has one is not done again."""
        self.result = written = processes.by_first(lambda: self._write_result(result))
        return written

    def _write_result(self, result: dict[str, Any]) -> dict[str, Any]:
        self._write_times()
        times = {k: round(self._mark[k], 3) for k in ("seconds", "cpu_seconds")}
        result = {**result, **times}
        write_atomic(self.out / "result.json", json.dumps(result, indent=1, default=lambda x: x.item()) + "\n")
        return result

    @property
    def _checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _log(self) -> Metrics:
        if self._metrics is None:
            self._metrics = Metrics(self.out, self.start, self._tensorboard, writes=processes.is_first())
        return self._metrics

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal or not self._stepping:  # the second one does not wait; between loops there is nothing to finish
            raise SystemExit(128 + number)
        self._signal = number
        print("finishing this step and saving; once more to stop at once", file=sys.stderr)

    def _write_times(self) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self._mark["seconds"] += now - self._opened
        self._mark["cpu_seconds"] += cpu - self._cpu_opened
        self._opened, self._cpu_opened = now, cpu
        self._mark["version"] = jaxrlhf.__version__
        if not processes.is_first():
            return
        write_atomic(self.out / MARK, json.dumps(self._mark, indent=1) + "\n")


class _Progress:
    """One line on a terminal, rewritten at most four times a second. The first step, which compiles, is not in the rate."""

    def __init__(self, name: str, start: int, total: int):
        self.name, self.start, self.total = name, start, total
        self.first, self.shown = 0.0, -1.0

    def show(self, step: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        if step == self.start + 1:
            self.first = now
        if now - self.shown < 0.25:
            return
        self.shown = now
        text = f"{self.name} {step}/{self.total}"
        if step > self.start + 1:
            pace = (now - self.first) / (step - self.start - 1)
            rate = f"{pace:.2f} s/step" if pace >= 0.1 else f"{1 / pace:.0f} steps/s"
            text += f"  {rate}  {_duration(pace * (self.total - step))} left"
        text += "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _duration(seconds: int | float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): remove it, or choose another --out") from error


def _check_own(out: Path) -> None:
    """Nothing, an empty directory, or one of ours."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out must name a directory")
    if out.is_dir() and not (out / MARK).is_file() and any(p.name not in (".lock", f".{MARK}.tmp") for p in out.iterdir()):
        raise ValueError(f"{out} is not empty and was not made by this program (no {MARK}): choose a new or empty --out")


def _take(out: Path, config: Any, free: tuple[str, ...]) -> int:
    """The lock of the directory, once it is this run's."""
    _check_own(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(out)
    try:
        _settle_config(out, config, free)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _take_lock(out: Path) -> int:
    """A file descriptor that holds the lock. The system frees it when the process ends, however it ends."""
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise ValueError(f"{out} is in use by another run ({owner}): wait for it, stop it, or choose another --out") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def _settle_config(out: Path, config: Any, free: tuple[str, ...]) -> None:
    """Write config.yaml, or compare with the one that is there."""
    path = out / "config.yaml"
    new = cli.plain(dataclasses.asdict(config))
    if (out / MARK).is_file() and path.is_file():
        import yaml

        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = [name for name in _differences(old, new, "") if name.split(":")[0] not in free]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ValueError(f"{out} holds a run with other settings ({', '.join(differing[:3])}{more}): choose another --out")
    else:
        write_atomic(out / MARK, json.dumps({"seconds": 0.0, "cpu_seconds": 0.0, "version": jaxrlhf.__version__}) + "\n")
    write_atomic(path, cli.dump(config))


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old} there, {new} here"
