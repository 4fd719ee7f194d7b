"""GAE against equation 16 of its paper, with tails, holes and cut responses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxrlhf.algorithms import advantages


def arrays(seed: int, holes: bool, shape=(6, 9)):
    rng = np.random.default_rng(seed)
    length = rng.integers(0, shape[1] + 1, shape[0])
    length[:2] = shape[1], 0  # a full row and an empty one
    mask = np.arange(shape[1]) < length[:, None]
    if holes:
        mask &= rng.random(shape) < 0.6
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    return rewards, values, mask, rng.normal(size=shape[0]).astype(np.float32)


def run(rewards, values, mask, bootstrap, gamma=0.97, lam=0.9):
    return advantages.gae(*(jnp.asarray(x) for x in (rewards, values, mask, bootstrap)), gamma, lam)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_equals_the_reference(holes, gamma, lam):
    data = arrays(0, holes)
    got, expected = run(*data, gamma, lam), reference.gae(*data, gamma, lam)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_a_row_by_hand():
    # Two tokens, gamma 0.5, lam 0.5; the response was cut, and 4 is the value of going on.
    got, returns = run(
        np.float32([[1.0, 2.0]]), np.float32([[10.0, 20.0]]), np.ones((1, 2), bool), np.float32([4.0]), gamma=0.5, lam=0.5
    )
    # delta_1 = 2 + .5 * 4 - 20 = -16; delta_0 = 1 + .5 * 20 - 10 = 1; A_0 = 1 + .25 * -16 = -3
    np.testing.assert_allclose(got, [[-3.0, -16.0]])
    np.testing.assert_allclose(returns, [[7.0, 4.0]])


def test_holes_are_as_if_their_neighbours_touched():
    rewards, values, mask, bootstrap = arrays(1, holes=False)
    spread = np.zeros((6, 18), bool)
    spread[:, ::2] = mask

    def wide(x):
        return np.repeat(x, 2, axis=1)

    for a, b in zip(run(rewards, values, mask, bootstrap), run(wide(rewards), wide(values), spread, bootstrap), strict=True):
        np.testing.assert_array_equal(a, b[:, ::2])
        assert not np.any(b[:, 1::2])


def test_lambda_one_is_the_discounted_return_less_the_value():
    rewards, values, mask, _ = arrays(2, holes=False)
    _, returns = run(rewards, values, mask, np.zeros(6, np.float32), gamma=1.0, lam=1.0)
    togo = np.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, togo * mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_masked_places_are_not_read(holes, garbage):
    rewards, values, mask, bootstrap = arrays(3, holes)

    def total(r, v):
        return sum(x.sum() for x in advantages.gae(r, v, jnp.asarray(mask), jnp.asarray(bootstrap), 0.97, 0.9))

    clean = [jnp.asarray(rewards), jnp.asarray(values)]
    dirty = [jnp.where(mask, x, garbage) for x in clean]
    for a, b in zip(run(*clean, mask, bootstrap), run(*dirty, mask, bootstrap), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.grad(total, (0, 1))(*clean), jax.grad(total, (0, 1))(*dirty), strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


def test_padding_and_row_order_change_nothing():
    rewards, values, mask, bootstrap = arrays(4, holes=True)

    def pad(x):
        return np.pad(x, ((0, 0), (0, 5)), constant_values=7)

    padded = np.pad(mask, ((0, 0), (0, 5)))
    order = np.random.default_rng(0).permutation(6)
    plain = run(rewards, values, mask, bootstrap)
    for a, b in zip(plain, run(pad(rewards), pad(values), padded, bootstrap), strict=True):
        np.testing.assert_array_equal(a, b[:, :9])
    for a, b in zip(plain, run(rewards[order], values[order], mask[order], bootstrap[order]), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[order], b)
