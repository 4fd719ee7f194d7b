"""A whole PPO iteration: sample, score by reference, value and reward, advantages, four updates; beside TRL's PPOTrainer.

    python benchmarks/ppo_iteration.py --shape tiny --trl PYTHON        # a Python with torch and trl 1.12, the last with PPO

32 prompts of 64 tokens, responses of 64, one epoch of four minibatches, policy and critic each a model of its own, both
trained, with a frozen reference and a frozen reward model. What bounds it: on a CPU the weight products of rollout, scoring
passes and updates at the machine's rate. Every contender is a process of its own, so peak memory is that of one; all begin from
the same checkpoints, must give the same log-probs and scores to the same rows, and report how many updates they made.

`equal work` takes the sampler's log-probs for the old policy's, as TRL does (one forward pass of the policy less than the
default, which is `own log-probs`). `one trunk` trains adapters of rank 16 of policy and critic over one frozen base. `shared
critic` trains a value head on the policy's own trunk. The last line of stdout is one JSON document.
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

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import heads, hf, lora, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import rollout
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

OURS = ("equal work", "own log-probs", "one trunk", "shared critic")
ALGORITHM = ppo.Config(kl_coef=0.05, epochs=1, minibatches=4)
UPDATE = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_fraction=0.0, b2=0.999, clip_norm=1.0)
MINIBATCHES = 4


def main() -> None:
    """Run all contenders in turn and print one JSON document; or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--trl", type=Path, help="a Python that has torch and trl 1.12")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    parser.add_argument("--contender", choices=OURS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    config = parser.parse_args()
    if config.contender:
        serve(config)
        return
    document = measure.head("ppo_iteration", {k: v for k, v in vars(config).items() if k not in ("contender", "folder")})
    measure.write(document | compare(config), config.result)


def compare(config: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of an iteration by each contender, and what each holds at most."""
    _, shape = shapes.model_of(config.shape, config.prompt + config.new)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, shape, config)
        peers = {"jaxrlhf, " + each: ours(config, each, folder) for each in OURS}
        if config.trl:
            given = {key: getattr(config, key) for key in ("rows", "prompt", "new")}
            settings = given | {"folder": str(folder), "minibatches": MINIBATCHES, "learning_rate": UPDATE.learning_rate}
            peers["trl"] = measure.Peer("trl_ppo", config.trl, settings | {"kl_coef": ALGORITHM.kl_coef})
        check(peers)
        last: dict[str, dict[str, Any]] = {}

        def case(name: str) -> Callable[[], tuple[float, float]]:
            def call() -> tuple[float, float]:
                last[name] = peers[name].run()
                return measure.times(last[name])

            return call

        results = measure.alternate({name: case(name) for name in peers}, config.repeats)
        for peer in peers.values():
            peer.close()
    for name, result in results.items():
        result |= {"peak_bytes": last[name]["peak_bytes"], "updates": last[name]["updates"]}
    product = [config.rows * (config.prompt + config.new), shape.width, shape.mlp_width]
    ratios = {}
    if config.trl:
        ratios = {name: results["trl"]["median_ms"] / found["median_ms"] for name, found in results.items() if name != "trl"}
    for name, result in results.items():
        said = f", TRL takes {ratios[name]:.2f} x" if name in ratios else ""
        print(f"{name}: {result['median_ms']:.0f} ms, {result['peak_bytes'] / 2**20:.0f} MiB at most{said}")
    return {
        "model": dataclasses.asdict(shape),
        "product_flop_per_s": measure.product_rate(*product),
        "contenders": {name: peer.about for name, peer in peers.items()},
        "results": results,
        "trl_over_ours": ratios,
    }


def ours(config: argparse.Namespace, contender: str, folder: Path) -> measure.Peer:
    """A way of ours, in a process of its own."""
    given = [f"--{name}={getattr(config, name)}" for name in ("shape", "rows", "prompt", "new")]
    return measure.Peer(Path(__file__), Path(sys.executable), *given, f"--contender={contender}", f"--folder={folder}")


def check(peers: dict[str, measure.Peer]) -> None:
    """The same log-probs and scores of the same rows, from all."""
    said = {name: np.array([*peer.about["logprobs"], *peer.about["scores"]]) for name, peer in peers.items()}
    first = next(iter(said.values()))
    apart = {name: float(np.abs(found - first).max()) for name, found in said.items()}
    if max(apart.values()) > 1e-3:
        raise SystemExit(f"log-probs and scores of the same rows are apart by {apart}: not the same models")


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


def serve(config: argparse.Namespace) -> None:
    """One iteration for each line of stdin."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    trunk, shape = hf.load(config.folder / "policy", mesh)
    judge, _ = hf.load(config.folder / "reward", mesh)
    judge = jax.device_get(judge)
    iterate = iteration(config, shape, trunk, judge)
    tokens = np.load(config.folder / "prompts.npy")
    model = transformer.build(shape)
    rows = jnp.asarray(tokens[:2])
    logprobs = jax.nn.log_softmax(model.logits(trunk, model.hidden(trunk, rows[:, :-1])))
    found = jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=2)[..., 0].sum(axis=1)
    scores = rewards.score(model, judge, rows, jnp.full(2, rows.shape[1]), "last")
    print(json.dumps({"logprobs": found.tolist(), "scores": scores.tolist()}), flush=True)
    for i, _ in enumerate(sys.stdin):
        start, used = time.perf_counter(), time.process_time()
        updates = iterate(i)
        wall, processor = time.perf_counter() - start, time.process_time() - used
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"wall": wall, "processor": processor, "peak_bytes": peak, "updates": updates}), flush=True)


def iteration(config: argparse.Namespace, shape: TransformerConfig, trunk: Any, judge: Any) -> Callable[[int], int]:
    """(number) -> updates made so far, after an iteration: what experiments/ppo.py does in one."""
    model = transformer.build(shape)
    adapters = LoraConfig(rank=16, alpha=32.0) if config.contender == "one trunk" else lora.NONE
    spec = SamplingSpec(temperature=1.0, max_tokens=config.new, stop=())
    scalar = sharding.init_params(heads.score_specs(shape.width), jax.random.key(1))

    def trainable(seed: int) -> Any:
        return sharding.init_params(lora.specs(shape, adapters), jax.random.key(seed)) if adapters.rank else trunk

    params = {"policy": trainable(2)}
    params |= {"value": scalar} if config.contender == "shared critic" else {"critic": {"trunk": trainable(3), "head": scalar}}
    frozen = {"reference": trunk}
    if adapters.rank:  # the reward is a head on the same trunk, as reward_model --lora.rank writes it
        judge = judge | {"trunk": trunk}
    update = optimizer.make(UPDATE, 10_000, params)
    state = step.init_state(params, update, jax.random.key(0), ppo.init(ALGORITHM))
    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy", adapters=adapters)
    run_epochs = step.make_epochs(outputs, ppo.loss, ALGORITHM, update, ALGORITHM.epochs, MINIBATCHES)
    prepare, reward = jax.jit(ppo.prepare, static_argnames="config"), rewards.reward(model, "last")
    options = rollout.Options(reuse_sampler_logprobs=config.contender != "own log-probs")
    tokens = jnp.asarray(np.load(config.folder / "prompts.npy"))
    count = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    prompts = Prompts(tokens, jnp.full_like(count, tokens.shape[1]), count, count)
    held = [state]

    def iterate(i: int) -> int:
        state = held[0]
        current = roles.attach(trunk, state.params, adapters)
        key = jax.random.fold_in(jax.random.key(1), i)
        experience = rollout.collect(model, current, frozen, prompts, spec, key, version=i, options=options)
        experience = dataclasses.replace(experience, score=reward(judge, experience.rollout))
        batch, kept, _ = prepare(experience, state.algorithm, config=ALGORITHM)
        held[0], metrics = run_epochs(dataclasses.replace(state, algorithm=kept), frozen, batch)
        jax.block_until_ready((held[0].params, metrics))
        return (i + 1) * ALGORITHM.epochs * MINIBATCHES

    return iterate


if __name__ == "__main__":
    main()
