"""Train the policy with REINFORCE, ReMax or REINFORCE++.

    python -m experiments.reinforce --policy runs/demo/sft/model --reward runs/demo/reward_model/model --out runs/demo/reinforce
    python -m experiments.reinforce --preset arithmetic           # sums; first: python -m experiments.arithmetic
    python -m experiments.reinforce --preset remax           # or reinforce_pp, reinforce_pp_baseline

As experiments/ppo.py without a value function. To change the algorithm, copy jaxrlhf/algorithms/reinforce.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import ahead, best, online, stage, tasks
from jaxrlhf.algorithms import reinforce
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import pool
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, timing
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    task: tasks.Name = "sentiment"
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    init: Path | None = None  # another policy of that shape to start from; `policy` is then the reference alone
    reward: Path = Path("runs/demo/reward_model/model")  # scores the sentiment task; or an `adapter`
    out: Path = Path("runs/demo/reinforce")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    iterations: int = 24
    batch: int = 256  # prompts an iteration, each with algorithm.samples answers
    sampling: stage.Sampling = stage.Sampling()
    rollouts: rollout.Options = rollout.Options()
    algorithm: reinforce.Config = reinforce.Config(kl_coef=0.12, minibatches=4)
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train an adapter over the frozen start
    offload: stage.Offload = "none"  # rests in the hosts' memory between the programs that use it
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
    """Train, and write `model/` (the policy alone) and `result.json` into `config.out`."""
    dealt = config.batch * config.algorithm.samples, config.algorithm.minibatches
    return tasks.run(config, train, dealt, offloaded=config.offload)


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy, whatever the task is."""
    start, algorithm = task.start, config.algorithm
    loop = online.loop(run, config, task, mesh, algorithm.samples)
    trained = stage.trainable(start, config.lora, mesh, config.seed, config.init)
    params, frozen = {"policy": trained}, {"reference": start.params}
    update = optimizer.make(config.optimizer, config.iterations * algorithm.epochs * algorithm.minibatches, params)
    state = online.begin(loop, params, update, reinforce.init(algorithm))
    del params, trained  # which the state has copied
    state, begun = online.resume(loop, state, config.offload)
    outputs = objective.make_outputs(start.model, task.spec, entropy=True, trunk="policy", adapters=config.lora)
    collect, prepare = online.collector(loop, frozen), online.preparer(loop, reinforce.prepare)
    learn = online.learner(loop, outputs, reinforce.loss, update, state.params)
    greedily = online.answerer(loop, dataclasses.replace(task.spec, greedy=True, replay=False))
    if algorithm.baseline != "greedy":
        ahead.start(loop, frozen, state, prepare, learn)

    for i in run.steps(run.start, config.iterations, "reinforce", show=("reward/score", "policy/kl_ref")):
        judged = online.judged(loop, i, state)
        experience, prompts, begun = collect(state.params, i, begun)
        experience, rewarded = online.reward(loop, experience, prompts)
        if algorithm.baseline == "greedy":
            answers, _, _ = greedily(online.over_start(loop, state.params)["policy"], prompts, i)
            baseline, scored, _ = loop.task.score(answers, prompts)
            # Without the baseline there is no advantage: such a prompt's answers leave.
            baseline, scored = (jnp.repeat(x, algorithm.samples) for x in (baseline, scored))
            experience = dataclasses.replace(experience, baseline=baseline, weight=experience.weight * scored)
        batch, kept, stats = prepare(experience, state.algorithm)
        online.record(loop, i, experience, batch.advantages)
        state, metrics = learn(dataclasses.replace(state, algorithm=kept), frozen, batch)
        run.log(i, judged | rewarded | stats | metrics, batch)
        run.maybe_save(i, (state, begun))
    return online.finish(loop, state, begun)


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    out=Path("runs/arithmetic/reinforce"),
    iterations=60,
    batch=256,
    sampling=tasks.ARITHMETIC,
    algorithm=dataclasses.replace(reinforce.REINFORCE_PP, kl_coef=0.01, minibatches=4),
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=5e-4),
    evaluate_every=20,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "remax": Config(algorithm=dataclasses.replace(reinforce.REMAX, kl_coef=0.12, minibatches=4)),
    "reinforce_pp": Config(algorithm=dataclasses.replace(reinforce.REINFORCE_PP, kl_coef=0.12, minibatches=4, epochs=2)),
    "reinforce_pp_baseline": Config(
        batch=64, algorithm=dataclasses.replace(reinforce.REINFORCE_PP_BASELINE, kl_coef=0.12, minibatches=4, epochs=2)
    ),
    "smoke": Config(iterations=4, batch=32, evaluate_every=2, held_out_prompts=48),
    "arithmetic": ARITHMETIC,
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
