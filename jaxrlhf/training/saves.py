"""A run's checkpoints: from which it goes on, what is saved beside the arrays, one save at a time, and the best step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrlhf.core import processes
from jaxrlhf.training import best as bests
from jaxrlhf.training import checkpoint, events, session


class Saves:
    """Of the run in `out`. In a job of several processes all call the same methods in the same order."""

    def __init__(self, out: Path, told: events.Events):
        self.took = 0.0  # seconds of the last checkpoint
        self._out, self._folder, self._events = out, out / bests.CHECKPOINTS, told
        self._noted: dict[str, Any] | None = None
        self._saving: checkpoint.Saving | None = None
        self._of_best = False  # it is the best step that is saved

    def notes(self) -> dict[str, Any]:
        """Those of the checkpoint that this run goes on from, and what was noted since: saved with every checkpoint."""
        if self._noted is None:

            def saved() -> dict[str, Any]:
                step = checkpoint.starting(self._folder, session.current().from_step)
                return {} if step is None else checkpoint.notes(self._folder, step)

            self._noted = noted = processes.by_first(saved)
            return noted
        return self._noted

    def once(self, name: str, value: Callable[[], Any]) -> Any:
        """A fact from outside, asked for once and then noted (`Run.once`)."""
        noted = self.notes()
        if name not in noted:
            noted[name] = processes.by_first(value)
        return noted[name]

    def restore(self, state: Any) -> tuple[Any, int]:
        """`state` as the newest checkpoint has it, or that of `--from-step`, and the step; or as it is, and 0.

        Raises:
            ValueError: the checkpoint, or the best step that it names, is damaged or of another model.
            FileNotFoundError: there are checkpoints, but none of `--from-step`.
        """
        start, back = 0, session.current().from_step
        if removed := processes.by_first(lambda: checkpoint.clean(self._folder)):
            self._events.write("cleaned", removed=removed)
        self.notes()
        if processes.by_first(lambda: checkpoint.numbered(self._folder)):
            state, start = checkpoint.restore(self._folder, state, back)
            self._events.write("restored", step=start)
            if back is not None:
                aside = processes.by_first(lambda: checkpoint.set_aside(self._folder, back))
                self._events.write("went back", step=back, aside=aside)
                session.went_back()
        self._settle_best()
        return state, start

    def _settle_best(self) -> None:
        """Have in `best/` what the checkpoint names that this run goes on from."""
        best = self.best_so_far()
        there = processes.by_first(lambda: bests.settle(self._out, best))
        if best is not None and not there:
            del self.notes()["best"]
            self._events.write("best is gone", step=best["step"])
            if processes.is_first():
                print(f"{self._out / bests.FOLDER}: the best step, {best['step']}, is gone: looking anew", file=sys.stderr)

    def ready(self) -> bool:
        """Whether no save is under way. Of several processes alike in all, because they wait for a save."""
        return self._saving is None or self._saving.done()

    def begin(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Begin to save the state after `step` updates, with what was noted and `notes`.

        Raises:
            OSError, ValueError: this or the last save could not be written.
        """
        self.finish()
        self._begin(self._folder, step, state, self.notes() | notes)

    def _begin(self, folder: Path, step: int, state: Any, notes: dict[str, Any], keep: int | None = 2) -> None:
        try:
            self._saving = checkpoint.save_async(folder, step, state, keep, notes)
        except (OSError, ValueError) as error:
            self._events.write("not saved", step=step, reason=str(error))
            raise

    def finish(self) -> None:
        """Wait for the save that is under way, if one is; remove the bests that no checkpoint names any more.

        Raises:
            OSError, ValueError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        of_best, self._of_best = self._of_best, False
        try:
            saving.wait()
        except (OSError, ValueError) as error:
            self._events.write("not saved", step=saving.step, reason=str(error))
            raise
        took, best = {"blocked": round(saving.blocked, 4), "took": round(saving.took(), 4)}, self.best_so_far()
        if of_best and best is not None:
            best["blake2b"] = processes.by_first(lambda: checkpoint.contents(self._out / bests.FOLDER, saving.step))
            self._events.write("best", **best, **took)
        else:
            self.took = saving.took()
            self._events.write("saved", step=saving.step, **took)
        processes.by_first(lambda: bests.tidy(self._out, best))

    # ------------------------------------------------------------------------------------------------------ the best step

    def best_so_far(self) -> dict[str, Any] | None:
        """Its step, metric, value and, once it is saved, the hash of what is kept."""
        return self.notes().get("best")

    def best(self, step: int, metric: str, value: float, params: Any, higher: bool) -> None:
        """Keep `params` if no step before was better (`Run.best`)."""
        before = self.best_so_far()
        if not processes.by_first(lambda: bests.is_better(before, metric, value, higher)):
            return
        self.finish()
        found = {"step": step, "metric": metric, "value": value}
        self._begin(self._out / bests.FOLDER, step, params, found, keep=None)
        self._of_best, self.notes()["best"] = True, found

    def best_params(self, like: Any) -> Any:
        """What was kept of the best step, verified (`Run.best_params`)."""
        self.finish()
        best = self.best_so_far()
        if best is None:
            raise ValueError(f"{self._out}: no step has a held-out figure, so that none is the best: keep the last one")
        processes.by_first(lambda: bests.check(self._out, best))
        return checkpoint.restore(self._out / bests.FOLDER, like, best["step"])[0]
