"""How a run is asked to end early: by a signal, or by the clock (`--max-minutes`).

Of a job of several processes one may be asked alone, so that all must agree, at the same places, after which step they end.
There SIGTERM, by which schedulers take machines back, goes through jax's preemption service (as Orbax does it), which tells all
processes of it and names the step.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from jaxrlhf.core import processes
from jaxrlhf.training import session

MARGIN = 2.0  # seconds kept free before the time is up, beside a step and a save


class Ending:
    """A request is taken after the step that is going on, and after a save; a second signal does not wait."""

    def __init__(self) -> None:
        self.at_once = False  # a signal came twice, or where there was nothing to finish
        self.reason = ""  # asked to end: by what
        self.save_took = 0.0  # seconds of the last save
        self._asked = 0  # this process, to end with this code
        self._code = 0  # the same of any process of the job, as all know
        self._stepping = False
        self._offered = True  # this step could have saved
        self._durations: list[float] = []  # of the last steps
        self._handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals, in the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in session.SIGNALS:
                if number == signal.SIGTERM and processes.told_of_preemption():
                    continue
                self._handlers[number] = signal.signal(number, self._on_signal)

    def leave(self) -> None:
        """Give them back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def steps(self, start: int, total: int) -> Iterator[int]:
        """start, ..., total - 1. A signal waits for the end of a step.

        Raises:
            SystemExit: before the next step, if the run was asked to end and no save took it.
        """
        self._stepping = self._offered = True
        try:
            for step in range(start, total):
                if not self._offered:  # a loop without saves; else the next save takes what came after the last one
                    self._look_at_clock()
                    self._agree()
                    self.end_if_asked()
                began, self._offered = time.monotonic(), False
                yield step
                self._durations = [*self._durations[-7:], time.monotonic() - began]
            if not self._offered:
                self._agree()
                self.end_if_asked()
        finally:
            self._stepping = False

    def asked(self, due: bool = False) -> tuple[bool, bool]:
        """After a step: whether to save and end, and whether a save is `due` in any process. The next step and its save must
        fit into the time that is left."""
        self._offered = True
        self._look_at_clock()
        due = self._agree(due)
        return bool(self._code), due

    def _look_at_clock(self) -> None:
        now = session.current()
        # The first step compiles, so it does not count where there are others.
        longest = max(self._durations[1:] or self._durations, default=0.0)
        if not self._asked and now.left() < longest + self.save_took + MARGIN:
            self._asked = session.OUT_OF_TIME

    def _agree(self, due: bool = False) -> bool:
        """Take over what any process of the job was asked; whether a save is due in one of them."""
        if processes.preempted() and not self._asked:
            self._asked = 128 + signal.SIGTERM
        self._code, due_somewhere = processes.largest(self._asked, int(due))
        if self._code == session.OUT_OF_TIME:
            self.reason = f"out of time (--max-minutes {session.current().max_minutes})"
        elif self._code:
            self.reason = f"stopped by {signal.Signals(self._code - 128).name}"
        return bool(due_somewhere)

    def end_if_asked(self) -> None:
        """End the process if it was asked for.

        Raises:
            SystemExit: 128 + the signal, or 75 when the time is up.
        """
        if self._code:
            if processes.is_first():
                print(f"{self.reason}; the same command goes on from here", file=sys.stderr)
            raise SystemExit(self._code)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked or not self._stepping:  # the second one does not wait; between loops there is nothing to finish
            self.at_once = True
            raise SystemExit(128 + number)
        self._asked = 128 + number
        print("finishing this step and saving; once more to stop at once", file=sys.stderr)
