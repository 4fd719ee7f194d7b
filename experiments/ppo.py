"""Stage 4: train the policy with PPO, held near the model it starts from.

    python -m experiments.ppo --policy runs/demo/sft/model --reward runs/demo/reward_model/model --out runs/demo/ppo
    python -m experiments.ppo --preset arithmetic            # sums; first: python -m experiments.arithmetic

One iteration: sample answers, score them, turn scores and KL into advantages, a few epochs of clipped updates. To change the
algorithm, copy jaxrlhf/algorithms/ppo.py and this page.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax

from experiments import ahead, best, critics, online, pretrain, stage, tasks
from jaxrlhf.algorithms import lm, ppo
from jaxrlhf.core import sharding
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
    init: Path | None = None  # another policy of that shape to start from; `policy` is then the reference alone
    reward: Path = Path("runs/demo/reward_model/model")  # scores the sentiment task; or an `adapter`
    out: Path = Path("runs/demo/ppo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    iterations: int = 24
    batch: int = 256  # answers an iteration, each to its own prompt
    sampling: stage.Sampling = stage.Sampling()
    rollouts: rollout.Options = rollout.Options()
    algorithm: ppo.Config = ppo.Config(kl_coef=0.12)
    critic: critics.Critic = "shared"  # value head on the policy's trunk; its own; the reward model's
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train adapters over the frozen start, of policy and separate critic
    frozen: stage.Weights = "float32"  # of the frozen start: what adapters lie over, and the reference
    offload: stage.Offload = "none"  # rests in the hosts' memory between the programs that use it
    ema_decay: float | None = None  # serve an average of the policy's weights over iterations instead of the last ones
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
    dealt = config.batch, config.algorithm.minibatches
    return tasks.run(config, train, dealt, config.frozen, config.offload)


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy, whatever the task is."""
    start, algorithm, exact = task.start, config.algorithm, config.algorithm.kl_estimator == "exact"
    loop = online.loop(run, config, task, mesh, 1, dataclasses.replace(config.rollouts, exact_kl=exact))
    trained = stage.trainable(start, config.lora, mesh, config.seed, config.init)
    params, frozen = {"policy": trained}, {"reference": start.params}
    params |= critics.value_function(config.critic, start, config.lora, config.reward, mesh, config.seed)
    update = optimizer.make(config.optimizer, config.iterations * algorithm.epochs * algorithm.minibatches, params)
    state = online.begin(loop, params, update, ppo.init(algorithm), config.ema_decay)
    del params, trained  # which the state has copied: a critic's trunk need not stand in memory twice
    state, begun = online.resume(loop, state, config.offload)
    in_loss, mixed = exact and algorithm.kl_in == "loss", algorithm.text_coef > 0
    outputs = objective.make_outputs(
        start.model, task.spec, entropy=True, values=True, ref_kl=in_loss, text=mixed, trunk="policy", adapters=config.lora
    )
    collect, prepare = online.collector(loop, frozen), online.preparer(loop, ppo.prepare)
    learn = online.learner(loop, outputs, ppo.loss, update, state.params, reference=in_loss)
    token_rewards = jax.jit(ppo.token_rewards, static_argnames="config")
    texts = pretrain.review_rows(start.tokenizer, config.batch, config.seed) if mixed else None
    if texts is None:
        ahead.start(loop, frozen, state, prepare, learn)

    for i in run.steps(run.start, config.iterations, "ppo", show=("reward/score", "policy/kl_ref")):
        judged = online.judged(loop, i, state)
        experience, prompts, begun = collect(state.params, i, begun)
        experience, rewarded = online.reward(loop, experience, prompts)
        batch, kept, stats = prepare(experience, state.algorithm)
        online.record(
            loop, i, experience, batch.advantages, partial(token_rewards, experience, state.algorithm, config=algorithm)
        )
        if texts is not None:
            batch = dataclasses.replace(batch, text=sharding.shard_batch(lm.packed(**texts[i]), mesh))
        state, metrics = learn(dataclasses.replace(state, algorithm=kept), frozen, batch)
        if config.ema_decay is not None:
            state = step.update_ema(state, config.ema_decay)
        run.log(i, judged | rewarded | stats | metrics, batch)
        run.maybe_save(i, (state, begun))
    return online.finish(loop, state, begun)


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    out=Path("runs/arithmetic/ppo"),
    iterations=100,
    sampling=tasks.ARITHMETIC,
    algorithm=ppo.Config(kl_coef=0.01, lam=1.0),
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=7e-4),
    evaluate_every=25,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "smoke": Config(iterations=4, batch=32, evaluate_every=2, held_out_prompts=48),
    "arithmetic": ARITHMETIC,
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
