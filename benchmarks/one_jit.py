"""PPO iterations stage by stage, in one program, and eight runs side by side by vmap: the same updates, timed alternately.

    python benchmarks/one_jit.py --preset million         # one program against the stages, one million parameters
    python benchmarks/one_jit.py --preset small           # and eight seeds against one, 50,000 parameters

What bounds it: for small models not the products but what lies between them: dispatch, the host's look at the rows, gathers.
The reward is a rule on tokens (how many of them are even). All responses are as long as allowed, so that either form
decodes as many steps.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import EXACT
from jaxrlhf.sampling import decode, rollout
from jaxrlhf.sampling.decode import Shape
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

MODELS = {
    "million": TransformerConfig(512, 128, 5, 4, 4, 32, 384, 64),
    "small": TransformerConfig(64, 48, 2, 2, 2, 24, 96, 64),
}


def main() -> None:
    """Compare and time; one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--response", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    model_config = MODELS[settings.preset]
    model = transformer.build(model_config)
    spec = SamplingSpec(1.0, settings.response, ())
    start = jax.jit(model.init)(jax.random.key(0))
    value = sharding.init_params(heads.value_specs(model_config.width), jax.random.key(1))
    params, frozen = {"policy": start, "value": value}, {"reference": start}
    algorithm = ppo.Config(kl_coef=0.05, epochs=2, minibatches=2)
    update = optimizer.make(OptimizerConfig(epsilon=1e-3), 1000, params)
    keys = jax.random.split(jax.random.key(2))

    def fresh() -> Any:
        return step.init_state(params, update, keys[0], ppo.init(algorithm))

    several = [fresh() for _ in range(settings.seeds)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *several)
    one = iteration(model, spec, algorithm, update)
    held = {"stages": fresh(), "one program": fresh(), "side by side": stacked}
    stages = make_stages(model, spec, algorithm, update)
    together = jax.jit(jax.vmap(one, in_axes=(0, None, 0, 0, None)), donate_argnums=0)
    alone = jax.jit(one, donate_argnums=0)
    given = prompts(settings, model_config.vocab_size)
    number = dict.fromkeys(held, 0)

    def by_stages():
        i = number["stages"]
        held["stages"], metrics = stages(held["stages"], frozen, given, jax.random.fold_in(keys[1], i), i)
        number["stages"] += 1
        return metrics

    def by(name, program, given, key):
        def run():
            held[name], metrics = program(held[name], frozen, given, key, number[name])
            number[name] += 1
            return metrics

        return run

    cases = {"stages": by_stages, "one program": by("one program", alone, given, keys[1])}
    for _ in range(3):
        for case in cases.values():
            case()
    off = compare(held["stages"].params, held["one program"].params, params)
    if settings.preset == "small":
        many = jax.tree.map(lambda x: jnp.stack([x] * settings.seeds), given)
        cases["side by side"] = by("side by side", together, many, jax.random.split(keys[1], settings.seeds))
    results = measure.alternate(cases, settings.repeats)
    document = measure.head("one_jit", vars(settings)) | {
        "model": dataclasses.asdict(model_config) | {"parameters": sum(x.size for x in jax.tree.leaves(start))},
        "algorithm": {"epochs": algorithm.epochs, "minibatches": algorithm.minibatches},
        "after_three_iterations": off,
        "results": results,
        "stages_over_one_program": ratio(results, "stages", "one program"),
    }
    if settings.preset == "small":
        document["side_by_side_over_one"] = ratio(results, "side by side", "one program")
    print({name: document[name] for name in document if "over" in name})
    measure.write(document, settings.out)


def ratio(results: dict[str, Any], a: str, b: str) -> dict[str, float]:
    """Of medians: wall time, processor time."""
    pairs = {"wall": "median_ms", "processor": "processor_median_ms", "wall_min": "min_ms"}
    return {name: results[a][key] / results[b][key] for name, key in pairs.items()}


def compare(found: Any, want: Any, first: Any) -> dict[str, float]:
    """How far both moved, and how far apart they are; stops where that is not rounding."""
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True))
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(first), strict=True))
    if apart > 1e-6 or moved < 1e-4:
        raise SystemExit(f"parameters moved by {moved} and are {apart} apart: nothing to compare")
    return {"moved": moved, "apart": apart}


def even(drawn: Any) -> jax.Array:
    """The share of a response's tokens that are even."""
    width = drawn.logprobs.shape[1]
    tokens = heads.response_tokens(drawn.tokens, drawn.prompt_len, width)
    mask = masking.length_mask(drawn.response_len, width)
    return masking.masked((tokens % 2 == 0).astype(jnp.float32), mask).sum(1) / drawn.response_len


def make_stages(model: Any, spec: SamplingSpec, algorithm: ppo.Config, update: Any) -> Any:
    """The loop body of experiments/ppo.py, each stage a program."""
    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy")
    epochs = step.make_epochs(outputs, ppo.loss, algorithm, update, algorithm.epochs, algorithm.minibatches)
    prepare, describe = jax.jit(ppo.prepare, static_argnames="config"), jax.jit(rollout.stats)
    score = jax.jit(even)

    def run(state, frozen, given, key, number):
        experience = rollout.collect(model, state.params, frozen, given, spec, key, version=number)
        found = score(experience.rollout)
        experience = dataclasses.replace(experience, score=found, weight=jnp.ones(found.shape))
        drawn = describe(experience)
        batch, kept, stats = prepare(experience, state.algorithm, config=algorithm)
        state, metrics = epochs(dataclasses.replace(state, algorithm=kept), frozen, batch)
        return state, drawn | stats | metrics

    return run


def iteration(model: Any, spec: SamplingSpec, algorithm: ppo.Config, update: Any) -> Any:
    """The same as one pure function, as experiments/one_jit.py composes it."""
    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy")
    epochs = step.epochs_of(outputs, ppo.loss, algorithm, update, algorithm.epochs, algorithm.minibatches)
    shape = Shape(1, spec.max_tokens, EXACT)

    def run(state, frozen, given, key, number):
        own = jax.random.fold_in(key, number)
        drawn = decode.whole(model, spec, shape, state.params["policy"], given, own, number)
        experience = rollout.experience(model, state.params, frozen, drawn, spec)
        found = even(drawn)
        experience = dataclasses.replace(experience, score=found, weight=jnp.ones(found.shape))
        batch, kept, stats = ppo.prepare(experience, state.algorithm, algorithm)
        fold = jax.random.fold_in(state.key, state.step)
        params, opt_state, metrics = epochs(state.params, state.opt_state, fold, frozen, batch)
        state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, algorithm=kept)
        return state, rollout.stats(experience) | stats | metrics

    return run


def prompts(settings: Any, vocab: int) -> Prompts:
    """Random ones."""
    rng = np.random.default_rng(0)
    count, width = settings.batch, settings.prompt
    own = np.arange(count, dtype=np.int32)
    length = rng.integers(2, width + 1, count).astype(np.int32)
    return Prompts(jnp.asarray(rng.integers(1, vocab, (count, width)), jnp.int32), jnp.asarray(length), own, own)


if __name__ == "__main__":
    main()
