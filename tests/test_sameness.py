"""The same PPO on 1, 2, 4 and 8 devices, in every mix of `data`, `fsdp` and `tensor`: equal numbers, equal tokens."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
import sameness

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import transformer
from jaxrlhf.training import objective

EVERY = [
    shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) in (1, 2, 4, 8)
]  # (data, fsdp, tensor): 20 of them
FEW = [(2, 2, 2)]


def mesh(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])


@functools.cache
def alone(recorded: bool) -> dict[str, Any]:
    """On one device, without a mesh."""
    return sameness.train(None, sameness.recorded() if recorded else None, sameness.ITERATIONS if recorded else 1)


def same_updates(shape: tuple[int, int, int]) -> None:
    sameness.assert_same(sameness.on(mesh(shape), sameness.recorded()), alone(True))


def same_tokens(shape: tuple[int, int, int]) -> None:
    found = sameness.on(mesh(shape), None, 1)
    np.testing.assert_array_equal(found["tokens"], alone(False)["tokens"])
    sameness.assert_same(found, alone(False), 1)


def test_every_mix_is_here():
    assert len(EVERY) == 20
    assert set(FEW) < set(EVERY)


def test_the_parameters_move_and_responses_differ_in_length():
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone(True)["params"], sameness.start())
    assert min(jax.tree.leaves(moved)) > 1e-4  # ten times the tolerance
    lengths = np.concatenate([drawn.response_len for drawn in sameness.recorded()])
    assert lengths.min() < lengths.max()


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_twenty_updates_on_recorded_rollouts_are_the_same(shape):
    same_updates(shape)


@pytest.mark.full
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_a_live_iteration_draws_the_same_tokens(shape):
    same_tokens(shape)


@pytest.fixture
def mixture(monkeypatch):
    """A mixture of experts takes the place of the model."""
    config = dataclasses.replace(sameness.CONFIG, mlp_width=16, experts=8, experts_per_token=2)
    model = transformer.build(config)
    specs = sameness.SPECS | {"policy": transformer.param_specs(config)}
    outputs = objective.make_outputs(model, sameness.SPEC, entropy=True, values=True, trunk="policy")
    for name, value in {"CONFIG": config, "MODEL": model, "SPECS": specs, "OUTPUTS": outputs}.items():
        monkeypatch.setattr(sameness, name, value)
    caches = (sameness.start, sameness.recorded, alone)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("shape", [MeshConfig(1, 2, 2, 2), MeshConfig(1, 1, 1, 8)], ids=str)
def test_experts_on_devices_of_their_own_learn_and_draw_the_same(mixture, shape):
    del mixture
    made = sharding.make_mesh(shape)
    sameness.assert_same(sameness.on(made, sameness.recorded()), alone(True))
    live = sameness.on(made, None, 1)
    np.testing.assert_array_equal(live["tokens"], alone(False)["tokens"])
    sameness.assert_same(live, alone(False), 1)


@pytest.mark.full
@pytest.mark.parametrize("shape", EVERY, ids=str)
def test_every_mix_is_the_same(shape):
    same_updates(shape)
    same_tokens(shape)
