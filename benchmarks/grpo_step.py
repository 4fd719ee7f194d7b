"""A whole GRPO iteration: groups of answers, scored by the reference, four updates; beside TRL's GRPOTrainer.

    python benchmarks/grpo_step.py --shape tiny --trl16 PYTHON        # a Python with torch and trl 1.16

8 prompts of 64 tokens with 4 responses of 64 each, one epoch of four minibatches, one model trained, a frozen reference for the
KL in the loss, a reward that costs nothing (the share of even ids, the same function on both sides). What bounds it, what is
proven first and what is reported: as ppo_iteration.py.

`equal work` computes the policy's own log-probs after the rollout, as TRL does where one rollout serves several updates;
`sampler's log-probs` takes those that the sampler wrote down: one forward pass less. Both read each prompt once for its four
responses, TRL four times. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import contest
import generate as shapes
import jax
import jax.numpy as jnp
import measure
import numpy as np

from jaxrlhf.algorithms import grpo
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

OURS = ("equal work", "sampler's log-probs")
ALGORITHM = grpo.Config(samples=4, minibatches=4)  # KL coefficient 0.04, reduction by sequence: as published
UPDATE = OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup_fraction=0.0, b2=0.999, clip_norm=1.0)


def main() -> None:
    """Run all contenders in turn and print one JSON document; or be one of them."""
    parser = contest.parser(__doc__, OURS)
    parser.add_argument("--trl16", type=Path, help="a Python that has torch and trl 1.16")
    config = parser.parse_args()
    if config.contender:
        start = contest.load(config.folder)
        contest.serve(start, iteration(config, start))
        return
    peers = {"trl16": contest.Peer("trl_grpo", config.trl16, "equal work")}
    passes = {"score": 2, "score_heads": 2, "update": 1, "update_heads": 1}
    sizes = config.rows, config.prompt, config.new
    products = shapes.products_of(
        config.shape, sizes, config.rows // ALGORITHM.samples, config.rows // ALGORITHM.minibatches, passes
    )
    settings = {
        "minibatches": ALGORITHM.minibatches,
        "samples": ALGORITHM.samples,
        "learning_rate": UPDATE.learning_rate,
        "clip_norm": UPDATE.clip_norm,
        "kl_coef": ALGORITHM.kl_coef,
    }
    document = measure.head("grpo_step", {k: v for k, v in vars(config).items() if k not in ("contender", "folder")})
    measure.write(document | contest.compare(__file__, config, OURS, peers, products, settings), config.result)


def iteration(config: argparse.Namespace, start: contest.Start) -> Callable[[int], tuple[int, dict[str, float]]]:
    """(number) -> updates made so far and seconds of each stage, after an iteration: what experiments/grpo.py does in one."""
    model = transformer.build(start.shape)
    spec = SamplingSpec(temperature=1.0, max_tokens=config.new, stop=())
    params, frozen = {"policy": start.trunk}, {"reference": start.trunk}
    update = optimizer.make(UPDATE, 10_000, params)
    held = [step.init_state(params, update, jax.random.key(0), grpo.init(ALGORITHM))]
    outputs = objective.make_outputs(model, spec, entropy=True, trunk="policy")
    run_epochs = step.make_epochs(outputs, grpo.loss, ALGORITHM, update, ALGORITHM.epochs, ALGORITHM.minibatches)
    prepare = jax.jit(grpo.prepare, static_argnames="config")
    options = rollout.Options(reuse_sampler_logprobs=config.contender == "sampler's log-probs")
    tokens = start.prompts[: config.rows // ALGORITHM.samples]
    count = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    prompts = Prompts(tokens, jnp.full_like(count, tokens.shape[1]), count, count)

    def iterate(i: int) -> tuple[int, dict[str, float]]:
        state, times = held[0], [time.perf_counter()]
        key = jax.random.fold_in(jax.random.key(1), i)
        drawn = generate.generate(model, state.params["policy"], prompts, spec, key, ALGORITHM.samples, i, options.generation)
        jax.block_until_ready(drawn)
        times.append(time.perf_counter())
        experience = rollout.experience(model, state.params, frozen, drawn, spec, options)
        experience = dataclasses.replace(experience, score=even(drawn, config.new))
        batch, kept, _ = prepare(experience, state.algorithm, config=ALGORITHM)
        jax.block_until_ready(batch)
        times.append(time.perf_counter())
        held[0], metrics = run_epochs(dataclasses.replace(state, algorithm=kept), frozen, batch)
        jax.block_until_ready((held[0].params, metrics))
        times.append(time.perf_counter())
        return contest.updates(held[0]), contest.stages(times)

    return iterate


def even(drawn: Rollout, new: int) -> jax.Array:
    """The share of even ids of each response: a reward without a model."""
    responses = np.asarray(drawn.tokens)[:, -new:]
    return jnp.asarray((responses % 2 == 0).mean(axis=1), jnp.float32)


if __name__ == "__main__":
    main()
