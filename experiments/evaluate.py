"""Judge policies on held-out prompts: outside judges, win rates with intervals, KL, length, diversity, best-of-n, samples.

    python -m experiments.evaluate --baseline runs/demo/sft/model --candidate runs/demo/ppo/model --out runs/demo/evaluate

VADER and TextBlob read whole texts and were never trained on (VADER labels the second round: TextBlob is its judge then).
The ridge is fitted on the held-out rated texts only. All policies answer the same prompts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import held_out, stage
from jaxrlhf.algorithms import best_of_n
from jaxrlhf.core import processes, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.evaluation import judges, policy, reward_model, win_rate
from jaxrlhf.sampling import generate
from jaxrlhf.training import cli
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    baseline: Path = Path("runs/demo/sft/model")  # also the reference of the KL
    candidate: Path = Path("runs/demo/ppo/model")
    reward: Path = Path("runs/demo/reward_model/model")  # the proxy, and what picks the best of n
    out: Path = Path("runs/demo/evaluate")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    prompts: int = 768
    best_of: tuple[int, ...] = (1, 2, 4, 8)  # of the baseline's samples; () leaves it out
    best_of_prompts: int = 384
    sampling: stage.Sampling = stage.Sampling()


def run(config: Config) -> dict[str, Any]:
    """Write the figures of baseline and candidate to `result.json` in `config.out`."""
    mesh = stage.mesh(config.mesh, prompts=config.prompts, best_of_prompts=config.best_of_prompts if config.best_of else 0)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh):
            baseline, candidate = stage.load(config.baseline, mesh), stage.load(config.candidate, mesh)
            judged = stage.load_reward(config.reward, mesh, baseline)
            reward = stage.reward(judged)
            setting = held_out.Setting(
                model=baseline.model,
                reference=baseline.params,
                reward=lambda rollout: reward(judged.params, rollout),
                prompts=held_out.prompts(baseline.tokenizer, config.prompts),
                spec=stage.spec(config.sampling, baseline.tokenizer),
                tokenizer=baseline.tokenizer,
                mesh=mesh,
            )
            test = human_sentiment.reviews("test")
            ridge = judges.fit_ridge([pipeline.clean(r.text) for r in test], [r.mean for r in test])
            judging = held_out.JUDGES | {"ridge": ridge.predict}
            keys = jax.random.split(jax.random.key(config.seed), 3)
            before = held_out.sample(setting, baseline.params, keys[0])
            again = held_out.sample(setting, baseline.params, keys[1])
            after = held_out.sample(setting, candidate.params, keys[1])
            start, ended = policy.judge(before, judging), policy.judge(after, judging)
            result = {
                "baseline": policy.evaluate_policy(before, start),
                "baseline_again": policy.evaluate_policy(again, policy.judge(again, judging), start),
                "candidate": policy.evaluate_policy(after, ended, start),
                "reward_drift": {
                    "baseline": reward_model.on_samples(before.proxy, before.length, start),
                    "candidate": reward_model.on_samples(after.proxy, after.length, ended),
                },
                "samples": policy.side_by_side(before, after),
            }
            if config.best_of:
                result["best_of_n"] = choose_best(config, setting, baseline.params, start, judging, keys[2])
        return run.done(result)


def choose_best(config: Config, setting: held_out.Setting, params: Any, start: dict, judging: dict, key: jax.Array) -> list:
    """Best-of-n of the baseline by the proxy: what choosing among samples buys without any training."""
    few = pipeline.take_prompts(setting.prompts, slice(config.best_of_prompts))
    most = max(config.best_of)
    few = sharding.shard_batch(few, setting.mesh)
    drawn = generate.generate(setting.model, params, few, setting.spec, key, most, options=stage.ONCE)
    texts = [prompt + response for prompt, response in zip(*stage.texts(drawn, setting.tokenizer), strict=True)]
    proxy = processes.to_host(setting.reward(drawn)).reshape(-1, most)
    values = {"length": processes.to_host(drawn.response_len).astype(np.float64).reshape(-1, most)}
    for name, judge in judging.items():
        values[name] = judge(texts).reshape(-1, most)
        values[f"win_{name}"] = win_rate.outcomes(values[name], start[name][: len(proxy), None])
    return best_of_n.table(proxy, values, config.best_of)


PRESETS = {"default": Config(), "smoke": Config(prompts=48, best_of=(1, 2), best_of_prompts=16)}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
