"""PPO epochs on rows of lognormal lengths: equal microbatches, each as wide as the longest response allowed, and sorted ones.

    python benchmarks/by_length.py --rows 64 --response 256 --median 48

What bounds it: the products of a train step, which padding multiplies: the ceiling of the gain is the ratio of the places that
either form computes. Both make the same updates, which is checked before they are timed, alternately, in one process.
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
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.optimizer import OptimizerConfig


def main() -> None:
    """Compare and time; one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--response", type=int, default=256)
    parser.add_argument("--median", type=float, default=48.0)
    parser.add_argument("--sigma", type=float, default=0.8)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--multiple", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    total = settings.prompt + settings.response
    d = settings.width
    config = TransformerConfig(512, d, settings.layers, d // 32, d // 32, 32, 3 * d, total)
    batch = rows(settings, config.vocab_size)
    # As many tokens at a time in either form.
    budget = settings.rows // settings.minibatches // settings.parts * total
    splits = {"equal": Microbatches(settings.parts), "sorted": Microbatches(tokens=budget, multiple=settings.multiple)}
    spec = SamplingSpec(1.0, settings.response, (2,))
    outputs = objective.make_outputs(transformer.build(config), spec, entropy=True, values=True, trunk="policy")
    specs = {"policy": transformer.param_specs(config), "value": heads.value_specs(d)}
    params = sharding.init_params(specs, jax.random.key(0))
    update = optimizer.make(OptimizerConfig(epsilon=1e-3), 100, params)
    algorithm = ppo.Config(epochs=1, minibatches=settings.minibatches)
    cases, ends, told = {}, {}, {}
    for name, split in splits.items():
        train = step.make_epochs(outputs, ppo.loss, algorithm, update, 1, settings.minibatches, split)
        held = [step.init_state(params, update, jax.random.key(1))]
        held[0], metrics = train(held[0], None, batch)
        ends[name] = jax.device_get(held[0].params)
        told[name] = {"padding_efficiency": float(metrics["train/padding_efficiency"])}
        cases[name] = lambda train=train, held=held: again(train, held, batch)
        for _ in range(4):  # other minibatches, other shapes
            cases[name]()
        told[name]["programs"] = train.programs()
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), ends["equal"], params)
    off = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ends["equal"], ends["sorted"])
    worst, most = max(jax.tree.leaves(off)), max(jax.tree.leaves(moved))
    if worst > 1e-3 * most:
        raise SystemExit(f"updates of {most} differ by {worst}: nothing to compare")
    timed = measure.alternate(cases, settings.repeats)
    results = {name: timed[name] | told[name] for name in cases}
    document = measure.head("by_length", vars(settings)) | {
        "model": dataclasses.asdict(config),
        "real_share_of_places": float((batch.prompt_len + batch.response_len).sum() / batch.tokens.size),
        "update": {"largest": most, "largest_difference": worst},
        "results": results,
        "ratio": timed["equal"]["median_ms"] / timed["sorted"]["median_ms"],
        "processor_ratio": timed["equal"]["processor_median_ms"] / timed["sorted"]["processor_median_ms"],
        "ceiling": told["sorted"]["padding_efficiency"] / told["equal"]["padding_efficiency"],
    }
    print({name: document[name] for name in ("ratio", "processor_ratio", "ceiling")})
    measure.write(document, settings.out)


def again(train: Any, held: list[Any], batch: ppo.Batch) -> Any:
    """An iteration more; each deals other minibatches."""
    held[0], metrics = train(held[0], None, batch)
    return metrics


def rows(settings: Any, vocab: int) -> ppo.Batch:
    """Rows as a rollout leaves them, response lengths lognormal, those beyond the limit cut."""
    rng = np.random.default_rng(0)
    n, r = settings.rows, settings.response
    response = np.clip(np.round(rng.lognormal(np.log(settings.median), settings.sigma, n)), 1, r).astype(np.int32)
    prompt = rng.integers(settings.prompt // 2, settings.prompt + 1, n).astype(np.int32)
    noise = rng.normal(size=(4, n, r)).astype(np.float32)
    tokens = rng.integers(3, vocab, (n, settings.prompt + r)).astype(np.int32)
    mask = masking.length_mask(jnp.asarray(response), r)
    return ppo.Batch(
        tokens=jnp.asarray(tokens),
        prompt_len=jnp.asarray(prompt),
        response_len=jnp.asarray(response),
        mask=mask,
        old_logprobs=0.1 * noise[0] - 6,
        ref_logprobs=0.1 * noise[1] - 6,
        old_values=0.1 * noise[1],
        advantages=jnp.asarray(noise[2]),
        returns=0.1 * noise[3],
        importance=jnp.ones((n, r)),
        kl_coef=jnp.zeros(n),
        learns=jnp.ones(n),
    )


if __name__ == "__main__":
    main()
