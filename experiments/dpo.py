"""Train the policy on choices directly, without a reward model, by DPO or one of its variants.

    python -m experiments.dpo --choices runs/demo/feedback.sqlite --out runs/demo/dpo
    python -m experiments.dpo --preset ipo --choices mine.jsonl --out runs/demo/ipo
    python -m experiments.dpo --choices None       # samples answers to choose from; a simulated person chooses
    python -m experiments.dpo --preset arithmetic  # sums: own right answers against own wrong ones

The presets are the variants: default (DPO), cdpo, robust, hinge, ipo, simpo. Log-probs are of the plain softmax, of policy and
reference alike, since the answers may come from anywhere. A simulated person chooses by VADER: then TextBlob is the judge. To
change the algorithm, copy jaxrlhf/algorithms/dpo.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import best, preference_data, stage, tasks, watched
from jaxrlhf.algorithms import dpo
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Preferences
from jaxrlhf.data import pipeline
from jaxrlhf.models import lora
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
    choices: Path | None = Path("runs/demo/feedback.sqlite")  # feedback store, .jsonl file or TFDS folder; None: own answers
    reward: Path = Path("runs/demo/reward_model/model")  # judges held-out reviews too; nothing is learned from it
    out: Path = Path("runs/demo/dpo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    pairs: preference_data.Config = preference_data.Config()
    steps: int = 120
    batch: int = 64  # pairs
    algorithm: dpo.Config = dpo.Config(beta=0.3)  # at 0.1 this small model leaves 18 nats between itself and the reference
    lora: LoraConfig = LoraConfig()  # with a rank > 0: train an adapter over the frozen start
    frozen: stage.Weights = "float32"  # of the frozen start: what adapters lie over, and the reference
    offload: Literal["none", "optimizer"] = "none"  # rests in the hosts' memory between updates
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=1e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
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
    return tasks.run(config, train, weights=config.frozen)


def train(run: Run, config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Train the task's policy on pairs."""
    task, start = watched.timed(run.clock, task), task.start
    pairs = preference_data.gather(config, task, mesh, run)
    learned, test = (referenced(config, start, part, pairs.longest) for part in (pairs.train, pairs.held_out))
    data = pipeline.batches(preference_data.arrays(learned), config.batch, config.seed)
    data = stage.timed(run.clock, pipeline.within(data, start.config.vocab_size))
    params, frozen = stage.trainable(start, config.lora, mesh, config.seed, config.init), {"base": start.params}
    update = optimizer.make(config.optimizer, config.steps, params)
    watched.tell_memory(run, config, task, params, update)
    state = stage.at_rest(run.restore(step.init_state(params, update, jax.random.key(config.seed))), config.offload)
    del params  # which the state has copied
    outputs = objective.make_outputs(start.model, adapters=config.lora)
    train_step = step.make_train_step(outputs, dpo.loss, config.algorithm, update, config.microbatches)
    train_step = run.clock.learner(train_step, *watched.learning(config, task, state.params))
    prepare = jax.jit(dpo.prepare, static_argnames="config")
    test, _, counts = prepare(test, (), config=config.algorithm)
    of_pairs = jax.jit(lambda params, frozen, batch: dpo.loss(outputs(params, frozen, batch, None), batch, config.algorithm)[1])

    def judge(params: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
        figures, samples = task.judge(lora.attach(start.params, params, config.lora))
        # Before the first update this says nothing: all implicit rewards are 0 up to rounding.
        right = of_pairs(params, frozen, test)["reward/accuracy"]
        return figures | {"held_out/pair_accuracy": float(right.sum / right.count)}, samples

    for i in run.steps(run.start, config.steps, "dpo", show=("reward/accuracy", "reward/margin")):
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
    told = {"train": len(pairs.train.weight), "held_out": counts, "too_long": pairs.too_long}
    return run.done({"curve": curve, "pairs": told, "samples": samples})


def referenced(config: Config, start: stage.Trained, pairs: Preferences, width: int) -> Preferences:
    """The pairs with the log-probs of the reference, which is the policy at its start."""
    if not config.algorithm.reference:
        return pairs
    return dataclasses.replace(pairs, ref_logprobs=rollout.batch_logprobs(start.model, start.params, pairs, width))


ARITHMETIC = Config(
    task="arithmetic",
    policy=tasks.ARITHMETIC_POLICY,
    choices=None,
    out=Path("runs/arithmetic/dpo"),
    pairs=preference_data.Config(width=16),  # the context of the start
    sampling=tasks.ARITHMETIC,
    steps=200,
    # Without the likelihood term wrong answers lose probability, but to other wrong ones: 42 % right fell to 20 %.
    algorithm=dpo.Config(beta=0.3, nll_coef=1.0),
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=3e-4),
    evaluate_every=50,
    held_out_prompts=500,
)
PRESETS = {
    "default": Config(),
    "cdpo": dataclasses.replace(Config(), algorithm=dataclasses.replace(dpo.CDPO, beta=0.3)),
    "robust": dataclasses.replace(Config(), algorithm=dataclasses.replace(dpo.ROBUST, beta=0.3)),
    "hinge": dataclasses.replace(Config(), algorithm=dataclasses.replace(dpo.HINGE, beta=0.3)),
    "ipo": dataclasses.replace(Config(), algorithm=dpo.IPO),
    "simpo": dataclasses.replace(Config(), algorithm=dpo.SIMPO),
    "arithmetic": ARITHMETIC,
    "smoke": Config(steps=4, batch=16, evaluate_every=2, held_out_prompts=48, pairs=preference_data.Config(prompts=64)),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="policy")
