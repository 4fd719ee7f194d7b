"""Train the policy by online DPO: it answers each prompt several times, and the answers that the reward model finds best and
worst are a pair.

    python -m experiments.online_dpo --policy runs/demo/sft/model --reward runs/demo/reward_model/model

Log-probs of policy and reference are those of the sampling policy: at its temperature, with its constraints. The pairs and the
loss are in jaxrlhf/algorithms/dpo.py; to change the algorithm, copy it and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import held_out, ppo, stage
from jaxrlhf.algorithms import dpo
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Experience
from jaxrlhf.evaluation import policy
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    reward: Path = Path("runs/demo/reward_model/model")  # the judge
    out: Path = Path("runs/demo/online_dpo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    iterations: int = 24
    batch: int = 128  # prompts an iteration
    n: int = 2  # answers to each; the best and the worst are learned from
    soft: bool = False  # labels are the Bradley-Terry probability of the scores instead of 1
    missing_eos_penalty: float = 1.0  # taken off the score of an answer that did not end by itself
    epochs: int = 2  # passes over one rollout's pairs
    minibatches: int = 2  # optimizer steps a pass
    sampling: stage.Sampling = stage.Sampling()
    algorithm: dpo.Config = dpo.DPO
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=3e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    evaluate_every: int = 6  # iterations; also before the first and after the last
    held_out_prompts: int = 384

    def __post_init__(self):
        if self.n < 2:
            raise ValueError(f"n={self.n} must be at least 2: one answer is no pair")


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` and `result.json` into `config.out`."""
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            start = stage.load(config.policy, mesh)
            judged = stage.load(config.reward, mesh, "reward_model")
            reward = rewards.reward(judged.model, judged.settings["pooling"])
            spec = stage.spec(config.sampling, start.tokenizer)
            prompts = ppo.prompt_batches(start.tokenizer, config.batch, config.seed)
            setting = held_out.Setting(
                model=start.model,
                reference=start.params,
                reward=lambda answers: reward(judged.params, answers),
                prompts=held_out.prompts(start.tokenizer, config.held_out_prompts),
                spec=spec,
                tokenizer=start.tokenizer,
                mesh=mesh,
            )
            before = held_out.sample(setting, start.params, jax.random.key(0))

            def answers(params: Any) -> policy.Samples:  # other draws than the baseline's, so that equals win half
                return held_out.sample(setting, params, jax.random.key(1))

            def experience(params: Any, i: int, key: jax.Array) -> Experience:
                """Answers with the judge's scores; the sampler's log-probs do, as a pair needs the reference's alone."""
                batch, options = sharding.shard_batch(prompts[i], mesh), rollout.Options(reuse_sampler_logprobs=True)
                parts = {"policy": params}, {"reference": start.params}
                drawn = rollout.collect(start.model, *parts, batch, spec, key, config.n, version=i, options=options)
                cut = config.missing_eos_penalty * ~drawn.rollout.finished
                return dataclasses.replace(drawn, score=reward(judged.params, drawn.rollout) - cut)

            updates = config.iterations * config.epochs * config.minibatches
            update = optimizer.make(config.optimizer, updates, start.params)
            keys = jax.random.split(jax.random.key(config.seed))  # of the updates, and of the answers
            state = run.restore(step.init_state(start.params, update, keys[0]))
            outputs = objective.make_outputs(start.model, spec)
            run_epochs = step.make_epochs(outputs, dpo.loss, config.algorithm, update, config.epochs, config.minibatches)
            pairs = jax.jit(dpo.from_experience, static_argnames=("n", "soft"))
            prepare, describe = jax.jit(dpo.prepare, static_argnames="config"), jax.jit(rollout.stats)

            for i in run.steps(run.start, config.iterations, "online dpo", show=("reward/score", "reward/accuracy")):
                now = None if i % config.evaluate_every else answers(state.params)
                drawn = experience(state.params, i, jax.random.fold_in(keys[1], i))
                chosen = pairs(drawn, n=config.n, soft=config.soft)
                batch, algorithm, stats = prepare(chosen, state.algorithm, config=config.algorithm)
                state, metrics = run_epochs(dataclasses.replace(state, algorithm=algorithm), None, batch)
                judgement = {} if now is None else held_out.flat(held_out.report(now, before))
                run.log(i, judgement | describe(drawn) | {"reward/score": drawn.score.mean()} | stats | metrics)
                run.maybe_save(i, state)
            run.maybe_save(config.iterations - 1, state, last=True)
            after = answers(state.params)
            run.log(config.iterations, held_out.flat(held_out.report(after, before)))
        stage.save(config.out / "model", "policy", jax.device_get(state.params), start.config, start.tokenizer)
        curve = [row for row in run.metrics() if "held_out/kl" in row]
        return run.done({"curve": curve, "samples": policy.side_by_side(before, after)})


PRESETS = {
    "default": Config(),
    "smoke": Config(iterations=4, batch=16, evaluate_every=2, held_out_prompts=48),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
