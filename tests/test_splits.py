"""Every algorithm's loss and gradient, through the train step and a real model, however the rows are split.

Rows of very unequal length, with holes, an empty response and a row of weight 0, in microbatches and over devices.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import preference_cases as cases
import pytest
from experiences import PROMPT, WIDTH, experience

from jaxrlhf import algorithms
from jaxrlhf.algorithms import dpo, grpo, kto, lm, offpolicy, orpo, policy, ppo, raft, reinforce, reward, rloo
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Experience, SamplingSpec
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import objective, step
from jaxrlhf.training.by_length import Microbatches

VOCAB = 24  # a multiple of the tensor axis
CONFIG = TransformerConfig(VOCAB, 8, 1, 2, 2, 4, 16, 12, remat="none")
MODEL = transformer.build(CONFIG)
TRUNK = transformer.param_specs(CONFIG)
SPEC = SamplingSpec(0.8, WIDTH, (2,), min_tokens=2, forbidden=(0, 1))


class Case(NamedTuple):
    """What a train step is made of."""

    outputs: Callable
    loss: Callable
    config: Any
    batch: Any
    specs: Any
    frozen: Any = None


def responses(module: Any, config: Any) -> Case:
    """An algorithm that learns from sampled responses."""
    batch, _, _ = module.prepare(sampled(), module.init(config), config)
    return Case(objective.make_outputs(MODEL, SPEC), module.loss, config, batch, TRUNK)


def sampled() -> Experience:
    """Rows with holes, in groups of 4, one of them empty and one of weight 0."""
    rng = np.random.default_rng(0)
    data = experience(1, holes=True, samples=4)
    tokens = jnp.asarray(rng.integers(3, VOCAB, data.rollout.tokens.shape), jnp.int32)
    data = data.replace(rollout=data.rollout.replace(tokens=tokens), baseline=jnp.asarray(rng.normal(size=8), jnp.float32))
    # As if the model had sampled: log-probs far from its own would leave every ratio clipped and without gradient.
    ref_kl = jnp.square(data.ref_logprobs)
    return data.replace(logprobs=0.1 * data.logprobs - 3, ref_logprobs=0.1 * data.ref_logprobs - 3, ref_kl=ref_kl)


def ppo_with(**changes: Any) -> Case:
    """PPO, with a critic head and what the configuration reads."""
    config = dataclasses.replace(ppo.Config(entropy_coef=0.01), **changes)
    exact, mixed = config.kl_estimator == "exact", config.text_coef > 0
    outputs = objective.make_outputs(MODEL, SPEC, entropy=True, values=True, ref_kl=exact, text=mixed, trunk="policy")
    batch, _, _ = ppo.prepare(sampled(), ppo.init(config), config)
    batch = batch.replace(text=texts()) if mixed else batch
    frozen = {"reference": jax.jit(MODEL.init)(jax.random.key(5))} if exact else None
    return Case(outputs, ppo.loss, config, batch, {"policy": TRUNK, "value": heads.score_specs(8)}, frozen)


def texts() -> lm.Batch:
    """Packed rows of 2 to 12 real tokens, in one or two texts."""
    rng = np.random.default_rng(0)
    segments = np.zeros((8, 12), np.int32)
    for row in range(8):
        segments[row, : 2 + row] = 1
        segments[row, 2 + row : 2 + row + rng.integers(0, 10 - row)] = 2
    return lm.packed(jnp.asarray(rng.integers(3, VOCAB, (8, 12)), jnp.int32), jnp.asarray(segments))


def pairs(module: Any, config: Any) -> Case:
    """An algorithm that learns from preferences."""
    given = cases.preferences(5)
    if module is kto:
        given = kto.from_preferences(given)
        ratio = np.random.default_rng(6).normal(size=(2, 16)).astype(np.float32)
        given = dataclasses.replace(given, other_ratio=jnp.asarray(1 + ratio[0]), other_weight=jnp.ones(16).at[4].set(0))
    batch, _, _ = module.prepare(given, (), config)
    return Case(objective.make_outputs(MODEL), module.loss, config, cases.with_holes(batch, 7), TRUNK)


def sets(config: reward.Config) -> Case:
    """A reward model of sets of texts, one of which is in no pair."""
    rng = np.random.default_rng(3)
    preferred = rng.gamma(1.0, 1.0, (8, 3, 3)) * (1 - np.eye(3))
    preferred[1], preferred[:, 2], preferred[:, :, 2] = 0, 0, 0
    tied = None if config.ties == "half" else jnp.asarray(np.triu(rng.gamma(1.0, 1.0, (8, 3, 3)), 1), jnp.float32)
    batch = reward.Batch(
        tokens=jnp.asarray(rng.integers(3, VOCAB, (8, 3, 9)), jnp.int32),
        prompt_len=jnp.full((8, 3), PROMPT, jnp.int32),
        response_len=jnp.asarray(rng.integers(0, 7, (8, 3)), jnp.int32),
        preferred=jnp.asarray(preferred, jnp.float32),
        tied=tied,
    )
    outputs = objective.make_outputs(MODEL, logprobs=False, scores="mean", trunk="trunk")
    return Case(outputs, reward.loss, config, batch, {"trunk": TRUNK, "head": heads.score_specs(8)})


ALGORITHMS: dict[str, Callable[[], Case]] = {
    "lm": lambda: Case(objective.make_outputs(MODEL, packed=True), lm.loss, lm.Config(), texts(), TRUNK),
    "reward": lambda: sets(reward.Config(centre_coef=0.1, length_coef=0.05)),
    "reward_davidson": lambda: sets(reward.Config(ties="davidson")),
    "reward_rao_kupper": lambda: sets(reward.Config(ties="rao_kupper")),
    "ppo": ppo_with,
    "ppo_kl_in_loss": lambda: ppo_with(kl_in="loss", kl_estimator="exact", text_coef=0.5),
    "grpo": lambda: responses(grpo, grpo.GRPO),
    "dr_grpo": lambda: responses(grpo, grpo.DR_GRPO),
    "dapo": lambda: responses(grpo, dataclasses.replace(grpo.DAPO, overlong_buffer=3)),
    "gspo": lambda: responses(grpo, dataclasses.replace(grpo.GSPO, clip=policy.Clip("response_mean"))),
    "grpo_weighted": lambda: responses(grpo, dataclasses.replace(grpo.GRPO, importance=offpolicy.Config())),
    "rloo": lambda: responses(rloo, rloo.RLOO),
    "reinforce": lambda: responses(reinforce, reinforce.REINFORCE),
    "remax": lambda: responses(reinforce, reinforce.REMAX),
    "reinforce_pp": lambda: responses(reinforce, reinforce.REINFORCE_PP),
    "reinforce_pp_baseline": lambda: responses(reinforce, reinforce.REINFORCE_PP_BASELINE),
    "raft": lambda: responses(raft, raft.RAFT),
    "dpo": lambda: pairs(dpo, dataclasses.replace(dpo.DPO, nll_coef=0.2)),
    "cdpo": lambda: pairs(dpo, dataclasses.replace(dpo.CDPO, nll_coef=0.2)),
    "robust": lambda: pairs(dpo, dpo.ROBUST),
    "hinge": lambda: pairs(dpo, dpo.HINGE),
    "ipo": lambda: pairs(dpo, dpo.IPO),
    "simpo": lambda: pairs(dpo, dpo.SIMPO),
    "orpo": lambda: pairs(orpo, orpo.Config()),
    "kto": lambda: pairs(kto, kto.Config()),
}
MESHES = [sharding.MeshConfig(data=2, fsdp=2, tensor=2), sharding.MeshConfig(fsdp=4, tensor=2), sharding.MeshConfig(data=8)]
SORTED = Microbatches(tokens=4 * (PROMPT + WIDTH), multiple=3)
EVERY = [(4, None), (8, None), (SORTED, None), (SORTED, MESHES[1]), (1, MESHES[0]), (2, MESHES[1]), (1, MESHES[2])]
ONE_OF_EACH_KIND = ["lm", "reward", "ppo", "grpo", "dpo", "kto"]


@functools.cache
def case_named(name: str) -> tuple[Case, Any]:
    """The case, and its parameters."""
    case = ALGORITHMS[name]()
    params = jax.jit(lambda key: sharding.init_params(case.specs, key))(jax.random.key(0))
    return case, params


def trained(
    name: str, microbatches: step.Split = 1, mesh_config: sharding.MeshConfig | None = None
) -> tuple[Any, dict[str, Any]]:
    """How far one step of plain gradient descent moves the parameters, and its metrics."""
    case, params = case_named(name)
    train_step = step.make_train_step(case.outputs, case.loss, case.config, optax.sgd(1.0), microbatches)

    def one(placed, batch, frozen):
        state = step.init_state(placed, optax.sgd(1.0), jax.random.key(1))
        state, metrics = train_step(state, frozen, batch)
        return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params), jax.device_get(metrics)

    if mesh_config is None:
        return one(params, case.batch, case.frozen)
    mesh = sharding.make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        frozen = None if case.frozen is None else jax.device_put(case.frozen, sharding.replicated(mesh))
        placed = jax.device_put(params, sharding.shardings(case.specs, mesh))
        return one(placed, sharding.shard_batch(case.batch, mesh), frozen)


def assert_no_split_matters(name: str, splits: list) -> None:
    """Relative 1e-5 of a leaf's largest number, since single entries may be sums that cancel; plus a weight's rounding."""
    moved, metrics = trained(name)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 1e-3  # there is a gradient
    for microbatches, mesh in splits:
        split, split_metrics = trained(name, microbatches, mesh)
        told = f"{name}, {microbatches} microbatches, {mesh}: "
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(split), jax.tree.leaves(moved), strict=True):
            atol = 1e-5 * np.abs(b).max() + 1e-7
            np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=told + sharding.path_name(path))
        assert split_metrics.keys() == metrics.keys()
        for label, value in metrics.items():
            if label == "train/padding_efficiency":  # the very thing that sorting is for
                continue
            np.testing.assert_allclose(split_metrics[label], value, rtol=1e-5, atol=1e-6, err_msg=told + label)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_microbatches_on_devices_change_nothing(name):
    assert_no_split_matters(name, [(2, MESHES[0])])


@pytest.mark.parametrize("name", ["dr_grpo", "kto"])
def test_rows_sorted_by_length_change_nothing(name):
    """Dr. GRPO divides by the width of the arrays, which sorting cuts."""
    assert_no_split_matters(name, [(SORTED, None)])


@pytest.mark.full
@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_split_changes_anything(name):
    assert_no_split_matters(name, EVERY)


def test_every_algorithm_is_here():
    """A module with a Config and a loss is an algorithm."""
    modules = [importlib.import_module(f"jaxrlhf.algorithms.{m.name}") for m in pkgutil.iter_modules(algorithms.__path__)]
    expected = {m.__name__ for m in modules if hasattr(m, "Config") and hasattr(m, "loss")}
    assert {make().loss.__module__ for make in ALGORITHMS.values()} == expected
