"""Stage 4: train the policy against the reward model with PPO, held near the fine-tuned model it starts from.

    python -m experiments.ppo --policy runs/demo/sft/model --reward runs/demo/reward_model/model --out runs/demo/ppo

One iteration: sample answers, score them, turn scores and KL into advantages, a few epochs of clipped updates. To change the
algorithm, copy jaxrlhf/algorithms/ppo.py and this page.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from experiments import held_out, stage
from jaxrlhf.algorithms import ppo
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation import policy
from jaxrlhf.models import heads
from jaxrlhf.sampling import rollout
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    policy: Path = Path("runs/demo/sft/model")  # where the policy starts, and the reference it is held near
    reward: Path = Path("runs/demo/reward_model/model")
    out: Path = Path("runs/demo/ppo")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    iterations: int = 24
    batch: int = 256  # answers an iteration, each to its own prompt
    sampling: stage.Sampling = stage.Sampling()
    algorithm: ppo.Config = ppo.Config(kl_coef=0.12)
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", learning_rate=3e-4, b2=0.98, warmup_fraction=0.1, final_fraction=0.1, clip_norm=1.0
    )
    evaluate_every: int = 6  # iterations; also before the first and after the last
    held_out_prompts: int = 384


def run(config: Config) -> dict[str, Any]:
    """Train, and write `model/` (the policy alone) and `result.json` into `config.out`."""
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            start = stage.load(config.policy, mesh)
            judged = stage.load(config.reward, mesh, "reward_model")
            reward = stage.reward(judged)
            spec = stage.spec(config.sampling, start.tokenizer)
            prompts = prompt_batches(start.tokenizer, config.batch, config.seed)
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

            value = sharding.init_params(heads.value_specs(start.config.width), jax.random.key(config.seed))
            params = {"policy": start.params, "value": jax.device_put(value, sharding.replicated(mesh))}
            frozen = {"reference": start.params}
            updates = config.iterations * config.algorithm.epochs * config.algorithm.minibatches
            update = optimizer.make(config.optimizer, updates, params)
            keys = jax.random.split(jax.random.key(config.seed))  # of the updates, and of the answers
            state = run.restore(step.init_state(params, update, keys[0], ppo.init(config.algorithm)))
            outputs = objective.make_outputs(start.model, spec, entropy=True, values=True, trunk="policy")
            run_epochs = step.make_epochs(
                outputs, ppo.loss, config.algorithm, update, config.algorithm.epochs, config.algorithm.minibatches
            )
            prepare, describe = jax.jit(ppo.prepare, static_argnames="config"), jax.jit(rollout.stats)

            for i in run.steps(run.start, config.iterations, "ppo", show=("reward/score", "policy/kl_ref")):
                now = None if i % config.evaluate_every else answers(state.params["policy"])
                batch = sharding.shard_batch(prompts[i], mesh)
                key = jax.random.fold_in(keys[1], i)
                experience = rollout.collect(start.model, state.params, frozen, batch, spec, key, version=i)
                experience = dataclasses.replace(experience, score=reward(judged.params, experience.rollout))
                drawn = describe(experience)
                batch, algorithm, stats = prepare(experience, state.algorithm, config=config.algorithm)
                state, metrics = run_epochs(dataclasses.replace(state, algorithm=algorithm), frozen, batch)
                judgement = {} if now is None else held_out.flat(held_out.report(now, before))
                run.log(i, judgement | drawn | stats | metrics)
                run.maybe_save(i, state)
            run.maybe_save(config.iterations - 1, state, last=True)
            after = answers(state.params["policy"])
            run.log(config.iterations, held_out.flat(held_out.report(after, before)))
        stage.save(config.out / "model", "policy", jax.device_get(state.params["policy"]), start.config, start.tokenizer)
        curve = [row for row in run.metrics() if "held_out/kl" in row]
        return run.done({"curve": curve, "samples": policy.side_by_side(before, after)})


def prompt_batches(tokenizer: Tokenizer, batch: int, seed: int) -> Any:
    """`[iteration]`: the first words of training reviews."""
    texts = [pipeline.clean(rating.text) for rating in human_sentiment.reviews("train")]
    return pipeline.prompt_batches(pipeline.cut_prompts(tokenizer.encode_batch(texts), tokenizer, seed), batch, seed)


PRESETS = {
    "default": Config(),
    "smoke": Config(iterations=4, batch=32, evaluate_every=2, held_out_prompts=48),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
