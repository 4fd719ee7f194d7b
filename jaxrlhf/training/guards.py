"""What a run watches in its own metrics: updates left out, jumps of the loss, a KL that runs away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def dump(path: Path, batch: Any) -> str:
    """Write the arrays of a batch as an .npz file, and name it; '' where there is none. Of several processes all must call it;
    the first writes."""
    import jax
    import numpy as np

    from jaxrlhf.core import processes

    leaves = jax.tree_util.tree_leaves_with_path(processes.to_host(batch))
    if leaves and processes.is_first():
        # NumPy's files know no bfloat16.
        wide = {jax.tree_util.keystr(k).strip("."): x.astype(np.float32) if x.dtype.kind == "V" else x for k, x in leaves}
        with open(path, "wb") as file:
            np.savez(file, **wide)
    return path.name if leaves else ""
