"""The whole loop for several seeds: every figure that the report holds against a bar, and the seconds of every stage.

    python benchmarks/loop.py --seeds 1 2 3 --out runs/seeds --result benchmarks/results/2026-11-22-loop.json

What bounds it: the products of training steps on a CPU; there is no peer for the whole loop, so the figures stand beside the
bars of the report and, for the second round, beside a control that was refreshed without the new choices. Every seed starts
with an empty compile cache. Runs that are done are read, not done again. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxrlhf.evaluation import findings, overoptimization

ROOT = Path(__file__).resolve().parent.parent
MAIN = 10  # stages of the default run; control and over-optimisation come on top


def main() -> None:
    """Run or read every seed and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--preset", default="default")
    parser.add_argument("--plain", action="store_true", help="without the control and without over-optimisation")
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    document = {
        "benchmark": "loop",
        "date": datetime.date.today().isoformat(),
        "preset": config.preset,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "seeds": {str(seed): one(seed, config) for seed in config.seeds},
    }
    if config.result is not None:
        config.result.parent.mkdir(parents=True, exist_ok=True)
        config.result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def one(seed: int, config: argparse.Namespace) -> dict[str, Any]:
    """Run the loop with one seed, and read its summary."""
    out = (config.out / f"seed{seed}").resolve()
    flags = ["--preset", config.preset, "--seed", str(seed), "--out", str(out)]
    new = not out.exists()
    command = loop(flags, out.with_name(out.name + ".cache"))
    if not config.plain:
        loop([*flags, "--control", "--overoptimize"], out.with_name(out.name + ".cache"))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    stages = list(summary["times"].items())[:MAIN]
    return {
        "bars": summary["bars"],
        "seconds": round(sum(times["seconds"] for _, times in stages), 1),
        "cpu_seconds": round(sum(times["cpu_seconds"] for _, times in stages), 1),
        "command": command if new else None,  # the same by the clock outside, imports and report included
        "times": summary["times"],
        "second_round": second_round(summary["results"]),
        "overoptimized": overoptimized(summary["results"]),
        "machine": summary["about"]["machine"],
        "versions": summary["about"]["versions"],
    }


def loop(flags: list[str], cache: Path) -> dict[str, float]:
    """Run the script; seconds by the wall and of processors, from the start of the interpreter to its end."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command, environment = [sys.executable, "-m", "experiments.rlhf", *flags], os.environ | {"XDG_CACHE_HOME": str(cache)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(used, 1)}


def second_round(results: dict[str, Any]) -> dict[str, Any]:
    """First round, control and second round on the same held-out prompts: KL, judges, win rates, diversity."""
    names = {"first": "evaluate", "control": "evaluate_control", "second": "evaluate_2"}
    kept = ("kl", "judges", "win_rate", "length", "distinct_2", "entropy")
    return {name: {key: results[stage]["candidate"][key] for key in kept} for name, stage in names.items() if stage in results}


def overoptimized(results: dict[str, Any]) -> dict[str, Any]:
    """PPO without the KL penalty against each reward model: TextBlob's largest fall, and the curve."""
    kept = ("step", "kl", "proxy", "textblob", "vader", "distinct_2")
    return {
        pressed: {
            "fall": overoptimization.peak_and_drop(rows, "textblob")._asdict(),
            "curve": [{key: round(row[key], 4) for key in kept} for row in rows],
        }
        for pressed, rows in findings.overoptimized(results).items()
    }


if __name__ == "__main__":
    main()
