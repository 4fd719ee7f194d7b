"""One page of a run: curves, rollouts token by token, alarms, where the time went, settings and machine.

    python -m experiments.inspect_run runs/demo/ppo            # writes runs/demo/ppo/inspect.html

It reads what the run has written so far, so it may be called while the run goes on; the run is not touched. The page has no
script and fetches nothing: it can be mailed. (Not called inspect.py: a folder with such a file, once on Python's path, hides
the module `inspect` of the standard library from everything.)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxrlhf.evaluation import inspection, page
from jaxrlhf.training import cli, directory, events, metrics, recorder


@dataclasses.dataclass(frozen=True)
class Config:
    run: Annotated[Path, tyro.conf.Positional]  # a stage's directory, as --out of its script named it
    out: Path | None = None  # the page; RUN/inspect.html by default
    steps: tuple[int, ...] = ()  # whose rollouts are shown; without any a few spread over the run


def run(config: Config) -> dict[str, Any]:
    """Write the page, and say where it is."""
    facts = read(config.run)
    blocks = inspection.all_of(facts, config.steps)
    target = config.run / "inspect.html" if config.out is None else config.out
    text = page.to_html(f"Run {page.visible(config.run.resolve().name)}", blocks)
    metrics.write_atomic(target, text)
    print(target)
    return {"page": str(target), "bytes": len(text.encode())}


def read(folder: Path) -> inspection.Facts:
    """What the directory of a run holds so far.

    Raises:
        ValueError: it is no run's, or a file is damaged.
    """
    times = directory.read_json(folder / directory.MARK)
    if times is None:
        raise ValueError(
            f"{folder} is no run's directory (no {directory.MARK}): name one that a script wrote, like runs/demo/ppo"
        )
    settings = folder / "config.yaml"
    return inspection.Facts(
        rows=metrics.read(folder) if (folder / metrics.FILE).is_file() else [],
        events=events.read(folder),
        samples=recorder.read(folder),
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        environment=directory.read_json(folder / events.ENVIRONMENT) or {},
        times=times,
        result=directory.read_json(folder / "result.json"),
    )


if __name__ == "__main__":
    cli.main(run, Config)
