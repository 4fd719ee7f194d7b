"""Masks and masked reductions against float64 NumPy, with garbage wherever nothing may be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.core import masking

GARBAGE = (np.nan, np.inf, -np.inf, 1e30)


def ragged(seed: int, holes: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Random values [5, 7] far from 0 and a mask with an empty row, a full row and, by choice, holes."""
    rng = np.random.default_rng(seed)
    values = rng.normal(3.0, 2.0, (5, 7)).astype(np.float32)
    mask = np.arange(7) < np.array([0, 7, 3, 5, 1])[:, None]
    return values, mask & (rng.random((5, 7)) < 0.7) if holes else mask


def test_length_mask_by_hand():
    mask = masking.length_mask(jnp.array([0, 2, 3]), 3)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_length_mask_of_sets_of_responses():
    length = jnp.array([[1, 2], [0, 3]])
    assert masking.length_mask(length, 3).shape == (2, 2, 3)
    np.testing.assert_array_equal(masking.length_mask(length, 3).sum(-1), length)


def test_response_mask_leaves_out_what_the_policy_did_not_write():
    written = jnp.array([[True, False, True], [True, True, True]])
    np.testing.assert_array_equal(masking.response_mask(jnp.array([3, 1]), 3), [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(masking.response_mask(jnp.array([3, 1]), 3, written), [[1, 0, 1], [1, 0, 0]])


def test_response_index_points_at_the_response():
    tokens = jnp.array([[7, 8, 101, 102, 103], [9, 101, 102, 0, 0]])  # prompts of 2 and 1 tokens
    index = masking.response_index(jnp.array([2, 1]), 2)
    np.testing.assert_array_equal(jnp.take_along_axis(tokens, index, axis=1), [[101, 102], [101, 102]])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_reductions_equal_numpy_and_never_read_masked_places(garbage):
    values, mask = ragged(0)
    inside = values[mask].astype(np.float64)
    dirty = jnp.asarray(np.where(mask, values, garbage))
    # 1e-6: float32 sums of about 12 numbers of size 3
    np.testing.assert_allclose(masking.masked_sum(dirty, jnp.asarray(mask)), inside.sum(), rtol=1e-6)
    np.testing.assert_allclose(masking.masked_mean(dirty, jnp.asarray(mask)), inside.mean(), rtol=1e-6)
    np.testing.assert_array_equal(masking.masked(dirty, jnp.asarray(mask)), np.where(mask, values, 0))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("bessel", [True, False])
def test_whiten_equals_numpy(garbage, shift_mean, bessel):
    values, mask = ragged(1)
    inside = values[mask].astype(np.float64)
    variance = ((inside - inside.mean()) ** 2).sum() / (inside.size - bessel)
    expected = np.zeros(values.shape)
    expected[mask] = (inside - inside.mean()) / np.sqrt(variance + 1e-8) + (0 if shift_mean else inside.mean())
    actual = masking.whiten(jnp.asarray(np.where(mask, values, garbage)), jnp.asarray(mask), shift_mean, bessel=bessel)
    np.testing.assert_allclose(actual, expected, atol=2e-6)  # float32 rounding of values of size 3


def test_whitened_values_have_mean_0_and_variance_1_inside_the_mask():
    values, mask = ragged(2)
    white = np.asarray(masking.whiten(jnp.asarray(values), jnp.asarray(mask)), np.float64)[mask]
    assert abs(white.mean()) < 1e-6
    assert abs((white**2).mean() - 1) < 1e-5


def test_whiten_of_constants_and_of_nothing_is_finite():
    ones = jnp.full((2, 3), 5.0)
    np.testing.assert_array_equal(masking.whiten(ones, jnp.ones((2, 3), bool)), jnp.zeros((2, 3)))
    np.testing.assert_array_equal(masking.whiten(ones * jnp.nan, jnp.zeros((2, 3), bool)), jnp.zeros((2, 3)))
    assert masking.masked_mean(ones, jnp.zeros((2, 3), bool)) == 0


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("function", [masking.masked_sum, masking.masked_mean, lambda v, m: (masking.whiten(v, m) ** 3).sum()])
def test_gradients_are_those_of_the_clean_values(garbage, function):
    values, mask = ragged(3)
    clean = jax.grad(function)(jnp.asarray(values), jnp.asarray(mask))
    dirty = jax.grad(function)(jnp.asarray(np.where(mask, values, garbage)), jnp.asarray(mask))
    np.testing.assert_array_equal(dirty, clean)
    np.testing.assert_array_equal(clean[~mask], 0)
    assert np.abs(clean[mask]).max() > 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), order=st.permutations(range(5)))
def test_padding_and_batch_order_change_nothing(seed, order):
    values, mask = ragged(seed)
    wide = np.pad(values, ((0, 0), (0, 3)), constant_values=np.nan)[order]
    wide_mask = np.pad(mask, ((0, 0), (0, 3)))[order]
    a = masking.whiten(jnp.asarray(values), jnp.asarray(mask))
    b = masking.whiten(jnp.asarray(wide), jnp.asarray(wide_mask))
    np.testing.assert_allclose(b[:, :7], a[np.array(order)], atol=1e-5)  # the sums run in another order
    np.testing.assert_array_equal(b[:, 7:], 0)
