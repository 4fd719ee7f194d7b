"""What the recipes share: from two JSON-lines files, or a synthetic stand-in, to a fine-tuned model, a reward model, a policy.

A recipe is published settings; nothing here chooses any. What the files hold: `examples.py`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import held_out, ppo, reward_data, reward_model, reward_params, reward_scores, sft, stage, tasks
from experiments.recipes import examples
from jaxrlhf.algorithms import lm
from jaxrlhf.algorithms import ppo as ppo_algorithm
from jaxrlhf.algorithms import reward as reward_algorithm
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import comparisons, pipeline
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards
from jaxrlhf.training import cli, objective
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

MODEL = TransformerConfig(
    vocab_size=1024, width=96, layers=2, heads=4, kv_heads=4, head_width=24, mlp_width=256, max_length=640
)
WARM_UP = OptimizerConfig(name="muon", learning_rate=0.01, adam_learning_rate=3e-3)


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A stage that reads examples."""

    examples: int  # as published; a stage of 0 examples is left out
    batch: int
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Policy:
    episodes: int
    batch: int
    sampling: stage.Sampling
    algorithm: ppo_algorithm.Config
    optimizer: OptimizerConfig
    critic: Literal["shared", "separate", "reward"] = "shared"  # see experiments/ppo.py


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Published settings, the data, and how much of it to run."""

    out: Path
    query: int  # tokens of a prompt; rows with longer ones are left out, and counted
    sft: Supervised
    reward_model: Supervised
    ppo: Policy
    normalise: Literal["policy", "demonstrations"]  # whose texts score 0: with deviation 1 (policy), or only shifted
    demonstrations: Path | None = None  # None: the stand-in
    comparisons: Path | None = None
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    scale: float = 1.0  # share of the published examples and episodes; batches shrink with its square root
    faster: float = 1.0  # factor on the learning rates: a small model from nothing takes larger ones
    model: TransformerConfig = MODEL
    ensemble: int = 1  # reward models, or heads of one, learned and pressed together; 1: a single one, as published
    ensemble_of: Literal["heads", "models"] = "heads"
    aggregation: ensembles.Aggregation = "mean"
    init: Path | None = None  # a pre-trained model (experiments/import_hf.py writes one); None: `model`, of random weights
    warm_up: int = 0  # steps of our own on the demonstrations before the published stages, where there is no `init`


class Amount(NamedTuple):
    steps: int
    batch: int


def amount(examples: int, batch: int, scale: float, multiple: int = 8) -> Amount:
    """Steps and batch at a scale: the published ones at 1. A batch is a multiple of `multiple` rows."""
    smaller = batch if scale == 1 else max(multiple, round(batch * math.sqrt(scale) / multiple) * multiple)
    return Amount(math.ceil(examples * scale / smaller), smaller)


def main(recipe: Recipe, stand_in: examples.StandIn, about: str, scale: float, faster: float = 100.0) -> None:
    """A recipe as a script: its stand-in at `scale` and `faster`; the published run, for local files; and a smoke test."""
    small = dataclasses.replace(recipe.model, width=32, layers=1, heads=2, kv_heads=2, head_width=16, mlp_width=64)
    smoke = dataclasses.replace(recipe, model=small, scale=1e-5, faster=10.0, warm_up=20)
    default = dataclasses.replace(recipe, scale=scale, faster=faster, warm_up=300)
    presets = {"default": default, "published": recipe, "smoke": smoke}
    cli.main(lambda config: run(config, stand_in), Recipe, presets, about)


def run(config: Recipe, stand_in: examples.StandIn) -> dict[str, Any]:
    """Every stage that is not done, each in a folder of its own below `config.out`.

    Raises:
        ValueError: a scale outside (0, 1], or data too few or too long.
    """
    if not 0 < config.scale <= 1 or not config.faster > 0:
        raise ValueError(f"scale={config.scale}, faster={config.faster}: need 0 < scale <= 1 and faster > 0")
    with Run.open(config.out, config, tensorboard=False, free=("mesh", "out")) as whole:
        if whole.result is not None:
            return whole.result
        data = examples.read(config.demonstrations, config.comparisons, stand_in, config.seed)
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            results = {
                "warm_up": language_model(config, data, mesh, "warm_up"),
                "sft": language_model(config, data, mesh, "sft"),
                "reward_model": learn_reward(config, data, mesh),
                "ppo": learn_policy(config, data, mesh),
            }
        return whole.done(results)


def rate(config: OptimizerConfig, learning_rate: float) -> OptimizerConfig:
    """The same optimizer with another learning rate."""
    return dataclasses.replace(config, learning_rate=learning_rate)


def faster(config: Recipe, part: Supervised | Policy) -> OptimizerConfig:
    """The optimizer of a stage, its learning rate times `config.faster`."""
    return rate(part.optimizer, part.optimizer.learning_rate * config.faster)


# ------------------------------------------------------------------------------------------------------- fine-tuning


def language_model(
    config: Recipe, data: examples.Data, mesh: jax.sharding.Mesh, name: Literal["warm_up", "sft"]
) -> dict[str, Any]:
    """The model before the published stages, pre-trained or our own (`warm_up`); or the published fine-tuning of it (`sft`)."""
    if name == "warm_up":
        part, update, init = Amount(0 if config.init else config.warm_up, 32), WARM_UP, config.init
    else:
        part, update = amount(config.sft.examples, config.sft.batch, config.scale), faster(config, config.sft)
        init = config.out / "warm_up" / "model"
    out = config.out / name
    settings = sft.Config(out=out, seed=config.seed, mesh=config.mesh, steps=part.steps, optimizer=update)
    with Run.open(out, settings if init is None else dataclasses.replace(settings, init=init)) as run:
        if run.result is not None:
            return run.result
        start = fresh(config, data, mesh) if init is None else stage.load(init, mesh)
        response = config.ppo.sampling.max_tokens
        rows, left_out = examples.demonstration_rows(data, start.tokenizer, config.query, response)
        train, test = (
            {name: array[part] for name, array in rows.items()}
            for part in (slice(examples.HELD_OUT, None), slice(examples.HELD_OUT))
        )
        drawn = pipeline.batches(train, part.batch, config.seed)
        batches = pipeline.by_step(lambda i: sharding.shard_batch(responses(drawn[i], response), mesh))
        outputs = objective.make_outputs(start.model)
        params = sft.train(run, settings, start.config, start.params, None, outputs, batches) if part.steps else start.params
        nll = sft.measure(outputs, None, responses(test, response))(params)[0][sft.NATS]
        stage.save(out / "model", "policy", params, start.config, start.tokenizer)
        return run.done({"nll_per_token": nll, "steps": part.steps, "left_out": left_out})


def fresh(config: Recipe, data: examples.Data, mesh: jax.sharding.Mesh) -> stage.Trained:
    """A tokenizer of the demonstrations, and a model of random weights."""
    tokenizer = tokenizers.train((row["prompt"] + row["response"] for row in data.demonstrations), config.model.vocab_size)
    shape = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    model, placed = transformer.build(shape), sharding.shardings(transformer.param_specs(shape), mesh)
    params = jax.jit(model.init, out_shardings=placed)(jax.random.key(config.seed))
    return stage.Trained(shape, model, params, tokenizer, {})


def responses(rows: dict[str, np.ndarray], width: int) -> lm.Batch:
    """Rows as the loss wants them."""
    return lm.responses(rows["tokens"], rows["prompt_len"], rows["response_len"], width)


# ------------------------------------------------------------------------------------------------------ reward model


def learn_reward(config: Recipe, data: examples.Data, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Bradley-Terry on the comparisons from the fine-tuned trunk, one pass, then its scale; writes `reward_model/`."""
    settings, several = reward_settings(config), reward_settings(config).several
    with Run.open(settings.out, settings) as run:
        if run.result is not None:
            return run.result
        start = stage.load(settings.init, mesh)
        fitting = comparisons.fitting(data.comparisons, start.tokenizer, settings.width)
        left_out = len(data.comparisons) - len(fitting)
        if len(fitting) < 2 * examples.HELD_OUT:
            raise ValueError(f"{len(fitting)} comparisons have room in {settings.width} tokens: give shorter texts, or widen")
        train, test = (
            examples.sets(part, start.tokenizer, settings.width)
            for part in (fitting[examples.HELD_OUT :], fitting[: examples.HELD_OUT])
        )

        def ordered(seed: int) -> Any:
            return pipeline.batches(train, settings.pairs, seed)

        drawn = ordered(config.seed) if several is None else reward_data.of_members(several, ordered, config.seed)
        batches = pipeline.by_step(lambda i: sharding.shard_batch(drawn[i], mesh))
        params = reward_params.fresh(settings, start.config, start.params, mesh)
        params = rewards.with_scale(reward_model.train(run, settings, start.config, params, batches))
        rows = {"tokens": test["tokens"], "length": test["prompt_len"] + test["response_len"]}
        rows = {name: array.reshape(-1, *array.shape[2:]) for name, array in rows.items()}
        scores = reward_scores.together(settings, reward_scores.score_texts(settings, start.model, params, rows)).reshape(-1, 2)
        shown, _ = examples.demonstration_rows(data, start.tokenizer, config.query, config.ppo.sampling.max_tokens)
        shown = {name: array[: 4 * examples.HELD_OUT] for name, array in shown.items()}
        if config.normalise == "demonstrations":
            params = reward_scores.centred(settings, start.model, params, shown)
        else:
            params = reward_scores.scaled(settings, start.model, params, start, examples.queries(shown), mesh)
        reward_params.save(settings.out / "model", settings, params, start.config, start.tokenizer)
        accuracy = float((scores[:, 0] > scores[:, 1]).mean())
        return run.done({"accuracy": accuracy, "held_out": examples.HELD_OUT, "steps": settings.steps, "left_out": left_out})


def reward_settings(config: Recipe) -> reward_model.Config:
    """The recipe's, as the script of the stage has them."""
    part = amount(config.reward_model.examples, config.reward_model.batch, config.scale)
    return reward_model.Config(
        init=config.out / "sft" / "model",
        out=config.out / "reward_model",
        seed=config.seed,
        mesh=config.mesh,
        steps=part.steps,
        pairs=part.batch,
        width=config.query + config.ppo.sampling.max_tokens,
        dropout=0.0,
        pooling="last",
        head_init="normal",
        ensemble=config.ensemble,
        ensemble_of=config.ensemble_of,
        aggregation=config.aggregation,
        algorithm=reward_algorithm.Config(centre_coef=0.0),
        optimizer=faster(config, config.reward_model),
        sampling=config.ppo.sampling,
    )


# ------------------------------------------------------------------------------------------------------------ policy


def learn_policy(config: Recipe, data: examples.Data, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """PPO against the reward model; writes `ppo/`."""
    out, multiple = config.out / "ppo", max(8, config.ppo.algorithm.minibatches)
    part = amount(config.ppo.episodes, config.ppo.batch, config.scale, multiple)
    settings = ppo.Config(
        policy=config.out / "sft" / "model",
        reward=config.out / "reward_model" / "model",
        out=out,
        seed=config.seed,
        mesh=config.mesh,
        iterations=part.steps,
        batch=part.batch,
        sampling=config.ppo.sampling,
        algorithm=config.ppo.algorithm,
        critic=config.ppo.critic,
        optimizer=faster(config, config.ppo),
        evaluate_every=max(1, part.steps // 4),
        held_out_prompts=examples.HELD_OUT,
    )
    with Run.open(out, settings) as run:
        if run.result is not None:
            return run.result
        return ppo.train(run, settings, task(config, settings, data, mesh), mesh)


def task(config: Recipe, settings: ppo.Config, data: examples.Data, mesh: jax.sharding.Mesh) -> tasks.Task:
    """Prompts of the demonstrations, the reward model's score, and on held-out prompts score, length and KL."""
    start, judged = stage.load(settings.policy, mesh), stage.load(settings.reward, mesh, "reward_model")
    value = stage.reward(judged)
    rows, _ = examples.demonstration_rows(data, start.tokenizer, config.query, settings.sampling.max_tokens)
    every = examples.queries(rows)
    setting = held_out.Setting(
        model=start.model,
        reference=start.params,
        reward=lambda answers: value(judged.params, answers),
        prompts=pipeline.take_prompts(every, slice(examples.HELD_OUT)),
        spec=stage.spec(settings.sampling, start.tokenizer),
        tokenizer=start.tokenizer,
        mesh=mesh,
    )
    train = pipeline.take_prompts(every, slice(examples.HELD_OUT, None))
    made = tasks.learned(setting, start, pipeline.prompt_batches(train, settings.batch, settings.seed), {})
    return dataclasses.replace(made, reward=judged.params)
