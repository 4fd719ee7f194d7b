"""The best step of a run by its held-out figures: what the scripts share that measure while they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from jaxrlhf.training.run import Run

Keep = Literal["last", "best"]  # which weights are written as the model
Judgement = tuple[dict[str, float], Any]  # figures ready for `Run.log`, and what goes with them


def check(keep: Keep, every: int) -> None:
    """Refuse to keep the best where nothing is measured before the end.

    Raises:
        ValueError: that is asked for, or the steps between two measurements are fewer than none.
    """
    if every < 0 or (keep == "best" and every == 0):
        raise ValueError(f"keep={keep} with evaluate_every={every}: give the steps from one measurement to the next, 50 say")


def judged(
    run: Run, number: int, every: int, metric: str, params: Any, judge: Callable[[Any], Judgement], higher: bool = True
) -> dict[str, float]:
    """Before update `number`: the held-out figures of `params` where it is one of those that begin with a judgement (none of
    them with every=0), else none. Params are kept where `metric` is better than at every judgement before."""
    if every == 0 or number % every:
        return {}
    figures, _ = judge(params)
    run.best(number, metric, figures[metric], params, higher)
    return figures


def finish(
    run: Run,
    number: int,
    every: int,
    metric: str,
    params: Any,
    judge: Callable[[Any], Judgement],
    keep: Keep,
    higher: bool = True,
) -> tuple[Any, Judgement]:
    """After the last of `number` updates: judge `params`; give what is to be written as the model, the last or the best, with
    its judgement. With every=0 nothing was measured before, and the figures are the caller's alone to keep."""
    judgement = judge(params)
    if every:
        run.log(number, judgement[0])
        run.best(number, metric, judgement[0][metric], params, higher)
    if keep == "last":
        return params, judgement
    params = run.best_params(params)
    return params, judge(params)
