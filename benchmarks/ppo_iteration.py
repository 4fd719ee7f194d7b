"""A whole PPO iteration: sample, score by reference, value and reward, advantages, four updates; beside TRL's and Tunix's.

    python benchmarks/ppo_iteration.py --shape tiny --trl PYTHON --tunix PYTHON     # PYTHON: one that has trl 1.12, the last
                                                                                    # with PPO; one that has google-tunix 0.1.7

32 prompts of 64 tokens, responses of 64, one epoch of four minibatches, policy and critic each a model of its own, both
trained, with a frozen reference and a frozen reward model. What bounds it: on a CPU the weight products of rollout, scoring
passes and updates at the machine's rate, which is measured in every contender's own library at the shapes of the work: beside
each ratio stands the share that each side reaches, and the most that the ratio could be here ("bound by products"). Every
contender is a process of its own, so peak memory is that of one; all begin from the same checkpoints, must give the same
log-probs and scores to the same rows, and must make one update a minibatch.

`equal work` takes the sampler's log-probs for the old policy's, as TRL does; `own log-probs`, the default of ours, computes
them, as Tunix does: one forward pass of the policy more. `one trunk` trains adapters of rank 16 of policy and critic over one
frozen base. `shared critic` trains a value head on the policy's own trunk. The last line of stdout is one JSON document.
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

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import heads, lora, roles, transformer
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

OURS = ("equal work", "own log-probs", "one trunk", "shared critic")
ALGORITHM = ppo.Config(kl_coef=0.05, epochs=1, minibatches=4)
UPDATE = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_fraction=0.0, b2=0.999, clip_norm=1.0)


def main() -> None:
    """Run all contenders in turn and print one JSON document; or be one of them."""
    parser = contest.parser(__doc__, OURS)
    parser.add_argument("--trl", type=Path, help="a Python that has torch and trl 1.12")
    parser.add_argument("--tunix", type=Path, help="a Python that has google-tunix 0.1.7")
    config = parser.parse_args()
    if config.contender:
        start = contest.load(config.folder)
        contest.serve(start, iteration(config, start))
        return
    peers = {
        "trl": contest.Peer("trl_ppo", config.trl, "equal work"),
        "tunix": contest.Peer("tunix_ppo", config.tunix, "own log-probs"),
    }
    # Scored by reference, critic and reward model; the policy's own log-probs are Tunix's only, and left out of the bound.
    passes = {"score": 3, "score_heads": 1, "update": 2, "update_heads": 1}
    sizes = config.rows, config.prompt, config.new
    products = shapes.products_of(config.shape, sizes, config.rows, config.rows // ALGORITHM.minibatches, passes)
    settings = {
        "minibatches": ALGORITHM.minibatches,
        "learning_rate": UPDATE.learning_rate,
        "clip_norm": UPDATE.clip_norm,
        "kl_coef": ALGORITHM.kl_coef,
    }
    document = measure.head("ppo_iteration", {k: v for k, v in vars(config).items() if k not in ("contender", "folder")})
    measure.write(document | contest.compare(__file__, config, OURS, peers, products, settings), config.result)


def iteration(config: argparse.Namespace, start: contest.Start) -> Callable[[int], tuple[int, dict[str, float]]]:
    """(number) -> updates made so far and seconds of each stage, after an iteration: what experiments/ppo.py does in one."""
    shape, trunk, judge = start.shape, start.trunk, start.judge
    model = transformer.build(shape)
    adapters = LoraConfig(rank=16, alpha=32.0) if config.contender == "one trunk" else lora.NONE
    spec = SamplingSpec(temperature=1.0, max_tokens=config.new, stop=())
    scalar = sharding.init_params(heads.score_specs(shape.width), jax.random.key(1))

    def trainable(seed: int):
        return sharding.init_params(lora.specs(shape, adapters), jax.random.key(seed)) if adapters.rank else trunk

    params = {"policy": trainable(2)}
    params |= {"value": scalar} if config.contender == "shared critic" else {"critic": {"trunk": trainable(3), "head": scalar}}
    frozen = {"reference": trunk}
    if adapters.rank:  # the reward is a head on the same trunk, as reward_model --lora.rank writes it
        judge = judge | {"trunk": trunk}
    update = optimizer.make(UPDATE, 10_000, params)
    state = step.init_state(params, update, jax.random.key(0), ppo.init(ALGORITHM))
    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy", adapters=adapters)
    run_epochs = step.make_epochs(outputs, ppo.loss, ALGORITHM, update, ALGORITHM.epochs, ALGORITHM.minibatches)
    prepare, reward = jax.jit(ppo.prepare, static_argnames="config"), rewards.reward(model, "last")
    options = rollout.Options(reuse_sampler_logprobs=config.contender != "own log-probs")
    count = jnp.arange(start.prompts.shape[0], dtype=jnp.int32)
    prompts = Prompts(start.prompts, jnp.full_like(count, start.prompts.shape[1]), count, count)
    held = [state]

    def iterate(i: int) -> tuple[int, dict[str, float]]:
        state, times = held[0], [time.perf_counter()]
        current = roles.attach(trunk, state.params, adapters)
        key = jax.random.fold_in(jax.random.key(1), i)
        drawn = generate.generate(model, current["policy"], prompts, spec, key, 1, i, options.generation)
        jax.block_until_ready(drawn)
        times.append(time.perf_counter())
        experience = rollout.experience(model, current, frozen, drawn, spec, options)
        experience = dataclasses.replace(experience, score=reward(judge, experience.rollout))
        batch, kept, _ = prepare(experience, state.algorithm, config=ALGORITHM)
        jax.block_until_ready(batch)
        times.append(time.perf_counter())
        held[0], metrics = run_epochs(dataclasses.replace(state, algorithm=kept), frozen, batch)
        jax.block_until_ready((held[0].params, metrics))
        times.append(time.perf_counter())
        return contest.updates(held[0]), contest.stages(times)

    return iterate


if __name__ == "__main__":
    main()
