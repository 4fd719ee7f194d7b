"""The report of a run: `report.html` (self-contained), `report.md` with `plots/*.svg`, and `summary.json`.

It reads `RUN/STAGE/result.json` (written when a stage is done) and `RUN/STAGE/metrics.jsonl` (a row a step), where there are
any; a part whose stage or figure is absent is left out. What it looks for, by stage; every `result.json` may hold `seconds`
and `cpu_seconds`; J stands for a judge (vader, textblob, ridge), D for a domain (movie, product, tweet):

==============  ====================================================================================================
pretrain        bits_per_character, nll_per_token, parameters; rows: loss/lm
sft             nll_per_token, nll_per_token_before; rows: loss/lm
reward_model    accuracy {model, ridge, vader, model_and_ridge: {D: share}}, calibration {ece, table [{confidence,
                accuracy, pairs}]}; optional accuracy_by_margin, length_correlation; rows: reward/accuracy
ppo             curve [{step, held_out/kl, held_out/proxy, held_out/J, held_out/distinct_2, ...}]: held-out evaluations,
                the first before any update; rows: reward/score, policy/kl_ref, rollout/length, policy/entropy
evaluate        baseline, baseline_again, candidate: rows of `policy.evaluate_policy`; best_of_n: rows of
                `best_of_n.table` {n, kl, proxy, length, J, win_J}; samples [{prompt, before, after}]; optional
                reward_drift {baseline, candidate}: `reward_model.on_samples`
sample_pairs    drawn, distinct, top_p
label           labeler (simulated | human), name, noise, choices {left, right, tie, both_bad, skip: count}
reward_model_2  as reward_model; choices {held_out, accuracy}, optional accuracy_before (of the first reward model)
ppo_2           as ppo
evaluate_2      as evaluate (best_of_n not needed)
*_control       reward_model_control, ppo_control, evaluate_control: as *_2, refreshed without the choices
overoptimize*   as ppo, trained without the KL penalty: overoptimize against `reward_model`, overoptimize_narrow against
                `reward_model_narrow` (ratings of movies); optional samples
==============  ====================================================================================================

`config.yaml` of the run, or of its first stage, gives the seed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import findings, page, plots, sections

STAGES = (
    *findings.MAIN,
    *("reward_model_control", "ppo_control", "evaluate_control"),
    *("overoptimize", "reward_model_narrow", "overoptimize_narrow"),
)
PACKAGES = (
    "jaxrlhf",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "vaderSentiment",
    "textblob",
    "scikit-learn",
)


def write(run_dir: str | Path, command: str | None = None) -> dict[str, Any]:
    """Write the report into `run_dir` and return the summary, as in `summary.json`.

    `results` and `bars` (but its times) in the summary depend on the run alone; `times` and `about` on the machine.

    Raises:
        ValueError: no stage is done, or a file is damaged.
    """
    run_dir = Path(run_dir)
    results, rows = read(run_dir)
    about = _about(run_dir, command)
    title = f"RLHF from people's judgements: {run_dir.resolve().name}"
    blocks = sections.all_of(results, rows, about)
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for figure in page.figures(blocks):
        _replace(folder / f"{figure.name}.svg", plots.alone(figure.svg))
    _replace(run_dir / "report.md", page.to_markdown(title, blocks, folder.name))
    _replace(run_dir / "report.html", page.to_html(title, blocks))
    timed = ("seconds", "cpu_seconds")
    summary = {
        "bars": [bar._asdict() for bar in findings.bars(results)],
        "verdict": findings.verdict(results),
        "results": {stage: {k: v for k, v in result.items() if k not in timed} for stage, result in results.items()},
        "times": {stage: {k: result[k] for k in timed if k in result} for stage, result in results.items()},
        "about": about,
    }
    _replace(run_dir / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def read(run_dir: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Results and metrics of the stages that are done, in order.

    Raises:
        ValueError: no stage is done, or a file is damaged.
    """
    results, rows = {}, {}
    for stage in STAGES:
        path = run_dir / stage / "result.json"
        if not path.is_file():
            continue
        try:
            results[stage] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not readable JSON ({error}): remove it and run the stage again") from error
        metrics = path.with_name("metrics.jsonl")
        rows[stage] = _rows(metrics) if metrics.is_file() else []
    if not results:
        raise ValueError(f"{run_dir}: no stage is done (no STAGE/result.json), so there is nothing to report")
    return results, rows


def _rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file. Values that are not finite are written as text; a last line without its end is left out."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({error})") from error
        rows.append({key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in row.items()})
    return rows


def _about(run_dir: Path, command: str | None) -> dict[str, Any]:
    """Command, seed, versions and machine."""
    if command is None:
        command = _command()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"cores": cores, "cpu": _cpu(), "system": f"{platform.system()} {platform.machine()}"}
    return {"command": command, "seed": _seed(run_dir), "versions": versions, "machine": machine}


def _command() -> str | None:
    """The command line of this process, where it runs a script or a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return shlex.join(["python", "-m", spec.name, *sys.argv[1:]])
    return shlex.join(["python", *sys.argv]) if sys.argv[0].endswith(".py") else None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found[1].strip() if found else platform.processor()


def _seed(run_dir: Path) -> int | None:
    for folder in ("", *STAGES):
        path = run_dir / folder / "config.yaml"
        found = re.search(r"^seed: *(-?\d+)", path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
        if found:
            return int(found[1])
    return None


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
