"""What a run watches in its own metrics, and does about it: updates left out, jumps of the loss, a KL that runs away."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.core import processes
from jaxrlhf.training import events, session

IN_A_ROW = 3  # updates left out because a gradient was not finite, then the run ends
ROWS = 128  # of the loss, that a jump is measured against
FEWEST = 20  # rows before a jump of the loss is spoken of
DEVIATIONS = 6.0
KL_ROWS = 8
KL_TIMES = 4.0  # the largest of the last rows
KL_LEAST = 5.0  # nats a response: below it a KL may grow as it likes


class Guard:
    """Reads each row once, in order. `state` is what a resumed run needs to sound the alarms that the unbroken one would."""

    def __init__(self, state: Mapping[str, list[float]] | None = None):
        state = state or {}
        self.loss, self.kl = list(state.get("loss", [])), list(state.get("kl", []))

    @property
    def state(self) -> dict[str, list[float]]:
        """As JSON."""
        return {"loss": list(self.loss), "kl": list(self.kl)}

    def read(self, row: Mapping[str, Any]) -> dict[str, str]:
        """{metric: alarm} of a row.

        A loss is a jump more than six standard deviations above the mean of its last 128 rows (and by a tenth of that mean,
        for curves that are nearly flat); a jump does not enter them. Source: skip-step of Levanter (optim/skipstep.py).
        A KL runs away at four times the largest of its last eight rows, from 5 nats a response.
        """
        loss, kl = (row.get(name, math.nan) for name in ("loss/total", "policy/kl_ref"))
        alarms = {"loss/total": _jump(loss, self.loss), "policy/kl_ref": _runaway(kl, self.kl)}
        return {metric: alarm for metric, alarm in alarms.items() if alarm}


def _jump(value: int | float, before: list[float]) -> str:
    if not math.isfinite(value):
        return ""
    if len(before) >= FEWEST:
        mean = sum(before) / len(before)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in before) / len(before))
        if value - mean > max(DEVIATIONS * deviation, 0.1 * abs(mean)):
            return f"loss/total jumped to {value:.4g}: its last {len(before)} rows are {mean:.4g} +- {deviation:.2g}"
    _keep(before, value, ROWS)
    return ""


def _runaway(value: int | float, before: list[float]) -> str:
    if not math.isfinite(value):
        return ""
    largest = max(before, default=math.inf)
    _keep(before, value, KL_ROWS)
    if value > max(KL_TIMES * largest, KL_LEAST):
        return f"policy/kl_ref ran away to {value:.4g} nats a response: it was {largest:.4g} at most in the rows before"
    return ""


def _keep(rows: list[float], value: int | float, most: int) -> None:
    rows.append(value)
    del rows[:-most]


class Watch:
    """What a run does about its rows: an event each time, a line on the terminal once, and an end where there must be one."""

    def __init__(self, out: Path, told: events.Events, state: Mapping[str, list[float]] | None = None):
        """`state`: of the guard, where the run goes on."""
        self.guard = Guard(state)
        self._out, self._events = out, told
        self._last: Any = None  # row that was read
        self._printed: set[str] = set()  # kinds of alarm

    def read(self, row: Mapping[str, Any], batch: Any) -> None:
        """Read a row, unless it is the one that was read last; `batch` is what the last step learned from.

        Raises:
            ValueError: three updates in a row were left out because a gradient was not finite, or under `--stop-on-alarm`
                the loss jumped or the KL ran away. The batch is written down.
        """
        if not row or row is self._last:
            return
        self._last, step, skipped = row, row["step"], row.get("optimizer/skipped_in_a_row", 0)
        if skipped:
            self._events.write("skipped", step=step, in_a_row=skipped)
        if skipped >= IN_A_ROW:
            reason = f"the gradient was not finite for {IN_A_ROW} updates in a row"
            self._stop(step, reason, "A lower learning rate or a smaller clip_norm may help", batch)
        for metric, alarm in self.guard.read(row).items():
            self._events.write("alarm", step=step, metric=metric, reason=alarm)
            if session.current().stop_on_alarm:
                self._stop(step, alarm, "Without --stop-on-alarm the run would go on", batch)
            if metric not in self._printed and processes.is_first():
                self._printed.add(metric)
                print(f"{self._out}: step {step}: {alarm}; further ones go to {events.FILE} alone", file=sys.stderr)

    def _stop(self, step: int, reason: str, advice: str, batch: Any) -> None:
        """End the run for what it learned from, which is kept for a look at it; nothing later than the last good state is."""
        dumped = dump(self._out / f"bad_batch_{step:08d}.npz", batch)
        self._events.write("stopped", step=step, reason=reason, batch=dumped)
        kept = f"; what it learned from is in {dumped}" if dumped else ""
        raise ValueError(f"step {step}: {reason}; {self._out} keeps the last good state{kept}. {advice}")


def dump(path: Path, batch: Any) -> str:
    """Write the arrays of a batch as an .npz file, and name it; '' where there is none. Of several processes all must call it;
    the first writes."""
    import jax
    import numpy as np

    leaves = jax.tree_util.tree_leaves_with_path(processes.to_host(batch))
    if leaves and processes.is_first():
        # NumPy's files know no bfloat16.
        wide = {jax.tree_util.keystr(k).strip("."): x.astype(np.float32) if x.dtype.kind == "V" else x for k, x in leaves}
        with open(path, "wb") as file:
            np.savez(file, **wide)
    return path.name if leaves else ""
