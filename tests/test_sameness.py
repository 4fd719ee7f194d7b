"""The same PPO on 1, 2, 4 and 8 devices, in every mix of `data`, `fsdp` and `tensor`: equal numbers, equal tokens."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest
import sameness

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig

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


@pytest.mark.full
@pytest.mark.parametrize("shape", EVERY, ids=str)
def test_every_mix_is_the_same(shape):
    same_updates(shape)
    same_tokens(shape)
