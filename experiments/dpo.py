"""Train the policy on choices directly, without a reward model, by DPO or one of its variants.

    python -m experiments.dpo --choices runs/demo/feedback.sqlite --out runs/demo/dpo
    python -m experiments.dpo --preset ipo --choices mine.jsonl --out runs/demo/ipo
    python -m experiments.dpo --choices None --out runs/demo/dpo     # samples pairs first; a simulated person chooses

The presets are the variants: default (DPO), cdpo, robust, hinge, ipo, simpo. Log-probs are of the plain softmax, of policy and
reference alike, since the answers may come from anywhere. A simulated person chooses by VADER: then TextBlob is the judge. To
change the algorithm, copy jaxrlhf/algorithms/dpo.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import held_out, preference_data, sample_pairs, stage
from jaxrlhf.algorithms import dpo
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Preferences
from jaxrlhf.data import pipeline
from jaxrlhf.evaluation import policy
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    choices: Path | None = Path("runs/demo/feedback.sqlite")  # feedback store, .jsonl file or TFDS folder; None: sample pairs
    reward: Path = Path("runs/demo/reward_model/model")  # also judges held-out answers; nothing is learned from it
    out: Path = Path("runs/demo/dpo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    pairs: sample_pairs.Config = sample_pairs.Config()  # how pairs are sampled, where there are no choices
    width: int = 48  # tokens of a prompt with its answer; longer pairs are left out and counted
    held_out_pairs: float = 0.15  # of the choices
    steps: int = 120
    batch: int = 64  # pairs
    algorithm: dpo.Config = dpo.DPO
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=2e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    sampling: stage.Sampling = stage.Sampling()  # of held-out answers
    evaluate_every: int = 40  # steps; also before the first and after the last
    held_out_prompts: int = 384


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        choices = config.choices
        if choices is None:
            choices = preference_data.sample(config.pairs, config.policy, config.out, config.seed, config.mesh)
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            start = stage.load(config.policy, mesh)
            pairs = preference_data.load(choices, start.tokenizer, config.width, config.held_out_pairs, config.seed)
            train, test = (referenced(config, start, part, pairs.longest) for part in (pairs.train, pairs.held_out))
            data = pipeline.batches(preference_data.arrays(train), config.batch, config.seed)
            judged = stage.load(config.reward, mesh, "reward_model")
            reward = rewards.reward(judged.model, judged.settings["pooling"])
            setting = held_out.Setting(
                model=start.model,
                reference=start.params,
                reward=lambda answers: reward(judged.params, answers),
                prompts=held_out.prompts(start.tokenizer, config.held_out_prompts),
                spec=stage.spec(config.sampling, start.tokenizer),
                tokenizer=start.tokenizer,
                mesh=mesh,
            )
            before = held_out.sample(setting, start.params, jax.random.key(0))

            update = optimizer.make(config.optimizer, config.steps, start.params)
            state = run.restore(step.init_state(start.params, update, jax.random.key(config.seed)))
            outputs = objective.make_outputs(start.model)
            train_step = step.make_train_step(outputs, dpo.loss, config.algorithm, update)
            prepare = jax.jit(dpo.prepare, static_argnames="config")
            judge_pairs = jax.jit(lambda params, batch: dpo.loss(outputs(params, None, batch, None), batch, config.algorithm))
            test_batch, _, counts = prepare(test, (), config=config.algorithm)

            def judgement(params: Any) -> tuple[policy.Samples, dict[str, Any]]:
                # Other draws than the baseline's, so that equals win half. At step 0 the accuracy on pairs says nothing: all
                # implicit rewards are 0 up to rounding.
                samples = held_out.sample(setting, params, jax.random.key(1))
                of_pairs = judge_pairs(params, test_batch)[1]
                accuracy = {"held_out/pair_accuracy": mean(of_pairs["reward/accuracy"])}
                return samples, held_out.flat(held_out.report(samples, before)) | accuracy

            for i in run.steps(run.start, config.steps, "dpo", show=("reward/accuracy", "reward/margin")):
                now = {} if i % config.evaluate_every else judgement(state.params)[1]
                batch = sharding.shard_batch(Preferences(**data[i]), mesh)
                batch, algorithm, stats = prepare(batch, state.algorithm, config=config.algorithm)
                state, metrics = train_step(dataclasses.replace(state, algorithm=algorithm), None, batch)
                run.log(i, now | stats | metrics)
                run.maybe_save(i, state)
            run.maybe_save(config.steps - 1, state, last=True)
            after, now = judgement(state.params)
            run.log(config.steps, now)
        stage.save(config.out / "model", "policy", jax.device_get(state.params), start.config, start.tokenizer)
        curve = [row for row in run.metrics() if "held_out/kl" in row]
        told = {"train": len(train.weight), "held_out": counts, "too_long": pairs.too_long}
        return run.done({"curve": curve, "pairs": told, "samples": policy.side_by_side(before, after)})


def referenced(config: Config, start: stage.Trained, pairs: Preferences, width: int) -> Preferences:
    """The pairs with the log-probs of the reference, which is the policy at its start."""
    if not config.algorithm.reference:
        return pairs
    return dataclasses.replace(pairs, ref_logprobs=rollout.batch_logprobs(start.model, start.params, pairs, width))


def mean(term: Any) -> float:
    """Of a metric's sum and count."""
    return float(term.sum) / max(float(term.count), 1.0)


SMOKE = dataclasses.replace(
    Config(), steps=4, batch=16, evaluate_every=2, held_out_prompts=48, pairs=sample_pairs.PRESETS["smoke"]
)
PRESETS = {
    "default": Config(),
    "cdpo": dataclasses.replace(Config(), algorithm=dpo.CDPO),
    "robust": dataclasses.replace(Config(), algorithm=dpo.ROBUST),
    "hinge": dataclasses.replace(Config(), algorithm=dpo.HINGE),
    "ipo": dataclasses.replace(Config(), algorithm=dpo.IPO),
    "simpo": dataclasses.replace(Config(), algorithm=dpo.SIMPO),
    "smoke": SMOKE,
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
