"""What the recipes share: from two JSON-lines files, or a synthetic stand-in, to a fine-tuned model, a reward model, a policy.

A recipe is published settings; nothing here chooses any. Files: demonstrations {"prompt", "response"} a line, comparisons
{"prompt", "chosen", "rejected"} a line; a response begins with the space or line break that stands between it and the prompt.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import held_out, ppo, stage, tasks
from jaxrlhf.algorithms import lm
from jaxrlhf.algorithms import ppo as ppo_algorithm
from jaxrlhf.algorithms import reward as reward_algorithm
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Preferences, Prompts, Rollout
from jaxrlhf.data import comparisons, pipeline, sources
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.tokenizer import BOS, EOS, Tokenizer
from jaxrlhf.evaluation import policy
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import functions
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate
from jaxrlhf.training import cli, objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

Row = Mapping[str, Any]
StandIn = Callable[[int, int], tuple[list[dict[str, str]], list[dict[str, str]]]]
"""(rows, seed) -> as many demonstrations and comparisons."""

DEMONSTRATION = sources.Schema({"prompt": str, "response": str}, filled=frozenset({"prompt", "response"}))
COMPARISON = sources.Schema({"prompt": str, "chosen": str, "rejected": str}, filled=frozenset({"prompt"}))
STAND_IN = 2000  # rows of each kind, where no file is given
HELD_OUT = 48  # of each, never trained on

MODEL = TransformerConfig(
    vocab_size=1024, width=96, layers=2, heads=4, kv_heads=4, head_width=24, mlp_width=256, max_length=640
)


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
    warm_up: int = 0  # steps of our own on the demonstrations, in the place of a pre-trained model


class Data(NamedTuple):
    demonstrations: Sequence[Row]
    comparisons: Sequence[Row]


class Amount(NamedTuple):
    steps: int
    batch: int


def amount(examples: int, batch: int, scale: float, multiple: int = 8) -> Amount:
    """Steps and batch at a scale: the published ones at 1. A batch is a multiple of `multiple` rows."""
    smaller = batch if scale == 1 else max(multiple, round(batch * math.sqrt(scale) / multiple) * multiple)
    return Amount(math.ceil(examples * scale / smaller), smaller)


def main(recipe: Recipe, stand_in: StandIn, about: str) -> None:
    """A recipe as a script: `--scale 1` and files for the published run, `--preset smoke` to see that it runs."""
    small = dataclasses.replace(recipe.model, width=32, layers=1, heads=2, kv_heads=2, head_width=16, mlp_width=64)
    smoke = dataclasses.replace(recipe, model=small, scale=1e-5, faster=10.0, warm_up=20)
    default = dataclasses.replace(recipe, scale=1e-3, faster=100.0, warm_up=300)
    presets = {"default": default, "published": recipe, "smoke": smoke}
    cli.main(lambda config: run(config, stand_in), Recipe, presets, about)


def run(config: Recipe, stand_in: StandIn) -> dict[str, Any]:
    """Every stage that is not done, each in a folder of its own below `config.out`.

    Raises:
        ValueError: a scale outside (0, 1], or data too few or too long.
    """
    if not 0 < config.scale <= 1 or not config.faster > 0:
        raise ValueError(f"scale={config.scale}, faster={config.faster}: need 0 < scale <= 1 and faster > 0")
    with Run.open(config.out, config, tensorboard=False, free=("mesh", "out")) as whole:
        if whole.result is not None:
            return whole.result
        data = read(config, stand_in)
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            results = {
                "sft": fine_tune(config, data, mesh),
                "reward_model": learn_reward(config, data, mesh),
                "ppo": learn_policy(config, data, mesh),
            }
        return whole.done(results)


def read(config: Recipe, stand_in: StandIn) -> Data:
    """Rows of the files that are given, else of the stand-in.

    Raises:
        ValueError: a file is malformed, or holds too few rows to hold some out.
    """
    made = stand_in(STAND_IN, config.seed) if config.demonstrations is None or config.comparisons is None else ([], [])
    pairs = ((config.demonstrations, DEMONSTRATION), (config.comparisons, COMPARISON))
    data = Data(*(sources.read_jsonl(path, schema) if path else rows for (path, schema), rows in zip(pairs, made, strict=True)))
    for name, rows in zip(data._fields, data, strict=True):
        if len(rows) < 3 * HELD_OUT:
            raise ValueError(f"{name}: {len(rows)} rows, of which {HELD_OUT} are held out: give {3 * HELD_OUT} or more")
    return data


def rate(config: OptimizerConfig, learning_rate: float) -> OptimizerConfig:
    """The same optimizer with another learning rate."""
    return dataclasses.replace(config, learning_rate=learning_rate)


def faster(config: Recipe, part: Supervised | Policy) -> OptimizerConfig:
    """The optimizer of a stage, its learning rate times `config.faster`."""
    return rate(part.optimizer, part.optimizer.learning_rate * config.faster)


# ------------------------------------------------------------------------------------------------------- fine-tuning


def demonstration_rows(data: Data, tokenizer: Tokenizer, query: int, response: int) -> tuple[dict[str, np.ndarray], int]:
    """Rows bos + prompt + response + eos that fit, and how many were left out.

    Raises:
        ValueError: fewer fit than are held out.
    """
    starts = tokenizer.encode_batch([row["prompt"] for row in data.demonstrations])
    ends = tokenizer.encode_batch([row["response"] for row in data.demonstrations], continuation=True)
    pairs = [(p, r) for p, r in zip(starts, ends, strict=True) if len(p) + 1 <= query and len(r) + 1 <= response]
    if len(pairs) < 2 * HELD_OUT:
        raise ValueError(f"{len(pairs)} demonstrations have room in {query} + {response} tokens: give shorter texts, or widen")
    whole = [[BOS, *p, *r, EOS] for p, r in pairs]
    tokens, length = pipeline.pad_rows(whole, max(map(len, whole)))  # the widest there is: padding costs as text does
    prompt_len = np.fromiter((len(p) + 1 for p, _ in pairs), np.int32, len(pairs))
    rows = {"tokens": tokens, "prompt_len": prompt_len, "response_len": length - prompt_len}
    return rows, len(starts) - len(pairs)


def fine_tune(config: Recipe, data: Data, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A language model from nothing (`warm_up`), then the published fine-tuning; writes `sft/`."""
    out = config.out / "sft"
    with Run.open(out, config) as run:
        if run.result is not None:
            return run.result
        tokenizer = tokenizers.train((row["prompt"] + row["response"] for row in data.demonstrations), config.model.vocab_size)
        model_config = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        model = transformer.build(model_config)
        response = config.ppo.sampling.max_tokens
        rows, left_out = demonstration_rows(data, tokenizer, config.query, response)
        train, test = ({name: array[part] for name, array in rows.items()} for part in (slice(HELD_OUT, None), slice(HELD_OUT)))
        placed = sharding.shardings(transformer.param_specs(model_config), mesh)
        params = jax.jit(model.init, out_shardings=placed)(jax.random.key(config.seed))
        outputs = objective.make_outputs(model)
        nll = jax.jit(lambda p, batch: lm.loss(outputs(p, None, batch, None), batch, lm.Config())[0]["loss/lm"])
        published = amount(config.sft.examples, config.sft.batch, config.scale)
        warm = Amount(config.warm_up, 32)
        ours = OptimizerConfig(name="muon", learning_rate=0.01, adam_learning_rate=3e-3)
        figures: dict[str, float] = {"left_out": left_out}
        first = 0
        for name, part, settings in (("warm_up", warm, ours), ("sft", published, faster(config, config.sft))):
            if part.steps == 0:
                continue
            update = optimizer.make(settings, part.steps, params)
            state = step.init_state(params, update, jax.random.key(config.seed))
            train_step = step.make_train_step(outputs, lm.loss, lm.Config(), update)
            batches = pipeline.batches(train, part.batch, config.seed)
            for i in run.steps(0, part.steps, name, show=("loss/lm",)):
                state, metrics = train_step(state, None, sharding.shard_batch(responses(batches[i], response), mesh))
                run.log(first + i, metrics)
            params, first = state.params, first + part.steps
            term = nll(params, responses(test, response))
            figures[f"nll_after_{name}"] = float(term.sum / term.count)
        stage.save(out / "model", "policy", jax.device_get(params), model_config, tokenizer)
        return run.done(figures)


def responses(rows: dict[str, np.ndarray], width: int) -> lm.Batch:
    """Rows as the loss wants them."""
    return lm.responses(rows["tokens"], rows["prompt_len"], rows["response_len"], width)


# ------------------------------------------------------------------------------------------------------ reward model


def learn_reward(config: Recipe, data: Data, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Bradley-Terry on the comparisons from the fine-tuned trunk, one pass, then its scale; writes `reward_model/`."""
    out = config.out / "reward_model"
    with Run.open(out, config) as run:
        if run.result is not None:
            return run.result
        start = stage.load(config.out / "sft" / "model", mesh)
        width = config.query + config.ppo.sampling.max_tokens
        fitting = comparisons.fitting(data.comparisons, start.tokenizer, width)
        left_out = len(data.comparisons) - len(fitting)
        if len(fitting) < 2 * HELD_OUT:
            raise ValueError(f"{len(fitting)} comparisons have room in {width} tokens: give shorter texts, or widen")
        train, test = (preference_arrays(part, start.tokenizer, width) for part in (fitting[HELD_OUT:], fitting[:HELD_OUT]))
        part = amount(config.reward_model.examples, config.reward_model.batch, config.scale)
        batches = pipeline.batches(train, part.batch, config.seed)
        head = sharding.init_params(heads.score_specs(start.config.width), jax.random.key(config.seed))
        params = {"trunk": start.params, "head": jax.device_put(head, sharding.replicated(mesh))}
        update = optimizer.make(faster(config, config.reward_model), part.steps, params)
        state = run.restore(step.init_state(params, update, jax.random.key(config.seed)))
        outputs = objective.make_outputs(start.model, logprobs=False, scores="last", trunk="trunk")
        train_step = step.make_train_step(outputs, reward_algorithm.loss, reward_algorithm.Config(centre_coef=0.0), update)
        for i in run.steps(run.start, part.steps, "reward model", show=("reward/accuracy",)):
            batch = reward_algorithm.from_preferences(Preferences(**batches[i]))
            state, metrics = train_step(state, None, sharding.shard_batch(batch, mesh))
            run.log(i, metrics)
            run.maybe_save(i, state)
        scored = rewards.with_scale(state.params)
        scores = jax.jit(outputs)(scored, None, reward_algorithm.from_preferences(Preferences(**test)), None).scores
        params = normalised(config, data, start, scored, mesh)
        stage.save(out / "model", "reward_model", jax.device_get(params), start.config, start.tokenizer, pooling="last")
        accuracy = float((scores[:, 0] > scores[:, 1]).mean())
        return run.done({"accuracy": accuracy, "held_out": HELD_OUT, "left_out": left_out})


def preference_arrays(rows: Sequence[Row], tokenizer: Tokenizer, width: int) -> dict[str, np.ndarray]:
    """The fields of `Preferences`, as wide as the widest row."""
    pairs = comparisons.preference_rows(rows, tokenizer, width)
    longest = int(np.max(pairs.prompt_len + pairs.response_len))
    names = ("prompt_len", "response_len", "label", "tie", "weight", "margin")
    return {"tokens": np.asarray(pairs.tokens)[..., :longest]} | {name: np.asarray(getattr(pairs, name)) for name in names}


def normalised(config: Recipe, data: Data, start: stage.Trained, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Scores of the start's samples get mean 0 and deviation 1, or demonstrations the mean 0, as the recipe says."""
    rows, _ = demonstration_rows(data, start.tokenizer, config.query, config.ppo.sampling.max_tokens)
    rows = {name: array[: 4 * HELD_OUT] for name, array in rows.items()}
    if config.normalise == "demonstrations":
        length = rows["prompt_len"] + rows["response_len"]
        scores = jax.jit(lambda p, t, n: rewards.score(start.model, p, t, n, "last"))(params, rows["tokens"], length)
        return params | {"bias": params["bias"] - jnp.mean(scores)}
    spec = stage.spec(config.ppo.sampling, start.tokenizer)
    prompts = sharding.shard_batch(queries(rows), mesh)
    drawn = generate.generate(start.model, start.params, prompts, spec, jax.random.key(config.seed))
    return rewards.normalise(params, rewards.reward(start.model, "last")(params, drawn))


def queries(rows: dict[str, np.ndarray]) -> Prompts:
    """The prompts of demonstration rows."""
    width = int(rows["prompt_len"].max())
    index = np.arange(len(rows["prompt_len"]), dtype=np.int32)
    inside = np.arange(width) < rows["prompt_len"][:, None]
    return Prompts(np.where(inside, rows["tokens"][:, :width], 0).astype(np.int32), rows["prompt_len"], index, index)


# ------------------------------------------------------------------------------------------------------------ policy


def learn_policy(config: Recipe, data: Data, mesh: jax.sharding.Mesh) -> dict[str, Any]:
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
        held_out_prompts=HELD_OUT,
    )
    with Run.open(out, settings) as run:
        if run.result is not None:
            return run.result
        return ppo.train(run, settings, task(config, settings, data, mesh), mesh)


def task(config: Recipe, settings: ppo.Config, data: Data, mesh: jax.sharding.Mesh) -> tasks.Task:
    """Prompts of the demonstrations, the reward model's score, and on held-out prompts score, length and KL."""
    start, judged = stage.load(settings.policy, mesh), stage.load(settings.reward, mesh, "reward_model")
    value, spec = rewards.reward(judged.model, "last"), stage.spec(settings.sampling, start.tokenizer)
    rows, _ = demonstration_rows(data, start.tokenizer, config.query, settings.sampling.max_tokens)
    every = queries(rows)
    setting = held_out.Setting(
        model=start.model,
        reference=start.params,
        reward=lambda answers: value(judged.params, answers),
        prompts=pipeline.take_prompts(every, slice(HELD_OUT)),
        spec=spec,
        tokenizer=start.tokenizer,
        mesh=mesh,
    )
    before = held_out.sample(setting, start.params, jax.random.key(0))

    def score(rollout: Rollout, prompts: Prompts) -> tuple[jax.Array, jax.Array, tasks.Figures]:
        del prompts
        part = functions.of_values(value(judged.params, rollout), rollout, start.tokenizer.decode, "model")
        return *sharding.shard_batch((part.score, part.weight), mesh), {"reward/faults": float(len(part.faults))}

    def judge(params: Any) -> tuple[tasks.Figures, list[dict[str, str]]]:
        after = held_out.sample(setting, params, jax.random.key(1))
        return held_out.flat(policy.evaluate_policy(after, {})), policy.side_by_side(before, after)

    train = pipeline.take_prompts(every, slice(HELD_OUT, None))
    return tasks.Task(start, spec, pipeline.prompt_batches(train, settings.batch, settings.seed), score, judge)
