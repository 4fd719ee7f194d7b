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

from experiments import stage, tasks
from jaxrlhf.algorithms import dpo, shaping
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import lora
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
    held_out_prompts: int = 384
    pool: pool.Config = pool.Config()  # child processes for reward functions, and functions of your own
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    if config.n < 2:
        raise ValueError(f"n={config.n} must be at least 2: one answer is no pair")
    mesh = stage.mesh(
        config.mesh, (config.batch, config.minibatches), batch=config.batch, held_out_prompts=config.held_out_prompts
    )
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh), tasks.make(config, mesh) as task:
            return train(run, config, task, mesh)


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy on its own answers."""
    task, start = tasks.timed(run.clock, task), task.start
    params, frozen = stage.trainable(start, config.lora, mesh, config.seed), {"reference": start.params}
    updates = config.iterations * config.epochs * config.minibatches
    update = optimizer.make(config.optimizer, updates, params)
    tasks.tell_memory(run, config, task, params, update, n=config.n, options=config.rollouts)
    keys = jax.random.split(jax.random.key(config.seed))  # of the updates, and of the answers
    state = step.init_state(params, update, keys[0])
    state, begun = run.restore((state, tasks.under_way(config, task, config.n, mesh)))
    outputs = objective.make_outputs(start.model, task.spec, adapters=config.lora)
    run_epochs = step.make_epochs(
        outputs, dpo.loss, config.algorithm, update, config.epochs, config.minibatches, config.microbatches
    )
    run_epochs = run.clock.learner(run_epochs, *tasks.learning(config, task, params), times=config.epochs)
    choose = jax.jit(dpo.from_experience, static_argnames=("n", "soft"))
    prepare, describe = jax.jit(dpo.prepare, static_argnames="config"), jax.jit(rollout.stats)
    options = dataclasses.replace(config.rollouts, reuse_sampler_logprobs=True)  # a pair needs the reference's log-probs alone
    collect = tasks.collector(run.clock, config, task, frozen, config.n, options)

    for i in run.steps(run.start, config.iterations, "online dpo", show=("reward/score", "reward/accuracy")):
        policy = {"policy": lora.attach(start.params, state.params, config.lora)}
        judged = {} if i % config.evaluate_every else task.judge(lora.attach(start.params, step.served(state), config.lora))[0]
        prompts, key = sharding.shard_batch(task.prompts[i], mesh), jax.random.fold_in(keys[1], i)
        experience, prompts, begun = collect(policy, prompts, key, i, begun)
        score, weight, rewarded = task.score(experience.rollout, prompts)
        kept = shaping.score(score, experience.rollout.finished, config.score)
        pairs = choose(dataclasses.replace(experience, score=kept, weight=weight), n=config.n, soft=config.soft)
        batch, algorithm, stats = prepare(pairs, state.algorithm, config=config.algorithm)
        rated = dataclasses.replace(experience, score=score, weight=weight)
        run.sample(i, recorder.of_experience, rated, None, None, start.tokenizer.token_texts, start.tokenizer.decode)
        state, metrics = run_epochs(dataclasses.replace(state, algorithm=algorithm), frozen, batch)
        run.log(i, judged | {"reward/score": score.mean()} | rewarded | describe(experience) | stats | metrics, batch)
        run.maybe_save(i, (state, begun))
    run.maybe_save(config.iterations - 1, (state, begun), last=True)
    judged, samples = task.judge(lora.attach(start.params, step.served(state), config.lora))
    run.log(config.iterations, judged)
    stage.save_policy(config.out, start, step.served(state), config.lora, config.policy)
    curve = [row for row in run.metrics() if "held_out/kl" in row]
    return run.done({"curve": curve, "samples": samples})


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
