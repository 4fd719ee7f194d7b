"""The first PPO iteration of a small model from a cold start: which programs jax compiles, and for how long.

    python benchmarks/compile.py --repeats 3

What bounds it: tracing and XLA's compiler, on one core but for what LLVM splits; the work itself is a second. Each case is a
process of its own: `cold` without a persistent cache, `filling` with an empty one, `cached` with the one that this filled.
Shown are seconds of the first iteration of experiments/ppo.py, and of the second, which compiles nothing; imports, the random
model and what is compiled before the first iteration (`before_it`) are apart. Targets on two quiet cores: 6 s cold, 3 s cached.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np

from experiments import ppo, stage, tasks
from jaxrlhf.algorithms import ppo as algorithm
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.data import pipeline
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards
from jaxrlhf.training import metrics, programs
from jaxrlhf.training.run import Run

SHAPE = TransformerConfig(512, 128, 4, 4, 4, 32, 384, 128)
CASES = ("cold", "filling", "cached")


def main() -> None:
    """Run every case in its process and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=64, help="tokens of a prompt, and of a response")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--critic", choices=["shared", "separate"], default="separate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", action="store_true", help="run one case in this process")
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    if config.child:
        print(json.dumps(once(config)))
        return
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(config.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for case in CASES:
                found[case].append(child(None if case == "cold" else cache))
                print(f"{case}: {found[case][-1]['seconds']}", flush=True)
    results = {case: summary(runs) for case, runs in found.items()}
    for case in CASES:
        print(f"\n{case}\n{programs.table([programs.Program(**row) for row in results[case]['programs']], 0.05)}")
    document = measure.head("compile", {k: v for k, v in vars(config).items() if k not in ("child", "result")})
    document |= {"model": dataclasses.asdict(SHAPE), "cores": os.cpu_count(), "load": os.getloadavg()[0], "results": results}
    measure.write(document, config.result)


def child(cache: str | None) -> dict[str, Any]:
    """One case in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    done = subprocess.run([sys.executable, *sys.argv, "--child"], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure, and the programs of the run whose first iteration took the median time."""
    middle = sorted(runs, key=lambda run: run["seconds"]["first"])[len(runs) // 2]
    names = runs[0]["seconds"]
    medians = {name: statistics.median(run["seconds"][name] for run in runs) for name in names}
    firsts = [run["seconds"]["first"] for run in runs]
    return {"seconds": medians, "first_min": min(firsts), "first_max": max(firsts), "programs": middle["programs"]}


def once(config: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a run's setup, of its first iteration and of the second, and the programs of the first two."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = ppo.Config(
            out=Path(folder) / "run",
            iterations=2,
            batch=config.rows,
            sampling=stage.Sampling(temperature=1.0, max_tokens=config.width, min_tokens=0),
            algorithm=algorithm.Config(epochs=config.epochs, minibatches=config.minibatches),
            critic=config.critic,
            held_out_prompts=config.rows,
        )
        mesh = sharding.make_mesh(settings.mesh)
        with jax.set_mesh(mesh):
            task = random_task(config, mesh)
            ready = time.perf_counter(), time.process_time()
            with contextlib.redirect_stdout(sys.stderr), Run.open(settings.out, settings, tensorboard=False) as run:
                ppo.train(run, settings, task, mesh)
        rows = metrics.read(settings.out)
        found = json.loads((settings.out / programs.FILE).read_text())["programs"]
    if rows[1]["compile/programs"]:
        raise SystemExit(f"the second iteration compiled {[program['name'] for program in found if program['step'] == 1]}")
    seconds = {
        "model": ready[0] - began,
        "first": rows[0]["time/step"],
        "first_compiling": rows[0]["time/compile"],
        "before_it": sum(sum(p[kind] for kind in ("trace", "lower", "compile")) for p in found if p["during"] == "start"),
        "second": rows[1]["time/step"],
        "processor": time.process_time() - ready[1],
    }
    return {"seconds": {name: round(value, 3) for name, value in seconds.items()}, "programs": found}


def random_task(config: argparse.Namespace, mesh: jax.sharding.Mesh) -> tasks.Task:
    """Answers to random prompts by a model of random weights, scored by another; nothing is judged."""
    model, place = transformer.build(SHAPE), sharding.replicated(mesh)
    base, judge = jax.jit(random_models, out_shardings=place)(jax.random.key(0))
    tokenizer = tokenizers.train(["a text"], 300)
    start = stage.Trained(SHAPE, model, base, tokenizer, {})
    reward, ones = rewards.reward(model, "last"), sharding.shard_batch(np.ones(config.rows, np.float32), mesh)
    tokens = np.random.default_rng(0).integers(1, SHAPE.vocab_size, (config.rows, config.width)).astype(np.int32)
    count = np.arange(config.rows, dtype=np.int32)
    prompts = Prompts(tokens, np.full(config.rows, config.width, np.int32), count, count)
    spec = SamplingSpec(temperature=1.0, max_tokens=config.width, stop=(0,))

    def score(rollout: Any, prompts: Any) -> tuple[jax.Array, jax.Array, dict[str, float]]:
        del prompts
        return sharding.shard_batch(reward(judge, rollout), mesh), ones, {}

    batches = pipeline.by_step(lambda i: dataclasses.replace(prompts, uid=count + i * config.rows))
    return tasks.Task(start, spec, batches, score, lambda params: ({}, []), judge, SHAPE)


def random_models(key: jax.Array) -> tuple[Any, Any]:
    """A policy and a reward model."""
    model = transformer.build(SHAPE)
    head = {name: spec.init(key, spec.shape, np.float32) for name, spec in heads.score_specs(SHAPE.width).items()}
    return model.init(key), {"trunk": model.init(key), "head": head, "gain": np.ones([]), "bias": np.zeros([])}


if __name__ == "__main__":
    main()
