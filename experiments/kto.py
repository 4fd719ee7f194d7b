"""Train the policy by KTO on single answers that are marked desirable or undesirable.

    python -m experiments.kto --choices runs/demo/feedback.sqlite --out runs/demo/kto
    python -m experiments.kto --choices runs/demo/feedback.sqlite --learn thumbs  # what people marked while they chatted
    python -m experiments.kto --preset arithmetic  # sums: own right answers and own wrong ones

The marks are made from choices (a feedback store, a .jsonl file or a TFDS folder; `--choices None` as in dpo.py): the chosen
answer of a pair is desirable, the other undesirable, and from then on each stands alone. Or they are thumbs, up and down, which
the chat service keeps in the same store (docs/serving.md). Log-probs are of the plain softmax.
To change the algorithm, copy jaxrlhf/algorithms/kto.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import best, preference_data, stage, tasks, watched
from jaxrlhf.algorithms import kto
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import pipeline
from jaxrlhf.models import lora
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.rewards import pool
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, step, timing
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    task: tasks.Name = "sentiment"
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    choices: Path | None = Path("runs/demo/feedback.sqlite")  # feedback store, .jsonl file or TFDS folder; None: own answers
    reward: Path = Path("runs/demo/reward_model/model")  # judges held-out reviews too; nothing is learned from it
    out: Path = Path("runs/demo/kto")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    learn: Literal["pairs", "thumbs", "both"] = "pairs"  # of a store: choices, thumbs of the chat service (serve.py), or both
    pairs: preference_data.Config = preference_data.Config()
    steps: int = 120
    batch: int = 128  # answers
    algorithm: kto.Config = kto.Config()
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
    """Train the task's policy on single answers."""
    task, start = watched.timed(run.clock, task), task.start
    examples, longest, too_long = gather(config, task, mesh, run)
    reference = rollout.batch_logprobs(start.model, start.params, examples, longest)
    examples = dataclasses.replace(examples, ref_logprobs=reference)
    data = pipeline.batches(preference_data.arrays(examples), config.batch, config.seed)
    data = stage.timed(run.clock, pipeline.within(data, start.config.vocab_size))
    params, frozen = stage.trainable(start, config.lora, mesh, config.seed), {"base": start.params}
    update = optimizer.make(config.optimizer, config.steps, params)
    watched.tell_memory(run, config, task, params, update)
    state = run.restore(step.init_state(params, update, jax.random.key(config.seed)))
    outputs = objective.make_outputs(start.model, adapters=config.lora)
    train_step = step.make_train_step(outputs, kto.loss, config.algorithm, update, config.microbatches)
    train_step = run.clock.learner(train_step, *watched.learning(config, task, params))
    prepare, mismatched = jax.jit(kto.prepare, static_argnames="config"), jax.jit(kto.mismatched)

    def with_others(batch: kto.Examples, params: Any) -> kto.Examples:
        """The batch with what its reference point is estimated from: each prompt with another one's answer."""
        others = mismatched(batch)
        run.clock.scored(others, Pass(start.config), Pass(start.config, lora=config.lora))
        own, reference = (rollout.batch_logprobs(start.model, p, others, longest) for p in (params, start.params))
        return dataclasses.replace(batch, other_ratio=(own - reference).sum(axis=1), other_weight=others.weight)

    with_others = run.clock.timed("score", with_others)

    def judge(params: Any) -> tuple[tasks.Figures, list[dict[str, str]]]:
        return task.judge(lora.attach(start.params, params, config.lora))

    show = ("policy/kl_mismatched", "reward/desirable", "reward/undesirable")
    for i in run.steps(run.start, config.steps, "kto", show=show):
        current = lora.attach(start.params, step.served(state), config.lora)
        judged = best.judged(run, i, config.evaluate_every, task.best, step.served(state), judge)
        batch = with_others(sharding.shard_batch(kto.Examples(**data[i]), mesh), current)
        batch, algorithm, stats = prepare(batch, state.algorithm, config=config.algorithm)
        state, metrics = train_step(dataclasses.replace(state, algorithm=algorithm), frozen, batch)
        run.log(i, judged | stats | metrics, batch)
        run.maybe_save(i, state)
    run.maybe_save(config.steps - 1, state, last=True)
    last = config.steps, config.evaluate_every, task.best, step.served(state)
    trained, (_, samples) = best.finish(run, *last, judge, config.keep)
    stage.save_policy(config.out, start, trained, config.lora, config.policy)
    curve = [row for row in run.metrics() if "held_out/kl" in row]
    good = int((np.asarray(examples.desirable) & (np.asarray(examples.weight) > 0)).sum())
    told = {"answers": len(examples.weight), "desirable": good, "too_long": too_long}
    return run.done({"curve": curve, "data": told, "samples": samples})


def gather(config: Config, task: tasks.Task, mesh: jax.sharding.Mesh, run: Run) -> tuple[kto.Examples, int, int]:
    """Single answers to learn from, tokens of the longest of them, and how many were left out for want of room.

    Raises:
        ValueError: thumbs without a store, or none in it.
    """
    parts, too_long = [], 0
    if config.learn != "thumbs":
        pairs = preference_data.gather(config, task, mesh, run)
        parts.append(kto.from_preferences(pairs.train))
        too_long += pairs.too_long
    if config.learn != "pairs":
        if config.choices is None:
            raise ValueError(f"learn='{config.learn}' reads thumbs from a feedback store: give it as --choices")
        fields, left_out = preference_data.thumbs(config.choices, task.start.tokenizer, config.pairs.width, run)
        parts.append(kto.Examples(**fields))
        too_long += left_out
    examples = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return examples, int(np.max(examples.response_len)), too_long


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    choices=None,
    out=Path("runs/arithmetic/kto"),
    pairs=preference_data.Config(width=16),  # the context of the start
    sampling=tasks.ARITHMETIC,
    steps=200,
    algorithm=kto.Config(beta=0.5),
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=3e-4),
    evaluate_every=50,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "arithmetic": ARITHMETIC,
    "smoke": Config(steps=4, batch=32, evaluate_every=2, held_out_prompts=48),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
