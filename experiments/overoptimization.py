"""How far a learned reward can be trusted: a gold reward, proxies that learned from its choices, and policies that press them.

    python -m experiments.overoptimization --out runs/overoptimization       # after rlhf.py: reads three models of runs/demo

Gao et al. 2022 in small, with the ensembles of Coste et al. 2023. The gold reward, trained on all of people's ratings, stands
for people and is never optimised. It chooses between answers of the fine-tuned model, with errors. Proxies of three sizes and
several seeds learn from these choices alone, all seeds of a size in one program. Then best-of-n and PPO without a KL penalty
press each proxy, and each ensemble of the seeds, and the gold score is watched against the square root of the KL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import held_out, ppo, reward_data, reward_model, reward_params, reward_scores, stage, tasks
from jaxrlhf.algorithms import best_of_n
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Rollout, SamplingSpec
from jaxrlhf.data import pipeline
from jaxrlhf.data.pipeline import Arrays
from jaxrlhf.evaluation import overoptimization
from jaxrlhf.evaluation import reward_model as judging
from jaxrlhf.models import transformer
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate
from jaxrlhf.training import cli
from jaxrlhf.training.metrics import write_atomic
from jaxrlhf.training.run import Run

Reward = Callable[[Rollout], jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("runs/demo/pretrain/model")  # language model whose first layers are the proxies' start
    policy: Path = Path("runs/demo/sft/model")  # whose answers are compared, and where every policy starts
    gold: Path = Path("runs/demo/reward_model/model")  # stands for people
    out: Path = Path("runs/overoptimization")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    layers: tuple[int, ...] = (2, 2, 2)  # of each size of proxy, the smallest first; and of each
    choices: tuple[int, ...] = (64, 256, 1024)  # the prompts whose answers it learned from
    responses: int = 2  # answers to each of these prompts, for the gold reward to choose from
    choose: Literal["pairs", "best"] = "pairs"  # of every two answers, or the best of all
    noise: float = 0.25  # share of the choices that go wrong
    proxy: reward_model.Config = reward_model.Config(
        steps=60,
        pairs=32,
        ensemble=3,  # seeds of each size
        ensemble_of="models",
        head_init="normal",
        optimizer=dataclasses.replace(reward_model.Config().optimizer, learning_rate=0.002),
    )
    aggregations: tuple[ensembles.Aggregation, ...] = ("worst", "uncertainty")  # of a size's seeds, pressed as well
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    best_of_prompts: int = 96
    kl_coefs: tuple[float, ...] = (0.0,)  # of PPO
    pressed: int = 3  # seeds of each size that PPO presses; best-of-n presses all
    ppo: ppo.Config = dataclasses.replace(
        ppo.Config(),
        iterations=24,
        batch=128,
        sampling=stage.Sampling(min_tokens=0),
        optimizer=dataclasses.replace(ppo.Config().optimizer, learning_rate=2e-3),
        evaluate_every=3,
        held_out_prompts=256,
    )

    def __post_init__(self):
        if self.proxy.ensemble < 2 or self.proxy.ensemble_of != "models":
            raise ValueError("proxy must be an ensemble of 2 or more models: they are the seeds of a size")
        if not 1 <= self.pressed <= self.proxy.ensemble:
            raise ValueError(f"pressed={self.pressed} must be between 1 and the {self.proxy.ensemble} seeds of a size")
        if not 0 <= self.noise < 0.5:
            raise ValueError(f"noise={self.noise} must be in [0, 0.5); at 0.5 the choices say nothing")
        if self.responses < 2:
            raise ValueError(f"responses={self.responses}: there is nothing to choose from; take 2 or more")
        if len(self.layers) != len(self.choices):
            raise ValueError(f"{len(self.layers)} layers and {len(self.choices)} choices: give one of each for each size")


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all measurements share."""

    policy: stage.Trained
    trunk: stage.Trained
    gold: Reward
    spec: SamplingSpec
    mesh: jax.sharding.Mesh


def run(config: Config) -> dict[str, Any]:
    """Write the curves and their fits to `result.json` in `config.out`, and `plots/*.svg`."""
    with Run.open(config.out, config, tensorboard=False) as run:
        if run.result is not None:
            return run.result
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            judged, policy = stage.load(config.gold, mesh, "reward_model"), stage.load(config.policy, mesh)
            gold, spec = stage.reward(judged), stage.spec(config.ppo.sampling, policy.tokenizer)
            lab = Lab(policy, stage.load(config.init, mesh), lambda rows: gold(judged.params, rows), spec, mesh)
            sets = chosen(config, lab)
            sizes = list(zip(config.layers, config.choices, strict=True))
            proxies = {f"{n} layers, {k} choices": proxy(config, lab, sets, n, k) for n, k in sizes}
            best = choose_best(config, lab, proxies)
            pressed = [row for size, judged in proxies.items() for row in press(config, lab, size, judged)]
        figures = {"best_of_n": overoptimization.figure("Best of n: gold score (faint: the proxy's)", best)}
        for coef in config.kl_coefs:
            rows = [row for row in pressed if row["kl_coef"] == coef]
            title = f"PPO, KL price {coef:g}: gold score (faint: the proxy's)"
            figures[f"ppo_{coef:g}"] = overoptimization.figure(title, rows)
        (config.out / "plots").mkdir(exist_ok=True)
        for name, picture in figures.items():
            write_atomic(config.out / "plots" / f"{name}.svg", picture)
        every = [*best, *pressed]
        result = {
            "best_of_n": best,
            "ppo": pressed,
            "fits": overoptimization.fits(every),
            "peaks": overoptimization.peaks(every),
            "at_equal_distance": overoptimization.at_equal_distance(every),
        }
        return run.done(result)


def chosen(config: Config, lab: Lab, size: int = 128) -> Arrays:
    """Sets of answers with the gold reward's choices: fields of `reward.Batch`."""
    prompts, key, found = tasks.review_prompts(lab.policy.tokenizer, size, config.seed), jax.random.key(config.seed), []
    for i in range(-(-max(config.choices) // size)):
        batch = sharding.shard_batch(prompts[i], lab.mesh)
        drawn = generate.generate(lab.policy.model, lab.policy.params, batch, lab.spec, key, config.responses)
        found.append(jax.device_get((drawn.tokens, drawn.prompt_len, drawn.response_len, lab.gold(drawn))))
    rows = [np.concatenate(field) for field in zip(*found, strict=True)]
    *rows, gold = (field.reshape(-1, config.responses, *field.shape[1:]) for field in rows)
    sets = dict(zip(("tokens", "prompt_len", "response_len"), rows, strict=True))
    pairs = overoptimization.chosen_pairs(gold, config.noise, config.seed)
    if config.choose == "pairs":
        return sets | {"preferred": pairs}
    return sets | {"preferred": np.zeros_like(pairs), "best": overoptimization.chosen_best(gold, config.noise, config.seed)}


def proxy(config: Config, lab: Lab, sets: Arrays, layers: int, choices: int) -> stage.Trained:
    """All seeds of the proxy of that size, each normalised on the answers that it learned from."""
    settings = dataclasses.replace(config.proxy, out=config.out / f"proxy_{layers}_{choices}", seed=config.seed)
    trunk, several = lab.trunk, aggregated(config, "mean")
    if layers > trunk.config.layers:
        raise ValueError(f"layers={layers}: the language model in {config.init} has {trunk.config.layers}")
    with Run.open(settings.out, settings) as run:
        if run.result is None:
            few = {name: array[:choices] for name, array in sets.items()}
            shape = dataclasses.replace(trunk.config, layers=layers)
            first = trunk.params | {"layers": jax.tree.map(lambda w: w[:layers], trunk.params["layers"])}
            data = reward_data.of_members(several, lambda seed: pipeline.batches(few, settings.pairs, seed), config.seed)
            params = reward_params.fresh(settings, shape, first, lab.mesh)
            params = rewards.with_scale(reward_model.train(run, settings, shape, params, data))
            rows = {"tokens": few["tokens"], "length": few["prompt_len"] + few["response_len"]}
            rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in rows.items()}
            scores = reward_scores.score_texts(settings, transformer.build(shape), params, rows)
            params = rewards.normalise(params, jnp.asarray(scores))
            reward_params.save(settings.out / "model", settings, params, shape, trunk.tokenizer)
            run.done({})
    return stage.load(settings.out / "model", lab.mesh, "reward_model")


def aggregated(config: Config, name: ensembles.Aggregation) -> ensembles.Config:
    """The seeds of a size as an ensemble."""
    return ensembles.Config(config.proxy.ensemble, "models", name, config.proxy.uncertainty_coef)


def choose_best(config: Config, lab: Lab, proxies: Mapping[str, stage.Trained], prompts: int = 16) -> list[dict[str, Any]]:
    """Best-of-n by every seed and aggregation of every size: its curve, and how it orders a prompt's samples."""
    every, most = held_out.prompts(lab.policy.tokenizer, config.best_of_prompts), max(config.best_of)
    score = {size: reward_scores.scores_of(config.proxy, judged.model) for size, judged in proxies.items()}
    gold: list[np.ndarray] = []
    scores: dict[str, list[np.ndarray]] = {size: [] for size in proxies}
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    for start in range(0, config.best_of_prompts, prompts):
        few = sharding.shard_batch(pipeline.take_prompts(every, slice(start, start + prompts)), lab.mesh)
        drawn = generate.generate(lab.policy.model, lab.policy.params, few, lab.spec, key, most)
        gold.append(np.asarray(lab.gold(drawn)))
        for size, judged in proxies.items():
            scores[size].append(np.asarray(score[size](judged.params, drawn.tokens, drawn.prompt_len + drawn.response_len)))
    judged_gold, rows = np.concatenate(gold).reshape(-1, most), []
    for size, parts in scores.items():
        own = np.concatenate(parts, axis=1)
        named = {str(m): values for m, values in enumerate(own)}
        named |= {
            name: np.asarray(ensembles.aggregate(jnp.asarray(own), aggregated(config, name))) for name in config.aggregations
        }
        for name, values in named.items():
            values = values.reshape(-1, most)
            curve = overoptimization.curve(best_of_n.table(values, {"gold": judged_gold}, config.best_of))
            rows.append({"size": size, "proxy": name, "agreement": judging.agreement(values, judged_gold), "rows": curve})
    return rows


def press(config: Config, lab: Lab, size: str, judged: stage.Trained) -> list[dict[str, Any]]:
    """PPO against `config.pressed` seeds of a size, and against every aggregation of them all."""
    pooling = judged.settings["pooling"]
    alone = rewards.reward(judged.model, pooling)
    against: dict[str, tuple[Callable, Any]] = {
        str(m): (alone, ensembles.member(judged.params, m, aggregated(config, "mean"))) for m in range(config.pressed)
    }
    for name in config.aggregations:
        against[name] = (ensembles.reward(judged.model, pooling, aggregated(config, name)), judged.params)
    rows = []
    for kl_coef in config.kl_coefs:
        for name, (reward, params) in against.items():
            folder = config.out / "ppo" / f"{size.replace(', ', '_').replace(' ', '_')}_{name}_{kl_coef:g}"
            curve = optimise(config, lab, folder, kl_coef, lambda answers, r=reward, p=params: r(p, answers))
            rows.append({"size": size, "proxy": name, "kl_coef": kl_coef, "rows": curve})
    return rows


def optimise(config: Config, lab: Lab, folder: Path, kl_coef: float, reward: Reward) -> list[dict[str, Any]]:
    """The course of PPO from the fine-tuned model against a reward."""
    algorithm = dataclasses.replace(config.ppo.algorithm, kl_coef=kl_coef)
    settings = dataclasses.replace(config.ppo, policy=config.policy, out=folder, seed=config.seed, algorithm=algorithm)
    start = lab.policy
    setting = held_out.Setting(
        model=start.model,
        reference=start.params,
        reward=reward,
        prompts=held_out.prompts(start.tokenizer, settings.held_out_prompts),
        spec=lab.spec,
        tokenizer=start.tokenizer,
        mesh=lab.mesh,
        gold=lab.gold,
    )
    prompts = tasks.review_prompts(start.tokenizer, settings.batch, settings.seed)
    with Run.open(folder, settings, tensorboard=False) as run:
        result = run.result or ppo.train(run, settings, tasks.learned(setting, start, prompts, {}), lab.mesh)
    return overoptimization.curve([{k.removeprefix("held_out/"): v for k, v in row.items()} for row in result["curve"]])


def _smoke() -> Config:
    return Config(
        layers=(1, 2),
        choices=(16, 32),
        proxy=dataclasses.replace(Config().proxy, steps=6, pairs=8, ensemble=2),
        aggregations=("worst",),
        best_of=(1, 2, 4, 8),
        best_of_prompts=16,
        pressed=1,
        ppo=dataclasses.replace(Config().ppo, iterations=4, batch=16, evaluate_every=1, held_out_prompts=16),
    )


PRESETS = {"default": Config(), "smoke": _smoke()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
