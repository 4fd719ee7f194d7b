"""The first PPO iteration of a small model from a cold start: which programs jax compiles, and for how long.

    python benchmarks/compile.py --repeats 3

What bounds it: tracing and XLA's compiler, on one core but for what LLVM splits; the work itself is a second. Each case is a
process of its own: `cold` without a persistent cache, `filling` with an empty one, `cached` with the one that this filled.
Shown are seconds from the first array to the end of the first iteration, and of the second, which compiles nothing; without
imports. Targets on two quiet cores: 6 s cold, 3 s cached. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
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

from jaxrlhf.algorithms import ppo
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import heads, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import rollout
from jaxrlhf.training import objective, optimizer, programs, step
from jaxrlhf.training.optimizer import OptimizerConfig

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
    """Seconds of the first iteration and of the second, and the programs of the first."""
    listening = programs.Programs(show=False).open()
    began, used = time.perf_counter(), time.process_time()
    iterate = setting(config)
    iterate(0)
    first, processor, compiling = time.perf_counter(), time.process_time(), listening.seconds
    found = [dataclasses.asdict(program) for program in listening.found]
    iterate(1)
    second = time.perf_counter()
    if len(listening.found) > len(found):
        raise SystemExit(f"the second iteration compiled {[program.name for program in listening.found[len(found) :]]}")
    seconds = {
        "first": first - began,
        "first_processor": processor - used,
        "first_compiling": compiling,
        "second": second - first,
    }
    return {"seconds": {name: round(value, 3) for name, value in seconds.items()}, "programs": found}


def setting(config: argparse.Namespace) -> Any:
    """A function that runs an iteration: rollout, scores, advantages, updates, as experiments/ppo.py has them."""
    model = transformer.build(SHAPE)
    spec = SamplingSpec(temperature=1.0, max_tokens=config.width, stop=(0,))
    algorithm = ppo.Config(epochs=config.epochs, minibatches=config.minibatches)
    base, judge = jax.jit(start)(jax.random.key(0))
    params = {"policy": base}
    if config.critic == "separate":
        params["critic"] = roles.critic(base, SHAPE.width)
    else:
        params["value"] = {"weight": np.zeros(SHAPE.width, np.float32), "bias": np.zeros([], np.float32)}
    update = optimizer.make(OptimizerConfig(), 100, params)
    state = [step.init_state(params, update, jax.random.key(1), ppo.init(algorithm))]
    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy")
    run_epochs = step.make_epochs(outputs, ppo.loss, algorithm, update, config.epochs, config.minibatches)
    prepare, reward = jax.jit(ppo.prepare, static_argnames="config"), rewards.reward(model, "last")
    tokens = np.random.default_rng(0).integers(1, SHAPE.vocab_size, (config.rows, config.width)).astype(np.int32)
    count = np.arange(config.rows, dtype=np.int32)
    prompts = Prompts(tokens, np.full(config.rows, config.width, np.int32), count, count)
    frozen = {"reference": base}

    def iterate(i: int) -> None:
        key = jax.random.fold_in(jax.random.key(2), i)
        experience = rollout.collect(model, state[0].params, frozen, prompts, spec, key, version=i)
        experience = dataclasses.replace(experience, score=reward(judge, experience.rollout))
        batch, kept, _ = prepare(experience, state[0].algorithm, config=algorithm)
        state[0], metrics = run_epochs(dataclasses.replace(state[0], algorithm=kept), frozen, batch)
        jax.block_until_ready((state[0], metrics))

    return iterate


def start(key: jax.Array) -> tuple[Any, Any]:
    """A policy and a reward model of random weights."""
    model = transformer.build(SHAPE)
    head = {name: spec.init(key, spec.shape, np.float32) for name, spec in heads.score_specs(SHAPE.width).items()}
    return model.init(key), {"trunk": model.init(key), "head": head, "gain": np.ones([]), "bias": np.zeros([])}


if __name__ == "__main__":
    main()
