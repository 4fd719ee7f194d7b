"""The best step of a run so far, by one figure of what is held out: its parameters are a checkpoint of their own in `best/`.

Every checkpoint of the run names the best step that it knows, with the figure and a hash of what is kept, so that a run that
goes on makes the choices of the unbroken one. What is named is whole before the checkpoint that names it, and is removed only
when no checkpoint names it any more: whichever of them a run goes on from, its best is there.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jaxrlhf.training import checkpoint

FOLDER = "best"
CHECKPOINTS = "checkpoints"  # those of the run, beside it


def is_better(best: dict[str, Any] | None, metric: str, value: float, higher: bool) -> bool:
    """Whether `value` is a number and better than the best so far; of equals the first one stays.

    Raises:
        ValueError: the best so far is by another metric.
    """
    if best is not None and best["metric"] != metric:
        raise ValueError(f"the best step of a run is by one metric: {best['metric']} so far, {metric} now")
    if not math.isfinite(value):
        return False
    return best is None or (value > best["value"] if higher else value < best["value"])


def settle(out: Path, best: dict[str, Any] | None) -> bool:
    """Before a run goes on: remove what no checkpoint names, and say whether `best`, which this one names, is there.

    Raises:
        ValueError: it is there and is not as it was written.
    """
    checkpoint.clean(out / FOLDER)
    tidy(out, best)
    if best is None or not checkpoint.folder(out / FOLDER, best["step"]).is_dir():
        return False
    check(out, best)
    return True


def tidy(out: Path, best: dict[str, Any] | None) -> None:
    """Remove the bests that neither the run nor a checkpoint of it names. Where a checkpoint cannot be read, all stay."""
    kept = checkpoint.steps(out / FOLDER)
    if not kept or kept == [best and best["step"]]:
        return
    try:
        notes = [checkpoint.notes(out / CHECKPOINTS, step) for step in checkpoint.steps(out / CHECKPOINTS)]
    except ValueError:
        return
    named = {each["step"] for each in [best, *(told.get("best") for told in notes)] if each is not None}
    checkpoint.remove(out / FOLDER, [step for step in kept if step not in named])


def check(out: Path, best: dict[str, Any]) -> None:
    """Compare what is kept with the hashes that were noted.

    Raises:
        ValueError: it is not as it was written.
    """
    try:
        checkpoint.verify(out / FOLDER, best["step"])
        found = checkpoint.contents(out / FOLDER, best["step"])
    except ValueError as error:
        raise ValueError(f"{error}; {_way_out(out)}") from error
    if found != best["blake2b"]:
        raise ValueError(
            f"checkpoint {checkpoint.folder(out / FOLDER, best['step'])} is damaged: it holds other arrays than those of the "
            f"best step that the run noted; {_way_out(out)}"
        )


def _way_out(out: Path) -> str:
    return f"remove {out / FOLDER}, and the same command goes on and looks for the best from here on"
