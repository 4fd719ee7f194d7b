"""The first PPO iteration of a small model from a cold start: which programs jax compiles, and for how long.

    python benchmarks/compile.py --repeats 3

What bounds it: tracing and XLA's compiler; the work itself is a second. experiments/ppo.py runs two iterations on sums with a
model of random weights, each case in a process of its own: `cold` without a persistent cache, `filling` with an empty one,
`cached` with the one that this filled. `first` is the first iteration without the judgement before it, `second` the one after,
which compiles nothing; `process` the whole script, imports included; `processor` its seconds on all cores. Targets on two quiet
cores: `first` 6 s cold, 3 s cached. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import measure

from jaxrlhf.data import arithmetic
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import pretrained, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import metrics, programs

SHAPE = TransformerConfig(512, 128, 4, 4, 4, 32, 384, 128)
CASES = ("cold", "filling", "cached")


def main() -> None:
    """Run every case in its process and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=64, help="tokens of a response; a prompt has 8")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--critic", choices=["shared", "separate"], default="separate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(config.repeats):
        with tempfile.TemporaryDirectory() as folder:
            write_start(Path(folder) / "start")
            for case in CASES:
                found[case].append(child(config, Path(folder), case))
                print(f"{case}: {found[case][-1]['seconds']}", flush=True)
    results = {case: summary(runs) for case, runs in found.items()}
    for case in CASES:
        print(f"\n{case}\n{programs.table([programs.Program(**row) for row in results[case]['programs']], 0.05)}")
    document = measure.head("compile", {k: v for k, v in vars(config).items() if k != "result"})
    document |= {"model": dataclasses.asdict(SHAPE), "cores": os.cpu_count(), "load": os.getloadavg()[0], "results": results}
    measure.write(document, config.result)


def write_start(folder: Path) -> None:
    """A model of random weights, as a stage would leave it."""
    prompts = [row["prompt"] for row in arithmetic.problems("train")]
    tokenizer = tokenizers.train(prompts, 300)
    params = jax.device_get(jax.jit(transformer.build(SHAPE).init)(jax.random.key(0)))
    pretrained.save(folder, params, {"kind": "policy", "transformer": dataclasses.asdict(SHAPE)})
    tokenizer.save(folder)


def child(config: argparse.Namespace, folder: Path, case: str) -> dict[str, Any]:
    """One case in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    environment |= {"JAX_COMPILATION_CACHE_DIR": "" if case == "cold" else str(folder / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    flags = {"--policy": folder / "start", "--out": folder / case, "--iterations": 2, "--batch": config.rows}
    flags |= {"--sampling.max-tokens": config.width, "--held-out-prompts": config.rows, "--evaluate-every": 2}
    flags |= {"--algorithm.epochs": config.epochs, "--algorithm.minibatches": config.minibatches, "--critic": config.critic}
    command = [sys.executable, "-m", "experiments.ppo", "--preset", "arithmetic"]
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    return read(folder / case, wall, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)


def read(out: Path, wall: float, processor: float) -> dict[str, Any]:
    """Seconds and programs of a run that is done."""
    first, second, *_ = metrics.read(out)
    found = json.loads((out / programs.FILE).read_text())["programs"]
    if second["compile/programs"]:
        raise SystemExit(f"the second iteration compiled {[program['name'] for program in found if program['step'] == 1]}")
    judged = sum(sum(p[kind] for kind in ("trace", "lower", "compile")) for p in found if p["during"] == "evaluate")
    seconds = {
        "first": first["time/step"] - first["time/evaluate"] - judged,
        "first_compiling": first["time/compile"] - judged,
        "second": second["time/step"],
        "process": wall,
        "processor": processor,
    }
    return {"seconds": {name: round(value, 3) for name, value in seconds.items()}, "programs": found}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure, and the programs of the run whose first iteration took the median time."""
    middle = sorted(runs, key=lambda run: run["seconds"]["first"])[len(runs) // 2]
    names = runs[0]["seconds"]
    medians = {name: statistics.median(run["seconds"][name] for run in runs) for name in names}
    firsts = [run["seconds"]["first"] for run in runs]
    return {"seconds": medians, "first_min": min(firsts), "first_max": max(firsts), "programs": middle["programs"]}


if __name__ == "__main__":
    main()
