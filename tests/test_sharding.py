"""Mesh, parameter specs and the constraint on activations, on eight host devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig, ParamSpec

SPECS = {
    "embed": ParamSpec((16, 8), ("vocab", "embed"), sharding.normal(0.02)),
    "layers": {"mlp": ParamSpec((2, 8, 12), ("layers", "embed", "mlp"), sharding.normal(1.0))},
    "norm": ParamSpec((8,), (None,), sharding.ones),
    "bias": ParamSpec((), (), sharding.zeros),
}


def mesh(data: int = 2, fsdp: int = 2, tensor: int = 2) -> jax.sharding.Mesh:
    """A mesh over all eight devices, or the first few of them."""
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def test_there_are_eight_devices():
    if jax.default_backend() == "cpu":
        assert jax.device_count() == 8


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1, 1)),
        (MeshConfig(fsdp=2), (4, 2, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(tensor=8), (1, 1, 1, 8)),
        (MeshConfig(expert=4, tensor=2), (1, 1, 4, 2)),
    ],
)
def test_make_mesh(config, shape):
    made = sharding.make_mesh(config, (jax.devices() * 8)[:8] if jax.device_count() < 8 else jax.devices()[:8])
    assert made.axis_names == ("data", "fsdp", "expert", "tensor")
    assert tuple(made.shape.values()) == shape
    assert made.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(data=3), r"data=3 x fsdp=1 x tensor=1 does not fit 8 device.*product is 8"),
        (MeshConfig(fsdp=3), r"fsdp=3 .*does not fit 8"),
        (MeshConfig(fsdp=16), r"fsdp=16 .*does not fit 8"),
        (MeshConfig(data=16), r"data=16"),
        (MeshConfig(data=0), r"axes must be >= 1"),
        (MeshConfig(data=-2), r"axes must be >= 1"),
        (MeshConfig(fsdp=0), r"axes must be >= 1"),
        (MeshConfig(expert=0), r"axes must be >= 1"),
        (MeshConfig(expert=3), r"x expert=3 does not fit 8 device"),
        (MeshConfig(tensor=-1), r"axes must be >= 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(config, jax.devices()[:8])


def test_a_spec_names_every_axis():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has 2 axes but 1 names"):
        ParamSpec((2, 3), ("embed",), sharding.zeros)


def test_every_rule_names_mesh_axes():
    for axis, names in sharding.RULES.items():
        for name in (names,) if isinstance(names, str) else names or ():
            assert name in sharding.AXES, axis


def test_initial_values_follow_the_specs():
    params = sharding.init_params(SPECS, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, SPECS, is_leaf=lambda x: isinstance(x, ParamSpec))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(params["norm"], 1)
    np.testing.assert_array_equal(params["bias"], 0)
    wide = sharding.init_params({"w": ParamSpec((400, 400), (None, None), sharding.normal(0.02))}, jax.random.key(1))["w"]
    assert abs(float(wide.std()) - 0.02) < 2e-4  # 160,000 draws: the error of the standard deviation is 0.02 / sqrt(320,000)
    assert abs(float(wide.mean())) < 2e-4


def test_adding_a_leaf_changes_no_other():
    before = sharding.init_params(SPECS, jax.random.key(0))
    more = {"aaa": ParamSpec((3,), (None,), sharding.normal(1.0)), **SPECS}
    more["layers"] = {"attention": ParamSpec((2, 8), ("layers", "embed"), sharding.normal(1.0)), **SPECS["layers"]}
    after = sharding.init_params(more, jax.random.key(0))
    np.testing.assert_array_equal(after["embed"], before["embed"])
    np.testing.assert_array_equal(after["layers"]["mlp"], before["layers"]["mlp"])


def test_leaves_and_keys_differ():
    twins = {name: ParamSpec((8,), (None,), sharding.normal(1.0)) for name in ("a", "b")}
    params = sharding.init_params(twins, jax.random.key(0))
    assert np.abs(params["a"] - params["b"]).min() > 0
    assert np.abs(params["a"] - sharding.init_params(twins, jax.random.key(1))["a"]).min() > 0


def test_shardings_come_from_the_one_table():
    placed = sharding.shardings(SPECS, mesh())
    assert placed["embed"].spec == P("tensor", "fsdp")
    assert placed["layers"]["mlp"].spec == P(None, "fsdp", "tensor")
    assert placed["norm"].spec == P(None)
    assert placed["bias"].spec == P()


def test_an_axis_that_cannot_be_split_is_named():
    specs = {"layers": {"mlp": ParamSpec((2, 8, 9), ("layers", "embed", "mlp"), sharding.zeros)}}
    with pytest.raises(ValueError, match=r"layers/mlp: axis 'mlp' of size 9 cannot be split 2 ways over mesh \('tensor',\)"):
        sharding.shardings(specs, mesh())
    sharding.shardings(specs, mesh(4, 2, 1))


def test_abstract_is_what_init_makes():
    expected = jax.jit(lambda key: sharding.init_params(SPECS, key), out_shardings=sharding.shardings(SPECS, mesh()))(
        jax.random.key(0)
    )
    for template, leaf in zip(jax.tree.leaves(sharding.abstract(SPECS, mesh())), jax.tree.leaves(expected), strict=True):
        assert (template.shape, template.dtype) == (leaf.shape, leaf.dtype)
        assert template.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert sharding.abstract(SPECS, mesh(), jnp.bfloat16)["embed"].dtype == jnp.bfloat16


def test_initial_values_do_not_depend_on_the_mesh():
    plain = sharding.init_params(SPECS, jax.random.key(0))
    for shape in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
        out = sharding.shardings(SPECS, mesh(*shape))
        split = jax.jit(lambda key: sharding.init_params(SPECS, key), out_shardings=out)(jax.random.key(0))
        # 2 ulp: the compiler may fuse the scale into the draw
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.5e-7), split, plain)


def test_shard_batch_splits_the_rows_and_keeps_their_order():
    batch = {"tokens": np.arange(16).reshape(8, 2), "length": np.arange(8)}
    placed = sharding.shard_batch(batch, mesh())
    assert len({shard.device for shard in placed["tokens"].addressable_shards}) == 8
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 2)  # 8 rows over data x fsdp = 4
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["length"].sharding.spec == P(("data", "fsdp", "expert"))


def test_a_batch_that_cannot_be_split_is_named():
    with pytest.raises(ValueError, match=r"batch field rows/length has 6 rows, not divisible by data x fsdp = 4"):
        sharding.shard_batch({"rows": {"length": np.arange(6)}}, mesh())


def test_replicated_means_every_device_holds_everything():
    placed = jax.device_put(jnp.arange(3), sharding.replicated(mesh()))
    assert all(shard.data.shape == (3,) for shard in placed.addressable_shards)
    assert len(placed.addressable_shards) == 8


def test_constrain_does_nothing_outside_a_mesh():
    x = jnp.ones((3, 5, 7))  # sizes that no mesh divides
    assert sharding.constrain(x, "batch", "length", "residual") is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: sharding.constrain(x, "batch", "length", None))(x))


def test_constrain_pins_the_batch_axis_inside_a_mesh():
    with jax.set_mesh(mesh()):
        x = jax.device_put(jnp.arange(64.0).reshape(8, 4, 2), sharding.replicated(mesh()))
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "length", "residual"))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh(), P(("data", "fsdp"))), 3)
    np.testing.assert_array_equal(y, x * 2)


def test_constrain_with_a_name_outside_the_table_is_an_error():
    with jax.set_mesh(mesh()), pytest.raises(KeyError, match="lenght"):
        jax.jit(lambda x: sharding.constrain(x, "batch", "lenght"))(jnp.ones((8, 4)))


def test_path_name_reads_like_a_folder():
    leaves = jax.tree_util.tree_leaves_with_path({"layers": {"attention": [1, {"query": 2}]}})
    assert [sharding.path_name(path) for path, _ in leaves] == ["layers/attention/0", "layers/attention/1/query"]
