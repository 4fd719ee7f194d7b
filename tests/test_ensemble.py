"""Ensembles: their scores against the paper's, and members trained together against members trained alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_reward

from jaxrlhf.algorithms import reward
from jaxrlhf.core import members, sharding
from jaxrlhf.core.types import Outputs, Rollout
from jaxrlhf.data import comparisons, pipeline
from jaxrlhf.models import heads, lora, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import ensemble
from jaxrlhf.rewards import model as rewards
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

CONFIG = TransformerConfig(23, 8, 1, 2, 2, 4, 16, 12, remat="none")
MODEL = transformer.build(CONFIG)
M, SETS, TEXTS, WIDTH = 3, 4, 5, 10
KEY = jax.random.key(3)
LOSS = reward.Config(centre_coef=0.05, smoothing=0.1)
LORA = lora.LoraConfig(rank=2, alpha=4.0, targets=("query", "down"))


@functools.cache
def member(number: int) -> dict:
    key = jax.random.fold_in(jax.random.key(0), number)
    specs = {"trunk": transformer.param_specs(CONFIG), "head": heads.score_specs(8)}
    return jax.jit(lambda k: sharding.init_params(specs, k))(key)


def batch_of(seed: int) -> reward.Batch:
    rng = np.random.default_rng(seed)
    preferred = np.where(rng.random((SETS, TEXTS, TEXTS)) < 0.4, rng.random((SETS, TEXTS, TEXTS)), 0)
    return reward.Batch(
        jnp.asarray(rng.integers(3, 23, (SETS, TEXTS, WIDTH)), jnp.int32),
        jnp.asarray(rng.integers(0, 4, (SETS, TEXTS)), jnp.int32),
        jnp.asarray(rng.integers(1, 6, (SETS, TEXTS)), jnp.int32),
        jnp.asarray(preferred, jnp.float32),
    )


def together(batches: list[reward.Batch]) -> reward.Batch:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *batches)


@functools.cache
def adapter(number: int) -> dict:
    """A member that is an adapter with a head: neither of its factors is zero."""
    key = jax.random.fold_in(jax.random.key(1), number)
    specs = {"trunk": lora.specs(CONFIG, LORA), "head": heads.score_specs(8)}
    fresh = jax.jit(lambda k: sharding.init_params(specs, k))(key)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), fresh)


def stacked(kind: str) -> dict:
    """An ensemble of M members, as it is trained."""
    if kind == "adapters":
        return members.stack([adapter(m) for m in range(M)])
    params = members.stack([member(m) for m in range(M)])
    return params if kind == "models" else {"trunk": member(0)["trunk"], "head": params["head"]}


def scored(kind: str) -> tuple[dict, ensemble.Config]:
    """An ensemble of M members, as it is scored with, and what it is."""
    params = stacked(kind)
    if kind != "adapters":
        return rewards.with_scale(params), ensemble.Config(M, kind, "uncertainty", 0.3)
    params = {"trunk": member(0)["trunk"], "adapters": params["trunk"], "head": params["head"]}
    return rewards.with_scale(params), ensemble.Config(M, kind, "uncertainty", 0.3, LORA)


def outputs_of(kind: str | None, over_base: bool):
    config = LORA if over_base else lora.NONE
    return objective.make_outputs(MODEL, logprobs=False, scores="mean", trunk="trunk", members=kind, adapters=config)


@functools.cache
def train_step_of(kind: str | None, over_base: bool, name: str, microbatches: int):
    update = optimizer_named(name, kind, over_base)
    return step.make_train_step(outputs_of(kind, over_base), reward.loss, LOSS, update, microbatches)


def train(kind: str | None, params, name, batches, microbatches: int = 1, over_base: bool = False):
    over_base = over_base or kind == "adapters"
    frozen = {"base": member(0)["trunk"]} if over_base else None
    train_step, update = train_step_of(kind, over_base, name, microbatches), optimizer_named(name, kind, over_base)
    state = step.init_state(params, update, KEY)
    for batch in batches:
        state, metrics = train_step(state, frozen, batch)
    return jax.tree.map(np.asarray, state.params), jax.device_get(metrics)


def assert_close(a, b, rtol: float = 1e-5) -> None:
    """Relative to the largest number of each leaf, since single entries may be sums that cancel."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max() + 1e-7)


@functools.cache
def optimizer_named(name: str, kind: str | None, over_base: bool) -> optax.GradientTransformation:
    if name == "sgd":
        return optax.sgd(1.0)
    # A large epsilon: Adam's own turns the rounding of a gradient near 0 into the sign of its update.
    config = OptimizerConfig(name=name, learning_rate=0.01, epsilon=0.1, head_scale=2.0, weight_decay=0.1, clip_norm=0.05)
    update = optimizer.make(config, 10, adapter(0) if over_base else member(0))
    return optimizer.of_members(update) if kind in ("adapters", "models") else update


@pytest.mark.parametrize(
    ("name", "backend"),
    [*(pytest.param("muon", backend, marks=pytest.mark.full) for backend in ("cpu", "gpu")), ("adamw", "cpu")],
)
def test_models_trained_together_are_those_trained_alone(name, backend, monkeypatch):
    """Three steps, each model with its own data, clipping and moments; in a loop as on a CPU, and under vmap as elsewhere."""
    data = [[batch_of(10 * i + m) for m in range(M)] for i in range(3)]
    alone = [train(None, member(m), name, [batches[m] for batches in data]) for m in range(M)]
    if backend == "gpu":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        train_step_of.cache_clear()
    params = members.stack([member(m) for m in range(M)])
    found, metrics = train("models", params, name, [together(batches) for batches in data])
    for m in range(M):
        assert_close(members.one(found, m), alone[m][0])
        assert metrics["loss/pairs"][m] == pytest.approx(alone[m][1]["loss/pairs"], rel=1e-5)
    assert metrics["loss/total"] == pytest.approx(sum(own["loss/total"] for _, own in alone), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_adapters_trained_together_are_those_trained_alone(backend, monkeypatch):
    """As models are, over one frozen base, to the same tolerance: float32 sums of another order."""
    data = [[batch_of(10 * i + m) for m in range(M)] for i in range(3)]
    alone = [train(None, adapter(m), "adamw", [batches[m] for batches in data], over_base=True) for m in range(M)]
    if backend == "gpu":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        train_step_of.cache_clear()
    found, metrics = train("adapters", stacked("adapters"), "adamw", [together(batches) for batches in data])
    for m in range(M):
        assert_close(members.one(found, m), alone[m][0])
        assert metrics["loss/pairs"][m] == pytest.approx(alone[m][1]["loss/pairs"], rel=1e-5)
    moved = [np.abs(new - old).max() for new, old in zip(*map(jax.tree.leaves, (found, stacked("adapters"))), strict=True)]
    assert min(moved) > 1e-4


def test_heads_learn_as_alone_and_the_trunk_from_all():
    own = [batch_of(20 + m) for m in range(M)]
    rows = {name: getattr(own[0], name) for name in ("tokens", "prompt_len", "response_len")}  # one set of rows for all
    own = [dataclasses.replace(batch, **rows) for batch in own]
    shared = dataclasses.replace(own[0], preferred=jnp.stack([batch.preferred for batch in own], 1))
    trunk = member(0)["trunk"]
    params = {"trunk": trunk, "head": members.stack([member(m)["head"] for m in range(M)])}
    found, _ = train("heads", params, "sgd", [shared])
    moved = jax.tree.map(lambda new, old: new - np.asarray(old), found, params)
    total = None
    for m in range(M):
        start = {"trunk": trunk, "head": member(m)["head"]}
        alone = train(None, start, "sgd", [own[m]])[0]
        steps = jax.tree.map(lambda new, old: new - np.asarray(old), alone, start)
        assert_close(members.one(moved["head"], m), steps["head"])
        total = steps["trunk"] if total is None else jax.tree.map(np.add, total, steps["trunk"])
    assert_close(moved["trunk"], total)


@pytest.mark.parametrize("kind", ["heads", pytest.param("models", marks=pytest.mark.full)])
def test_no_split_matters(kind):
    params = stacked(kind)
    batch = together([batch_of(30 + m) for m in range(M)])
    if kind == "heads":
        batch = dataclasses.replace(batch_of(30), preferred=batch.preferred)
    (whole, metrics), (parts, again) = (train(kind, params, "sgd", [batch], n) for n in (1, 4))
    assert_close(jax.tree.map(np.subtract, parts, params), jax.tree.map(np.subtract, whole, params))
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, err_msg=name)


def test_the_loss_of_members_is_each_members_own():
    """Shared fields and fields of their own, side by side."""
    rng = np.random.default_rng(1)
    own = [dataclasses.replace(batch_of(0), preferred=batch_of(m).preferred) for m in range(M)]
    scores = jnp.asarray(rng.normal(size=(M, SETS, TEXTS)), jnp.float32)
    best = jnp.asarray([0, -1, 2, 3], jnp.int32)
    shared = dataclasses.replace(own[0], preferred=jnp.stack([batch.preferred for batch in own], 1), best=best)
    terms, metrics = reward.loss(Outputs(scores=scores), shared, LOSS)
    for m in range(M):
        alone = reward.loss(Outputs(scores=scores[m]), dataclasses.replace(own[m], best=best), LOSS)
        for name, term in (alone[0] | alone[1]).items():
            np.testing.assert_allclose((terms | metrics)[name].sum[m], term.sum, rtol=1e-6)
            np.testing.assert_allclose((terms | metrics)[name].count[m], term.count, rtol=1e-6)


@pytest.mark.full
def test_a_mesh_of_devices_gives_the_same():
    params = members.stack([member(m) for m in range(M)])
    batch = together([batch_of(40 + m) for m in range(M)])
    alone, _ = train("models", params, "sgd", [batch])
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.replicated(mesh))
        spread, _ = train("models", placed, "sgd", [sharding.shard_batch(batch, mesh)])
    assert_close(spread, alone)


@pytest.mark.parametrize("how", ["mean", "worst", "uncertainty"])
def test_aggregation_equals_the_reference(how):
    scores = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    found = ensemble.aggregate(jnp.asarray(scores), ensemble.Config(4, "heads", how, 0.7))
    np.testing.assert_allclose(found, reference_reward.ensemble(scores, how, 0.7), rtol=1e-5, atol=1e-6)


def rollout() -> Rollout:
    batch = batch_of(50)
    rows, zeros = SETS * TEXTS, jnp.zeros(SETS * TEXTS, jnp.int32)
    lengths = (batch.prompt_len.reshape(-1), batch.response_len.reshape(-1))
    nothing = jnp.zeros((rows, 5))
    return Rollout(batch.tokens.reshape(rows, -1), *lengths, zeros == 0, zeros, zeros, zeros, nothing, nothing)


@pytest.mark.parametrize("kind", ["heads", "adapters", "models"])
def test_a_reward_of_several_is_its_members_taken_together(kind):
    params, config = scored(kind)
    params |= {"gain": jnp.array([1.0, 2.0, 0.5]), "bias": jnp.array([0.0, -1.0, 3.0])}
    data = rollout()
    alone = np.stack([rewards.reward(MODEL, "last")(ensemble.member(params, m, config), data) for m in range(M)])
    assert np.abs(np.diff(alone, axis=0)).min(axis=1).max() > 1e-3  # no two members say the same
    found = ensemble.reward(MODEL, "last", config)(params, data)
    np.testing.assert_allclose(found, reference_reward.ensemble(alone, "uncertainty", 0.3), rtol=1e-5, atol=1e-5)
    garbage = jnp.arange(WIDTH) >= (data.prompt_len + data.response_len)[:, None]
    dirty = dataclasses.replace(data, tokens=jnp.where(garbage, 7, data.tokens))
    np.testing.assert_array_equal(ensemble.reward(MODEL, "last", config)(params, dirty), found)


@pytest.mark.parametrize("kind", ["heads", "adapters", "models"])
def test_each_member_is_normalised_by_itself(kind):
    params, config = scored(kind)
    data = rollout()
    length = data.prompt_len + data.response_len

    def scores(p):
        return ensemble.scores(MODEL, p, data.tokens, length, "mean", config)

    unit = scores(rewards.normalise(params, scores(params)))
    np.testing.assert_allclose(unit.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(unit.std(1), 1, rtol=1e-5)
    centred = scores(rewards.centre(params, scores(params)))
    np.testing.assert_allclose(centred.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(centred.std(1), scores(params).std(1), rtol=1e-5)
    with pytest.raises(ValueError, match="all of them finite"):
        rewards.centre(params, jnp.full((M, 4), jnp.nan))
    with pytest.raises(ValueError, match="cannot normalise"):
        rewards.normalise(params, scores(params).at[1].set(2.0))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"members": 1}, "2 or more"),
        ({"members": 2, "of": "trunks"}, "of 'trunks'"),
        ({"members": 2, "of": "adapters"}, "of adapters with lora rank=0"),
        ({"members": 2, "of": "models", "lora": LORA}, "of models with lora rank=2"),
        ({"members": 2, "aggregation": "best"}, "aggregation='best'"),
        ({"members": 2, "uncertainty_coef": -1.0}, "uncertainty_coef=-1.0"),
    ],
)
def test_impossible_ensembles(fields, told):
    with pytest.raises(ValueError, match=told):
        ensemble.Config(**fields)


def test_members_without_scores_are_refused():
    with pytest.raises(ValueError, match="members score"):
        objective.make_outputs(MODEL, members="heads")
    with pytest.raises(ValueError, match="members='models' with adapters of rank 2"):
        objective.make_outputs(MODEL, logprobs=False, scores="mean", trunk="trunk", members="models", adapters=LORA)


def sets_of(seed: int, width: int = 6, ties: bool = False):
    """A data set of sets of three texts whose tokens name them."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((8, 3, width), np.int32)
    tokens[..., 0] = np.arange(24).reshape(8, 3) + 3
    arrays = {
        "tokens": tokens,
        "prompt_len": np.zeros((8, 3), np.int32),
        "response_len": np.full((8, 3), 2, np.int32),
        "preferred": rng.random((8, 3, 3)).astype(np.float32),
    }
    if ties:
        arrays["tied"] = np.ones((8, 3, 3), np.float32)
    return pipeline.batches(arrays, 4, seed)


def test_stacked_sets_stand_side_by_side_as_wide_as_the_widest():
    one, two = sets_of(1, 6), sets_of(2, 9)
    batch = comparisons.stacked_sets([one, two])[3]
    assert batch["tokens"].shape == (4, 2, 3, 9)
    np.testing.assert_array_equal(batch["tokens"][:, 0, :, :6], one[3]["tokens"])
    np.testing.assert_array_equal(batch["tokens"][:, 1], two[3]["tokens"])
    np.testing.assert_array_equal(batch["preferred"][:, 1], two[3]["preferred"])
    assert not batch["tokens"][:, 0, :, 6:].any()


def test_a_bootstrap_draws_each_text_once_for_all():
    """A member's copies of a text are the same whenever it comes and however it is padded; they are Poisson with mean 1."""
    seen: dict[tuple[int, int], set[float]] = {}
    for width in (6, 9):
        plain, drawn = sets_of(1, width, ties=True), comparisons.bootstrapped_sets(sets_of(1, width, ties=True), 400, seed=5)
        for i in range(4):
            whole, batch = plain[i], drawn[i]
            assert batch["preferred"].shape == (4, 400, 3, 3)
            np.testing.assert_array_equal(batch["tokens"], whole["tokens"])
            copies = np.sqrt(batch["tied"][..., np.arange(3), np.arange(3)])  # of weight 1: the square of the copies
            np.testing.assert_allclose(
                batch["preferred"], whole["preferred"][:, None] * copies[..., :, None] * copies[..., None, :], rtol=1e-6
            )
            for b, m, n in np.ndindex(4, 400, 3):
                seen.setdefault((int(whole["tokens"][b, n, 0]), m), set()).add(float(copies[b, m, n]))
    assert all(len(values) == 1 for values in seen.values())
    counts = np.array([values.pop() for values in seen.values()])
    assert len(counts) == 24 * 400
    assert counts.mean() == pytest.approx(1, abs=4 / len(counts) ** 0.5)  # 4 sigma
    assert counts.var() == pytest.approx(1, abs=0.1)
