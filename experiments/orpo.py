"""Train the policy on choices by ORPO: likelihood of the chosen answer and odds against the rejected one, without a reference.

    python -m experiments.orpo --choices runs/demo/feedback.sqlite --out runs/demo/orpo
    python -m experiments.orpo --preset arithmetic  # sums: own right answers against own wrong ones

Choices come from a feedback store, a .jsonl file or a TFDS folder; `--choices None` as in dpo.py. The start may as well be a
pre-trained model, since the loss holds the fine-tuning; held-out answers are compared with those of the start. To change the
algorithm, copy jaxrlhf/algorithms/orpo.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import best, preference_data, stage, tasks, watched
from jaxrlhf.algorithms import orpo
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Preferences
from jaxrlhf.data import pipeline
from jaxrlhf.models import lora
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import pool
from jaxrlhf.training import cli, objective, optimizer, step, timing
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    task: tasks.Name = "sentiment"
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts
    choices: Path | None = Path("runs/demo/feedback.sqlite")  # feedback store, .jsonl file or TFDS folder; None: own answers
    reward: Path = Path("runs/demo/reward_model/model")  # judges held-out reviews too; nothing is learned from it
    out: Path = Path("runs/demo/orpo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    pairs: preference_data.Config = preference_data.Config()
    steps: int = 120
    batch: int = 64  # pairs
    algorithm: orpo.Config = orpo.Config()
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train an adapter over the frozen start
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=2e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    sampling: stage.Sampling = stage.Sampling()  # of held-out answers, and of own answers in the arithmetic task
    microbatches: Microbatches = Microbatches()  # of a batch; with `tokens` rows of about equal length
    evaluate_every: int = 40  # steps; also before the first and after the last
    keep: best.Keep = "last"  # written as model/: the last weights, or the best that a judgement found
    held_out_prompts: int = 384
    pool: pool.Config = pool.Config()  # child processes for reward functions, and functions of your own
    watch: timing.Options = timing.Options()  # wait for each stage, profile steps, refuse to compile after warm-up


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    return tasks.run(config, train)


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy on pairs."""
    task, start = watched.timed(run.clock, task), task.start
    pairs = preference_data.gather(config, task, mesh, run)
    data = pipeline.batches(preference_data.arrays(pairs.train), config.batch, config.seed)
    data = stage.timed(run.clock, pipeline.within(data, start.config.vocab_size))
    params, frozen = stage.trainable(start, config.lora, mesh, config.seed), {"base": start.params}
    update = optimizer.make(config.optimizer, config.steps, params)
    watched.tell_memory(run, config, task, params, update)
    state = run.restore(step.init_state(params, update, jax.random.key(config.seed)))
    outputs = objective.make_outputs(start.model, adapters=config.lora)
    train_step = step.make_train_step(outputs, orpo.loss, config.algorithm, update, config.microbatches)
    train_step = run.clock.learner(train_step, *watched.learning(config, task, params))
    prepare = jax.jit(orpo.prepare, static_argnames="config")

    def judge(params: Any) -> tuple[tasks.Figures, list[dict[str, str]]]:
        return task.judge(lora.attach(start.params, params, config.lora))

    for i in run.steps(run.start, config.steps, "orpo", show=("loss/lm", "reward/accuracy")):
        judged = best.judged(run, i, config.evaluate_every, task.best, step.served(state), judge)
        batch = sharding.shard_batch(Preferences(**data[i]), mesh)
        batch, algorithm, stats = prepare(batch, state.algorithm, config=config.algorithm)
        state, metrics = train_step(dataclasses.replace(state, algorithm=algorithm), frozen, batch)
        run.log(i, judged | stats | metrics, batch)
        run.maybe_save(i, state)
    run.maybe_save(config.steps - 1, state, last=True)
    last = config.steps, config.evaluate_every, task.best, step.served(state)
    trained, (_, samples) = best.finish(run, *last, judge, config.keep)
    stage.save_policy(config.out, start, trained, config.lora, config.policy)
    curve = [row for row in run.metrics() if "held_out/kl" in row]
    told = {"train": len(pairs.train.weight), "too_long": pairs.too_long}
    return run.done({"curve": curve, "pairs": told, "samples": samples})


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    choices=None,
    out=Path("runs/arithmetic/orpo"),
    pairs=preference_data.Config(width=16),  # the context of the start
    sampling=tasks.ARITHMETIC,
    steps=200,
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=5e-4),
    evaluate_every=50,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "arithmetic": ARITHMETIC,
    "smoke": Config(steps=4, batch=16, evaluate_every=2, held_out_prompts=48),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
