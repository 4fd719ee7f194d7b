"""Train the policy by online DPO: it answers each prompt several times; the answers that score best and worst are a pair.

    python -m experiments.online_dpo --policy runs/demo/sft/model --reward runs/demo/reward_model/model
    python -m experiments.online_dpo --preset arithmetic  # sums: the right answer scores

Log-probs of policy and reference are those of the sampling policy: at its temperature, with its constraints. The pairs and the
loss are in jaxrlhf/algorithms/dpo.py; to change the algorithm, copy it and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import best, online, stage, tasks, watched
from jaxrlhf.algorithms import dpo, shaping
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import pool
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, step, timing
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    task: tasks.Name = "sentiment"
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    reward: Path = Path("runs/demo/reward_model/model")  # scores the sentiment task; or an `adapter`
    out: Path = Path("runs/demo/online_dpo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    iterations: int = 24
    batch: int = 128  # prompts an iteration
    n: int = 2  # answers to each; the best and the worst are learned from
    soft: bool = False  # labels are the Bradley-Terry probability of the scores instead of 1
    score: shaping.Config = shaping.Config()  # scale, limit, and what an answer that did not end by itself loses
    epochs: int = 2  # passes over one rollout's pairs
    minibatches: int = 2  # optimizer steps a pass
    sampling: stage.Sampling = stage.Sampling()
    rollouts: rollout.Options = rollout.Options()
    algorithm: dpo.Config = dpo.Config(beta=0.3)  # at 0.1 this small model leaves 18 nats between itself and the reference
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train an adapter over the frozen start
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=3e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    microbatches: Microbatches = Microbatches()  # of a minibatch; with `tokens` rows of about equal length
    evaluate_every: int = 6  # iterations; also before the first and after the last
    keep: best.Keep = "last"  # written as model/: the last weights, or the best that a judgement found
    held_out_prompts: int = 384
    pool: pool.Config = pool.Config()  # child processes for reward functions, and functions of your own
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    if config.n < 2:
        raise ValueError(f"n={config.n} must be at least 2: one answer is no pair")
    return tasks.run(config, train, (config.batch, config.minibatches))


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy on its own answers."""
    start, options = task.start, dataclasses.replace(config.rollouts, reuse_sampler_logprobs=True)
    loop = online.loop(run, config, task, mesh, config.n, options)  # a pair needs the reference's log-probs alone
    params, frozen = stage.trainable(start, config.lora, mesh, config.seed), {"reference": start.params}
    update = optimizer.make(config.optimizer, config.iterations * config.epochs * config.minibatches, params)
    state, begun = online.resume(loop, online.begin(loop, params, update))
    outputs, split = objective.make_outputs(start.model, task.spec, adapters=config.lora), config.microbatches
    learn = step.make_epochs(outputs, dpo.loss, config.algorithm, update, config.epochs, config.minibatches, split)
    learn = run.clock.learner(learn, *watched.learning(config, task, params), times=config.epochs)
    collect, choose = online.collector(loop, frozen), jax.jit(dpo.from_experience, static_argnames=("n", "soft"))
    prepare, describe = jax.jit(dpo.prepare, static_argnames="config"), jax.jit(rollout.stats)

    for i in run.steps(run.start, config.iterations, "online dpo", show=("reward/score", "reward/accuracy")):
        judged = online.judged(loop, i, state)
        experience, prompts, begun = collect(state.params, i, begun)
        experience, rewarded = online.reward(loop, experience, prompts)
        online.record(loop, i, experience)
        drawn = describe(experience)
        score = shaping.score(experience.score, experience.rollout.finished, config.score)
        pairs = choose(dataclasses.replace(experience, score=score), n=config.n, soft=config.soft)
        batch, kept, stats = prepare(pairs, state.algorithm, config=config.algorithm)
        state, metrics = learn(dataclasses.replace(state, algorithm=kept), frozen, batch)
        mean = {"reward/score": experience.score.mean()}
        run.log(i, judged | mean | rewarded | drawn | stats | metrics, batch)
        run.maybe_save(i, (state, begun))
    return online.finish(loop, state, begun)


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    out=Path("runs/arithmetic/online_dpo"),
    iterations=60,
    batch=64,
    n=4,
    sampling=tasks.ARITHMETIC,
    algorithm=dpo.DPO,
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=5e-4),
    evaluate_every=20,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "arithmetic": ARITHMETIC,
    "smoke": Config(iterations=4, batch=16, evaluate_every=2, held_out_prompts=48),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
