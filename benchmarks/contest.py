"""What the benchmarks of whole iterations share: contenders in processes of their own, from one checkpoint and set of prompts.

Used by ppo_iteration.py and grpo_step.py, which say what an iteration of ours is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate as shapes
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

from jaxrlhf.core import sharding
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import hf, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards
from jaxrlhf.training import cli

APART = 1e-3  # at most, between sums of log-probs, or scores, of the same rows by two contenders
ROPE_THETA = 1e6  # of all contenders: Tunix 0.1.7's Llama takes this, whatever its configuration says


@dataclasses.dataclass(frozen=True)
class Peer:
    script: str  # in benchmarks/peers/
    python: Path | None  # of its environment; None: not run
    equal: str  # which of ours does the same work


def parser(about: str | None, ours: tuple[str, ...]) -> argparse.ArgumentParser:
    """The settings of every such benchmark."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    found.add_argument("--rows", type=int, default=32, help="responses of an iteration")
    found.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    found.add_argument("--new", type=int, default=64, help="tokens of a response")
    found.add_argument("--repeats", type=int, default=6, help="even, so that every second round runs backwards")
    found.add_argument("--result", type=Path, help="also write the JSON document here")
    found.add_argument("--contender", choices=ours, help=argparse.SUPPRESS)
    found.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return found


def compare(
    script: str,
    config: argparse.Namespace,
    ours: tuple[str, ...],
    peers: dict[str, Peer],
    products: measure.Products,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Milliseconds of an iteration by each contender, what each holds at most, and the ratios.

    `settings` are what a peer's script reads, beside the prompts, the shape and the folder of checkpoints.
    """
    _, shape = shapes.model_of(config.shape, config.prompt + config.new)
    shape = dataclasses.replace(shape, rope_theta=ROPE_THETA)
    peers = {name: peer for name, peer in peers.items() if peer.python}
    given = {key: getattr(config, key) for key in ("rows", "prompt", "new")} | settings | {"products": products}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, shape, config)
        given |= {"folder": str(folder), "model": dataclasses.asdict(shape)}
        running = {"jaxrlhf, " + each: _ours(script, config, each, folder) for each in ours}
        own = measure.rates(products)
        running |= {name: measure.Peer(peer.script, peer.python, given) for name, peer in peers.items() if peer.python}
        apart = check({name: each.about for name, each in running.items()})
        said: dict[str, list[dict[str, Any]]] = {name: [] for name in running}

        def case(name: str) -> Callable[[], tuple[float, float]]:
            def call() -> tuple[float, float]:
                said[name].append(running[name].run())
                return measure.times(said[name][-1])

            return call

        results: dict[str, dict[str, Any]] = measure.alternate({name: case(name) for name in running}, config.repeats)
        for each in running.values():
            each.close()
    count_updates(said, settings["minibatches"])
    for name, result in results.items():
        result |= {"peak_bytes": said[name][-1]["peak_bytes"], "updates": said[name][-1]["updates"]}
        stages = [each["stages"] for each in said[name][1:] if "stages" in each]
        if stages:
            result["stages_ms"] = {stage: 1e3 * float(np.median([each[stage] for each in stages])) for stage in stages[0]}
    found = measure.against(results, products, own, {name: running[name].about for name in peers})
    measure.tell(results, found)
    return {
        "model": dataclasses.asdict(shape),
        "contenders": {name: _version(each.about) for name, each in running.items()},
        "apart": apart,
        "equal_work": {name: "jaxrlhf, " + peer.equal for name, peer in peers.items()},
        "results": results,
        **found,
    }


def _ours(script: str, config: argparse.Namespace, contender: str, folder: Path) -> measure.Peer:
    """A way of ours, in a process of its own."""
    given = [f"--{name}={getattr(config, name)}" for name in ("shape", "rows", "prompt", "new")]
    return measure.Peer(Path(script), Path(sys.executable), *given, f"--contender={contender}", f"--folder={folder}")


def _version(about: dict[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("versions", "threads") if name in about}


def check(said: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far log-probs and scores of the same rows are from the first contender's; SystemExit at more than rounding."""
    found = {name: np.array([*about["logprobs"], *about["scores"]]) for name, about in said.items()}
    first = next(iter(found.values()))
    apart = {name: float(np.abs(each - first).max()) for name, each in found.items()}
    if not all(each <= APART for each in apart.values()):  # NaN is not
        raise SystemExit(f"log-probs and scores of the same rows are apart by {apart}: not the same models")
    return apart


def count_updates(said: dict[str, list[dict[str, Any]]], minibatches: int) -> None:
    """SystemExit unless every contender made one update a minibatch in every iteration."""
    for name, each in said.items():
        counts = [one["updates"] for one in each]
        if counts != [minibatches * (i + 1) for i in range(len(counts))]:
            raise SystemExit(
                f"{name}: {counts} updates after its iterations in place of {minibatches} in each: not the same work"
            )


# ------------------------------------------------------------------------------------------------ what all begin from


def write_models(folder: Path, shape: TransformerConfig, config: argparse.Namespace) -> None:
    """A policy and a reward model as checkpoints that transformers loads, and prompts."""
    tokenizer = tokenizers.train(["a film that is good, and one that is bad"], 280)
    trunk = transformer.build(shape).init(jax.random.key(0))
    weight = jax.random.normal(jax.random.key(1), (shape.width,)) / np.sqrt(shape.width + 1)
    judge = {"trunk": trunk, "head": {"weight": weight, "bias": jnp.zeros([])}, "gain": jnp.ones([]), "bias": jnp.zeros([])}
    for name, params in {"policy": trunk, "reward": judge}.items():
        hf.save(folder / name, jax.device_get(params), shape, tokenizer)
    prompts = np.random.default_rng(0).integers(3, 280, (config.rows, config.prompt), dtype=np.int32)
    np.save(folder / "prompts.npy", prompts)


@dataclasses.dataclass(frozen=True)
class Start:
    """What an iteration of ours is made from."""

    shape: TransformerConfig
    trunk: Any  # parameters of the policy
    judge: Any  # of the reward model
    prompts: jax.Array  # [rows, P] int32


def load(folder: Path) -> Start:
    """The checkpoints and prompts that `write_models` wrote."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    trunk, shape = hf.load(folder / "policy", mesh)
    judge, _ = hf.load(folder / "reward", mesh)
    cli.keep_memory()  # as every script of ours does
    return Start(
        dataclasses.replace(shape, **shapes.UNROLLED),
        trunk,
        jax.device_get(judge),
        jnp.asarray(np.load(folder / "prompts.npy")),
    )


def updates(state: Any) -> int:
    """Updates made so far, by the optimizer's own count."""
    counts = [leaf for _, leaf in optax.tree_utils.tree_get_all_with_path(state.opt_state.inner, "count")]
    return max(int(count) for count in counts)


def stages(times: list[float]) -> dict[str, float]:
    """Seconds of each stage of an iteration, from the clock before the first and after each."""
    return {name: times[i + 1] - times[i] for i, name in enumerate(("generate", "score", "update"))}


def serve(start: Start, iterate: Callable[[int], tuple[int, dict[str, float]]]) -> None:
    """Say log-probs and scores of two rows; then one iteration for each line of stdin.

    `iterate` gives the updates made so far and the seconds of each stage.
    """
    model = transformer.build(start.shape)
    rows = start.prompts[:2]
    logprobs = jax.nn.log_softmax(model.logits(start.trunk, model.hidden(start.trunk, rows[:, :-1])))
    found = jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=2)[..., 0].sum(axis=1)
    scores = rewards.score(model, start.judge, rows, jnp.full(2, rows.shape[1]), "last")
    print(json.dumps({"logprobs": found.tolist(), "scores": scores.tolist()}), flush=True)
    for i, _ in enumerate(sys.stdin):
        begun, used = time.perf_counter(), time.process_time()
        updates, stages = iterate(i)
        wall, processor = time.perf_counter() - begun, time.process_time() - used
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = {"wall": wall, "processor": processor, "peak_bytes": peak, "updates": updates, "stages": stages}
        print(json.dumps(said), flush=True)
