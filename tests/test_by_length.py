"""Microbatches sorted by length: the same step as any other split, fewer places, few programs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step as steps
from flax import struct

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Outputs, Term
from jaxrlhf.training import by_length, step
from jaxrlhf.training.by_length import Microbatches

SORTED = Microbatches(tokens=48, multiple=6)  # rows of 6 or 12 places


def lengths(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    response = rng.integers(1, 200, rows)
    return np.minimum(response + rng.integers(1, 60, rows), 256), response


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_each_row_is_in_one_part_that_holds_it_and_the_budget(rows):
    length, response = lengths(rows)
    split = Microbatches(tokens=1024, multiple=32)
    found = by_length.parts(length, response, (256, 200), 1, split)
    np.testing.assert_array_equal(np.sort(np.concatenate([part.rows for part in found])), np.arange(rows))
    for part in found:
        assert length[part.rows].max() <= part.width <= 256
        assert response[part.rows].max() <= part.response <= 200
        assert part.rows.size * part.width <= 1024
        assert part.width % 32 == 0
        assert part.width - length[part.rows].max() < 32
        assert np.log2(part.rows.size) % 1 == 0  # few shapes
    assert [part.width for part in found] == sorted([part.width for part in found], reverse=True)


def test_a_row_beyond_the_budget_is_a_part_of_its_own_and_sets_count_all_their_texts():
    found = by_length.parts(np.array([90, 100, 8]), np.array([4, 4, 4]), (100, 50), 1, Microbatches(tokens=64, multiple=8))
    assert [(part.rows.tolist(), part.width, part.response) for part in found] == [([1], 100, 8), ([0], 96, 8), ([2], 8, 8)]
    pairs = by_length.parts(np.full(4, 8), np.full(4, 4), (16, 8), 2, Microbatches(tokens=32, multiple=8))
    assert [part.rows.size for part in pairs] == [2, 2]


@struct.dataclass
class Sets:
    tokens: jax.Array  # [B, 2, T]
    mask: jax.Array  # [B, 2, R]
    segments: jax.Array | None
    preferred: jax.Array  # [B, 2, 2]
    kept: jax.Array  # [B, 2, R, W]
    text: jax.Array  # [B, R], of other rows


def test_only_what_is_per_token_is_cut():
    batch = Sets(
        jnp.zeros((6, 2, 9)), jnp.zeros((6, 2, 5)), None, jnp.zeros((6, 2, 2)), jnp.zeros((6, 2, 5, 5)), jnp.zeros((6, 5))
    )
    batch = dataclasses.replace(batch, text=jnp.arange(30.0).reshape(6, 5))
    rows = np.array([4, 1])
    found = by_length.cut(batch, jnp.asarray(rows), 7, 3)
    shapes = [x.shape for x in jax.tree.leaves(found)]
    assert shapes == [(2, 2, 7), (2, 2, 3), (2, 2, 2), (2, 2, 3, 5), (2, 5)]
    np.testing.assert_array_equal(found.text, np.arange(30.0).reshape(6, 5)[[4, 1]])


def test_a_step_is_that_of_any_other_split():
    """And then stays so: sums of the step before are not left behind."""
    whole, metrics = steps.run(steps.ppo_step(), steps.ppo_batch(), calls=2)
    train_step = step.make_train_step(steps.OUTPUTS, ppo.loss, steps.PPO, steps.optimizer_named("sgd"), SORTED)
    found, sorted_metrics = steps.run(train_step, steps.ppo_batch(), calls=2)
    # Two updates of learning rate 1: the second magnifies the rounding of the first.
    steps.assert_close(steps.less(found.params, steps.parameters()), steps.less(whole.params, steps.parameters()), 1e-4)
    assert metrics.keys() == sorted_metrics.keys()
    batch = steps.ppo_batch()
    length = np.asarray(batch.prompt_len + batch.response_len)
    assert metrics["train/padding_efficiency"] == pytest.approx(length.sum() / (16 * 12))
    parts = by_length.parts(length, np.asarray(batch.response_len), (12, 6), 1, SORTED)
    places = sum(part.rows.size * part.width for part in parts)
    assert len({part.width for part in parts}) > 1
    assert sorted_metrics["train/padding_efficiency"] == pytest.approx(length.sum() / places)
    assert sorted_metrics["train/padding_efficiency"] > metrics["train/padding_efficiency"]
    for label in metrics.keys() - {"train/padding_efficiency"}:
        np.testing.assert_allclose(sorted_metrics[label], metrics[label], rtol=1e-4, atol=1e-6, err_msg=label)


def test_epochs_deal_the_same_minibatches_as_the_scan_and_each_shape_is_compiled_once():
    ends, programs = [], []
    for split in (1, SORTED):
        train = step.make_epochs(steps.OUTPUTS, ppo.loss, steps.PPO, steps.optimizer_named("adamw"), 2, 2, split)
        state, metrics = steps.run(train, steps.ppo_batch(), "adamw", calls=2)
        programs.append(train.programs())
        steps.run(train, steps.ppo_batch(), "adamw", calls=2)
        programs.append(train.programs())
        ends.append((steps.less(state.params, steps.parameters()), metrics, int(state.step)))
    (want, metrics, count), (found, sorted_metrics, sorted_count) = ends
    steps.assert_close(found, want, 1e-4)  # eight updates, one after the other
    assert count == sorted_count == 2
    for label in metrics.keys() - {"train/padding_efficiency"}:
        np.testing.assert_allclose(sorted_metrics[label], metrics[label], rtol=1e-4, atol=1e-6, err_msg=label)
    assert programs[:2] == [1, 1]
    assert programs[2] == programs[3] <= 4 + 2 * 4  # zeros, counts, update, pool; two widths of 1, 2, 4 or 8 rows


def test_a_gradient_that_is_not_finite_changes_nothing():
    train_step = step.make_train_step(steps.OUTPUTS, ppo.loss, steps.PPO, steps.optimizer_named("adamw"), SORTED)
    good = steps.ppo_batch()
    bad = good.replace(advantages=good.advantages.at[5, 0].set(jnp.nan), mask=good.mask.at[5, 0].set(True))
    state = step.init_state(steps.parameters(), steps.optimizer_named("adamw"), steps.KEY)
    state, _ = train_step(state, (), good)
    before = steps.data_of((state.params, state.opt_state.inner))
    state, metrics = train_step(state, (), bad)
    steps.assert_equal(before, (state.params, state.opt_state.inner))
    assert int(metrics["optimizer/skipped"]) == 1
    state, metrics = train_step(state, (), good)
    assert int(metrics["optimizer/skipped_in_a_row"]) == 0


@pytest.mark.full
def test_devices_share_every_part():
    one, metrics = steps.run(steps.ppo_step(1, "adamw"), steps.ppo_batch(), "adamw")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(steps.parameters(), sharding.shardings(steps.SPECS, mesh))
    with jax.set_mesh(mesh):
        state = step.init_state(placed, steps.optimizer_named("adamw"), steps.KEY)
        start = jax.tree.map(lambda x: x.sharding, state)
        train_step = step.make_train_step(steps.OUTPUTS, ppo.loss, steps.PPO, steps.optimizer_named("adamw"), SORTED)
        state, found = train_step(state, (), sharding.shard_batch(steps.ppo_batch(), mesh))
        assert jax.tree.map(lambda x: x.sharding, state) == start
        with pytest.raises(ValueError, match="6 rows cannot be shared by data x fsdp = 4 devices"):
            train_step(state, (), jax.tree.map(lambda x: x[:6], steps.ppo_batch()))
    steps.assert_close(steps.less(state.params, steps.parameters()), steps.less(one.params, steps.parameters()), 1e-5)
    np.testing.assert_allclose(found["loss/total"], metrics["loss/total"], rtol=1e-5)


def test_what_cannot_be_sorted_is_refused():
    with pytest.raises(ValueError, match="parts=2 with tokens=5: choose equal parts, or sorted ones"):
        Microbatches(parts=2, tokens=5)
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        Microbatches(multiple=0)

    def loss(outputs, batch, config):
        del config
        return {"loss/x": Term(masking.masked_sum(outputs.scores, batch.number > 0), jnp.float32(1.0))}, {}

    outputs = lambda params, frozen, batch, key: Outputs(scores=params["w"] * batch.number)  # noqa: E731
    train = step.make_epochs(outputs, loss, None, steps.optimizer_named("sgd"), 1, 1, Microbatches(tokens=4))
    state = step.init_state({"w": jnp.zeros(8)}, steps.optimizer_named("sgd"), steps.KEY)
    with pytest.raises(ValueError, match="rows of a Numbers have no lengths to sort by"):
        train(state, (), steps.Numbers(jnp.arange(8.0)))
