"""Every algorithm from the same start on the same task: what it gains, how far it moves, what it costs.

    python benchmarks/algorithms.py --seeds 1 2 3 --out runs/algorithms --result benchmarks/results/2026-11-22-algorithms.json
    python benchmarks/algorithms.py --task sentiment --demo runs/demo --out runs/algorithms     # from a finished loop

Sums (the default): the start is trained by experiments/arithmetic.py for each seed; figures are the share of 500 held-out sums,
none of whose operand pairs was trained on, that the most probable answer gets right. Sentiment: win rates over the start by
judges that no training read. There is no peer in the run: algorithms stand beside one another. Runs that are done are read,
not done again. The last line of stdout is one JSON document.
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
SCRIPTS = {  # name: (script, preset on sums, preset on sentiment)
    "ppo": ("ppo", "arithmetic", "default"),
    "grpo": ("grpo", "arithmetic", "default"),
    "rloo": ("rloo", "arithmetic", "default"),
    "reinforce": ("reinforce", "arithmetic", "default"),
    "raft": ("raft", "arithmetic", "default"),
    "dpo": ("dpo", "arithmetic", "default"),
    "orpo": ("orpo", "arithmetic", "default"),
    "kto": ("kto", "arithmetic", "default"),
    "online_dpo": ("online_dpo", "arithmetic", "default"),
}
CHOICES = {"dpo", "orpo", "kto"}  # on sentiment they learn from a feedback store
SHOWN = {
    "arithmetic": ("held_out/accuracy", "held_out/kl", "held_out/entropy"),
    "sentiment": ("held_out/win_vader", "held_out/win_textblob", "held_out/kl", "held_out/distinct_2", "held_out/length"),
}


def main() -> None:
    """Run or read every algorithm and seed, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(SHOWN), default="arithmetic")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--algorithms", nargs="+", choices=sorted(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished loop, where sentiment starts")
    parser.add_argument("--out", type=Path, default=Path("runs/algorithms"))
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    seeds = {str(seed): one_seed(seed, config) for seed in config.seeds}
    document = {
        "benchmark": "algorithms",
        "task": config.task,
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "machine": f"{os.cpu_count()} CPUs",
        "python": sys.version.split()[0],
        "seeds": seeds,
    }
    if config.result is not None:
        config.result.parent.mkdir(parents=True, exist_ok=True)
        config.result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def one_seed(seed: int, config: argparse.Namespace) -> dict[str, Any]:
    """Each algorithm's figures before and after, with its seconds."""
    folder = (config.out / config.task / f"seed{seed}").resolve()
    if config.task == "arithmetic":
        script("arithmetic", "default", seed, folder / "start")
        start, choices = ["--policy", str(folder / "start" / "model")], []
    else:
        demo = config.demo.resolve()
        start = ["--policy", str(demo / "sft" / "model"), "--reward", str(demo / "reward_model" / "model")]
        choices = ["--choices", str(demo / "feedback.sqlite")]
    return {
        name: one(name, seed, config.task, folder / name, start + (choices if name in CHOICES else []))
        for name in config.algorithms
    }


def one(name: str, seed: int, task: str, out: Path, start: list[str]) -> dict[str, Any]:
    """First and last point of an algorithm's curve, and its seconds."""
    module, on_sums, on_sentiment = SCRIPTS[name]
    result = script(module, on_sums if task == "arithmetic" else on_sentiment, seed, out, *start)
    first, last = ({key.split("/")[1]: row[key] for key in SHOWN[task]} for row in (result["curve"][0], result["curve"][-1]))
    return {"before": first, "after": last, "seconds": result["seconds"], "cpu_seconds": result["cpu_seconds"]}


def script(module: str, preset: str, seed: int, out: Path, *flags: str) -> dict[str, Any]:
    """Run a script of experiments/, and read its result."""
    command = [sys.executable, "-m", f"experiments.{module}", "--preset", preset, "--seed", str(seed), "--out", str(out)]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
