"""Products of activations and weights: values, gradients, narrow operands, vmap and meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxrlhf.core import sharding
from jaxrlhf.models import products


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def rounded(x, dtype):
    """To bfloat16 and back, in float64."""
    return np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32), np.float64)


@functools.cache
def slope(dtype, flipped):
    def loss(x, w, g):
        y = products.product(dtype, x, w, flipped)
        return (y * g).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


# More inputs than outputs, and fewer: another operand is moved. One row, one input, one output: XLA has special forms.
@pytest.mark.parametrize(("rows", "inner", "out"), [((2, 3), 7, 4), ((6,), 4, 7), ((1, 1), 5, 3), ((4,), 1, 3), ((4,), 3, 1)])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_rounded_operands(rows, inner, out, flipped, dtype):
    x, w, g = normal((*rows, inner)), normal((inner, out), 1), normal((*rows, out), 2)
    (_, y), (dx, dw) = slope(dtype, flipped)(x, w.T if flipped else w, g)
    exact = [rounded(a, dtype) for a in (x, w, g)]
    flat_x, flat_g = exact[0].reshape(-1, inner), exact[2].reshape(-1, out)
    # 1e-5: float32 sums of at most 7 products.
    np.testing.assert_allclose(y, exact[0] @ exact[1], atol=1e-5)
    np.testing.assert_allclose(dx, exact[2] @ exact[1].T, atol=1e-5)
    dw = dw.T if flipped else dw
    np.testing.assert_allclose(dw, flat_x.T @ flat_g, atol=1e-5)
    assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype("float32")}


def test_the_result_of_a_narrow_product_may_be_transposed():
    """XLA's CPU backend folds the transposition into the product and then cannot run it, but for our barrier."""
    x, w = normal((8, 6)), normal((6, 10))
    assert jax.jit(lambda x, w: products.product("bfloat16", x, w).T)(x, w).shape == (10, 8)
    assert jax.jit(jax.grad(lambda w: products.product("bfloat16", x, w.T).T.sum()))(w.T).shape == (10, 6)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_stack_of_models_under_vmap(devices):
    x, w = normal((3, 8, 6)), normal((3, 6, 10), 1)

    def loss(x, w):
        return products.product("bfloat16", x, w).sum() + products.product("bfloat16", x, w.T, flipped=True).sum()

    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        stacked = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(x, w)
    for i in range(3):
        one = jax.jit(jax.value_and_grad(loss, (0, 1)))(x[i], w[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-3), stacked, one)


@pytest.mark.parametrize("spec", [("data", None), (None, "data"), ("fsdp", "data"), (), (("data", "fsdp"), None)], ids=str)
def test_a_matrix_split_over_devices_is_transposed_in_place(spec):
    """Every device moves its own part: no collective."""
    mesh, x = sharding.make_mesh(sharding.MeshConfig(4, 2, 1)), normal((8, 16))
    flipped = PartitionSpec(*reversed((*spec, None, None)[:2]))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec(*spec)))
        run = jax.jit(products.transpose, out_shardings=jax.sharding.NamedSharding(mesh, flipped))
        text = run.lower(x).compile().as_text()
        np.testing.assert_array_equal(run(x), np.asarray(x).T)
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
