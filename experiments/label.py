"""Choose the better of two answers: a person at the terminal, or a simulated one.

    python -m experiments.label --store runs/demo/feedback.sqlite --labeler human --name you
    python -m experiments.label --store runs/demo/feedback.sqlite --labeler simulated

The simulated person prefers the text that VADER finds more positive, errs in 10 % of the choices, and calls equal scores a
tie. Every choice is on disk before the next pair is shown; the work can be left at any moment and taken up again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from jaxrlhf.evaluation import judges
from jaxrlhf.feedback import agreement, labelers, store
from jaxrlhf.training import cli
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    store: Path = Path("runs/demo/feedback.sqlite")
    out: Path = Path("runs/demo/label")
    labeler: Literal["human", "simulated"] = "simulated"
    name: str = "simulated-vader"  # of the labeler, stored with every choice
    noise: float = 0.1  # share of wrong choices of the simulated person
    seed: int = 1
    limit: int | None = None  # pairs a person is asked about in one sitting
    least: int = 0  # choices without which the stage is not done: the same command then goes on


def run(config: Config) -> dict[str, Any]:
    """Label the pairs that this labeler has not chosen on yet."""
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        if not config.store.is_file():
            raise FileNotFoundError(f"{config.store}: no feedback store; make pairs first with sample_pairs.py")
        with contextlib.closing(store.open_store(config.store)) as db:
            if config.labeler == "human":
                labelers.label_at_terminal(db, config.name, config.limit)
            else:
                labelers.label_simulated(db, judges.vader, config.name, config.noise, seed=config.seed)
            every = store.choices(db)
        mine = [choice for choice in every if choice.labeler == config.name]
        decided = sum(choice.preferred is not None for choice in mine)
        if decided < config.least:
            raise ValueError(f"{decided} choices so far, {config.least} are needed; all are kept: the same command goes on")
        counts = Counter(choice.choice for choice in mine)
        agreed = {
            " and ".join(names): found._asdict()
            for names, found in agreement.between_labelers(every).items()
            if config.name in names
        }
        return run.done(
            {
                "labeler": config.labeler,
                "name": config.name,
                "noise": config.noise,
                "choices": dict(counts),
                "left": agreement.left_share(mine),  # about half, with its interval: no favourite side
                "agreement": agreed,  # with others who chose on the same pairs
            }
        )


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
