"""Recipes: the published numbers, what a scale makes of them, and the data they read."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import stage
from experiments.recipes import examples, hh, stages, tldr, ziegler_sentiment
from jaxrlhf.algorithms import lm, ppo
from jaxrlhf.algorithms import reward as reward_algorithm
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.tokenizer import BOS, EOS, PAD
from jaxrlhf.models import heads, roles, transformer
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import objective

RECIPES = {"ziegler_sentiment": ziegler_sentiment, "tldr": tldr, "hh": hh}
every = pytest.mark.parametrize("name", RECIPES)


def steps(part, name: str, scale: float = 1.0) -> stages.Amount:
    count = part.episodes if name == "ppo" else part.examples
    return stages.amount(count, part.batch, scale)


@pytest.mark.parametrize(
    ("name", "stage", "published"),
    [
        ("ziegler_sentiment", "sft", (0, 32)),
        ("ziegler_sentiment", "reward_model", (156, 32)),
        ("ziegler_sentiment", "ppo", (1954, 512)),
        ("tldr", "sft", (912, 128)),
        ("tldr", "reward_model", (1451, 64)),
        ("tldr", "ppo", (1954, 512)),
        ("hh", "sft", (10_000, 4)),
        ("hh", "ppo", (94, 64)),
    ],
)
def test_a_scale_of_one_is_the_published_run(name, stage, published):
    assert steps(getattr(RECIPES[name].RECIPE, stage), stage) == published


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1, 0.999])
def test_a_smaller_scale_reads_its_share(scale):
    for count, batch, multiple in ((1_000_000, 512, 8), (6_000, 64, 16), (116_722, 128, 8)):
        part = stages.amount(count, batch, scale, multiple)
        assert part.batch % multiple == 0
        assert part.batch <= batch
        assert 0 <= part.steps * part.batch - count * scale < part.batch


@every
def test_the_published_run_traces_at_its_full_shapes(name):
    """Every program of the published preset, by shape alone: what it samples, scores and learns from fits the model."""
    recipe = RECIPES[name].RECIPE
    part, model = recipe.ppo, transformer.build(recipe.model)
    spec = SamplingSpec(**dataclasses.asdict(part.sampling), stop=(EOS,), forbidden=(PAD, BOS), pad=PAD)
    key = jax.random.key(0)

    def published(batch: int, width: int, rows: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
        tokens, length = jnp.zeros((batch, *rows, width), jnp.int32), jnp.ones((batch, *rows), jnp.int32)
        return tokens, length, length

    def one_update() -> tuple[object, ...]:
        trunk = model.init(key)
        head = {"head": sharding.init_params(heads.score_specs(recipe.model.width), key)}
        reward = rewards.with_scale({"trunk": trunk} | head)
        critic = {"critic": roles.critic_from_reward(reward)}
        policy = {"policy": trunk} | (critic if part.critic == "reward" else {"value": head["head"]})
        batch = lm.responses(*published(recipe.sft.batch, recipe.query + part.sampling.max_tokens), part.sampling.max_tokens)
        first = jax.grad(lambda p: total(lm.loss(objective.make_outputs(model)(p, None, batch, None), batch, lm.Config())))
        settings = stages.reward_settings(recipe)
        rows = published(settings.pairs, settings.width, (2,))
        pairs = reward_algorithm.Batch(*rows, preferred=jnp.ones((settings.pairs, 2, 2)))
        scores = objective.make_outputs(model, logprobs=False, scores="last", trunk="trunk")
        second = jax.grad(lambda p: total(reward_algorithm.loss(scores(p, None, pairs, None), pairs, settings.algorithm)))
        ones = np.ones(part.batch, np.int32)
        prompts = Prompts(np.zeros((part.batch, recipe.query), np.int32), ones, ones, ones)
        once = generate.Options(chunk=spec.max_tokens)  # one chunk: nothing for the host
        drawn = generate.generate(model, trunk, prompts, spec, key, options=once)
        found = rollout.experience(model, policy, {"reference": trunk}, drawn, spec)
        found = dataclasses.replace(found, score=rewards.reward(model, "last")(reward, drawn))
        ready, _, _ = ppo.prepare(found, ppo.init(part.algorithm), part.algorithm)
        outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy")
        third = jax.grad(lambda p: total(ppo.loss(outputs(p, None, ready, None), ready, part.algorithm)))
        return drawn.tokens, first(trunk), second({"trunk": trunk} | head), third(policy), trunk

    tokens, fine_tuned, _, improved, trunk = jax.eval_shape(one_update)
    assert tokens.shape == (part.batch, recipe.query + part.sampling.max_tokens)
    assert jax.tree.map(lambda x: x.shape, fine_tuned) == jax.tree.map(lambda x: x.shape, improved["policy"])
    assert jax.tree.map(lambda x: x.shape, fine_tuned) == jax.tree.map(lambda x: x.shape, trunk)
    assert part.batch % part.algorithm.minibatches == 0


def total(terms_and_metrics: tuple[dict, dict]) -> jax.Array:
    """What an update minimises."""
    return sum(term.coefficient * term.sum / term.count for term in terms_and_metrics[0].values())


@every
def test_stand_ins_are_drawn_by_the_seed_and_fit(name):
    recipe, made = RECIPES[name].RECIPE, RECIPES[name].stand_in
    texts, pairs = made(200, 1)
    assert (texts, pairs) == made(200, 1) != made(200, 2)
    assert len(texts) == len(pairs) == 200
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    data = examples.read(None, None, made, recipe.seed)
    tokenizer = tokenizers.train((row["prompt"] + row["response"] for row in data.demonstrations), recipe.model.vocab_size)
    rows, left_out = examples.demonstration_rows(data, tokenizer, recipe.query, recipe.ppo.sampling.max_tokens)
    assert left_out == 0
    assert rows["tokens"].shape[1] <= recipe.model.max_length
    queries = examples.queries(rows)
    for i in range(20):
        written = tokenizer.decode(rows["tokens"][i, : rows["prompt_len"][i]])
        assert written == data.demonstrations[i]["prompt"] == tokenizer.decode(queries.tokens[i, : queries.length[i]])
        assert not np.any(queries.tokens[i, queries.length[i] :]), "a prompt does not show its answer"


def written(folder, rows: int) -> stages.Recipe:
    texts = [{"prompt": f"question {i}?" + " long" * (i % 2 * 100), "response": f" answer {i}"} for i in range(rows)]
    pairs = [{"prompt": "which?", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(rows)]
    paths = {}
    for name, lines in (("demonstrations", texts), ("comparisons", pairs)):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in lines))
    return dataclasses.replace(tldr.RECIPE, query=64, **paths)


def read(recipe: stages.Recipe) -> examples.Data:
    return examples.read(recipe.demonstrations, recipe.comparisons, tldr.stand_in, recipe.seed)


def test_local_files_are_read_and_long_prompts_are_counted(tmp_path):
    recipe = written(tmp_path, 200)
    data = read(recipe)
    assert data.demonstrations[1]["response"] == " answer 1"
    assert data.comparisons[7]["chosen"] == " good 7"
    tokenizer = tokenizers.train(["question long answer"], 300)
    rows, left_out = examples.demonstration_rows(data, tokenizer, recipe.query, recipe.ppo.sampling.max_tokens)
    assert (len(rows["tokens"]), left_out) == (100, 100)


def test_too_few_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="demonstrations: 100 rows, of which 48 are held out: give 144 or more"):
        read(written(tmp_path, 100))


def test_a_malformed_file_is_named(tmp_path):
    recipe = written(tmp_path, 200)
    with recipe.comparisons.open("a") as file:
        file.write('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(ValueError, match=r"comparisons\.jsonl:201: rejected: missing field"):
        read(recipe)


@pytest.mark.parametrize(("name", "value"), [("scale", 0.0), ("scale", 2.0), ("faster", 0.0)])
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=r"need 0 < scale <= 1 and faster > 0"):
        stages.run(dataclasses.replace(tldr.RECIPE, **{name: value}), tldr.stand_in)


@pytest.mark.full
def test_a_pretrained_model_takes_the_place_of_the_warm_up(tmp_path):
    config = dataclasses.replace(tldr.RECIPE, out=tmp_path / "first", scale=1e-5, warm_up=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=16, layers=1, heads=2, kv_heads=2))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    data = examples.read(None, None, tldr.stand_in, config.seed)
    with jax.set_mesh(mesh):
        stages.language_model(config, data, mesh, "warm_up")
        given = stage.load(tmp_path / "first/warm_up/model", mesh)
        config = dataclasses.replace(config, out=tmp_path / "second", init=tmp_path / "first/warm_up/model", seed=2)
        result = stages.language_model(config, data, mesh, "warm_up")
        found = stage.load(tmp_path / "second/warm_up/model", mesh)
    assert result["steps"] == 0
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(given.params), strict=True):
        np.testing.assert_array_equal(a, b)
