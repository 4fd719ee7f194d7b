"""Train the policy with GRPO or one of its successors: answers to one prompt measured against each other.

    python -m experiments.grpo --policy runs/demo/sft/model --reward runs/demo/reward_model/model --out runs/demo/grpo
    python -m experiments.grpo --preset arithmetic           # sums; first: python -m experiments.arithmetic
    python -m experiments.grpo --preset dapo                 # or dr_grpo, gspo

As experiments/ppo.py without a value function. To change the algorithm, copy jaxrlhf/algorithms/grpo.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import ahead, stage, tasks
from jaxrlhf.algorithms import grpo
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import roles
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import pool
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, recorder, step, timing
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    task: tasks.Name = "sentiment"
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    reward: Path = Path("runs/demo/reward_model/model")  # scores the sentiment task; or an `adapter`
    out: Path = Path("runs/demo/grpo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    iterations: int = 24
    batch: int = 64  # prompts an iteration, each with algorithm.samples answers
    sampling: stage.Sampling = stage.Sampling()
    rollouts: rollout.Options = rollout.Options()
    # A learned reward needs the price of PPO: at the published 0.04 the policy went 29 nats away.
    algorithm: grpo.Config = dataclasses.replace(grpo.GRPO, kl_coef=0.12, samples=4, minibatches=4, epochs=2)
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train an adapter over the frozen start
    frozen: stage.Weights = "float32"  # of the frozen start: what adapters lie over, and the reference
    offload: stage.Offload = "none"  # rests in the hosts' memory between the programs that use it
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=3e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    microbatches: Microbatches = Microbatches()  # of a minibatch; with `tokens` rows of about equal length
    evaluate_every: int = 6  # iterations; also before the first and after the last
    held_out_prompts: int = 384
    pool: pool.Config = pool.Config()  # child processes for reward functions, and functions of your own
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` (the policy alone) and `result.json` into `config.out`."""
    mesh = stage.mesh(
        config.mesh,
        (config.batch * config.algorithm.samples, config.algorithm.minibatches),
        batch=config.batch,
        held_out_prompts=config.held_out_prompts,
    )
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh), tasks.make(config, mesh, config.frozen, config.offload) as task:
            return train(run, config, task, mesh)


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy, whatever the task is."""
    task, start, algorithm = tasks.timed(run.clock, task), task.start, config.algorithm
    params = {"policy": stage.trainable(start, config.lora, mesh, config.seed)}
    frozen = {"reference": start.params}
    update = optimizer.make(config.optimizer, config.iterations * algorithm.epochs * algorithm.minibatches, params)
    tasks.tell_memory(run, config, task, params, update, n=algorithm.samples, options=config.rollouts)
    keys = jax.random.split(jax.random.key(config.seed))  # of the updates, and of the answers
    state = step.init_state(params, update, keys[0], grpo.init(algorithm))
    state, begun = run.restore((state, tasks.under_way(config, task, algorithm.samples, mesh)))
    state = stage.at_rest(state, config.offload)
    outputs = objective.make_outputs(start.model, task.spec, entropy=True, trunk="policy", adapters=config.lora)
    run_epochs = step.make_epochs(
        outputs, grpo.loss, algorithm, update, algorithm.epochs, algorithm.minibatches, config.microbatches
    )
    run_epochs = run.clock.learner(run_epochs, *tasks.learning(config, task, params), times=algorithm.epochs)
    collect = tasks.collector(run.clock, config, task, frozen, algorithm.samples, config.rollouts)
    prepare, describe = jax.jit(grpo.prepare, static_argnames="config"), jax.jit(rollout.stats)
    current = roles.attach(start.params, state.params, config.lora)
    ahead.start(run.clock, task, current, frozen, state, (prepare, algorithm, run_epochs), algorithm.samples, config.rollouts)
    prepare = run.clock.timed("update", prepare, after="prepare")

    def over_start(params: Any) -> Any:
        return roles.attach(start.params, params, config.lora)

    for i in run.steps(run.start, config.iterations, "grpo", show=("reward/score", "policy/kl_ref")):
        current = over_start(state.params)
        judged = {} if i % config.evaluate_every else task.judge(over_start(step.served(state))["policy"])[0]
        prompts = sharding.shard_batch(task.prompts[i], mesh)
        key = jax.random.fold_in(keys[1], i)
        experience, prompts, begun = collect(current, prompts, key, i, begun)
        score, weight, rewarded = task.score(experience.rollout, prompts)
        experience = dataclasses.replace(experience, score=score, weight=weight)
        drawn = describe(experience)
        batch, kept, stats = prepare(experience, state.algorithm, config=algorithm)
        run.sample(
            i, recorder.of_experience, experience, batch.advantages, None, start.tokenizer.token_texts, start.tokenizer.decode
        )
        state, metrics = run_epochs(dataclasses.replace(state, algorithm=kept), frozen, batch)
        run.log(i, judged | rewarded | drawn | stats | metrics, batch)
        run.maybe_save(i, (state, begun))
    run.maybe_save(config.iterations - 1, (state, begun), last=True)
    judged, samples = task.judge(over_start(step.served(state))["policy"])
    run.log(config.iterations, judged)
    stage.save_policy(config.out, start, step.served(state)["policy"], config.lora, config.policy)
    curve = [row for row in run.metrics() if "held_out/kl" in row]
    return run.done({"curve": curve, "samples": samples})


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    out=Path("runs/arithmetic/grpo"),
    iterations=60,
    batch=64,
    sampling=tasks.ARITHMETIC,
    algorithm=dataclasses.replace(grpo.DR_GRPO, samples=8, minibatches=4),
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=5e-4),
    evaluate_every=20,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "dr_grpo": Config(algorithm=dataclasses.replace(grpo.DR_GRPO, samples=4, minibatches=4, epochs=2)),
    "dapo": Config(algorithm=dataclasses.replace(grpo.DAPO, samples=4, minibatches=4, epochs=2)),
    "gspo": Config(algorithm=dataclasses.replace(grpo.GSPO, samples=4, minibatches=4, epochs=2)),
    "smoke": Config(iterations=4, batch=8, evaluate_every=2, held_out_prompts=48),
    "arithmetic": ARITHMETIC,
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
