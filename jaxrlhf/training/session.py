"""How this process runs, as opposed to what it computes: no setting of a run, so that the same run may go on otherwise."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that ask a run to end
OUT_OF_TIME = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"


@dataclasses.dataclass(frozen=True)
class Session:
    """Given on the command line of every script, beside its settings."""

    max_minutes: float | None = None  # of this process, its start included; then it saves and ends with OUT_OF_TIME
    from_step: int | None = None  # go on from this checkpoint and set the newer ones aside
    save_seconds: float | None = None  # between two saves; None: as the script has it
    stop_on_alarm: bool = False  # a jump of the loss or the KL ends the run
    started: float = dataclasses.field(default_factory=lambda: time.monotonic() - _age())

    def left(self) -> float:
        """Seconds until the time is up."""
        return float("inf") if self.max_minutes is None else self.started + 60 * self.max_minutes - time.monotonic()


def _age() -> float:
    """Seconds since the process began: what was imported before the command line was read counts too."""
    stat = Path("/proc/self/stat")
    if not stat.is_file():
        return 0.0
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # since the machine started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


_CURRENT: contextvars.ContextVar[Session | None] = contextvars.ContextVar("session", default=None)


def current() -> Session:
    """That of the process, or the defaults."""
    return _CURRENT.get() or Session()


@contextlib.contextmanager
def use(session: Session) -> Iterator[None]:
    """Let every run that is opened inside be one of this session."""
    token = _CURRENT.set(session)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def went_back() -> None:
    """`from_step` was taken: the stages after that one go on from their newest checkpoint."""
    _CURRENT.set(dataclasses.replace(current(), from_step=None))
