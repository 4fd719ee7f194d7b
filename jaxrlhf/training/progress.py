"""One line on a terminal that says how far a loop has come."""

from __future__ import annotations

import sys
import time


class Progress:
    """Rewritten at most four times a second. The first step, which compiles, is not in the rate."""

    def __init__(self, name: str, start: int, total: int):
        self.name, self.start, self.total = name, start, total
        self.first, self.shown = 0.0, -1.0

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Write the line: step, rate, time left, and the metrics given."""
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
            text += f"  {rate}  {duration(pace * (self.total - step))} left"
        text += "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Wipe it."""
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def duration(seconds: int | float) -> str:
    """65 -> 1:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
