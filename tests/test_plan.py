"""The bytes that are told before a run are those of the arrays that it then holds, in all and on each device."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import lora, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import EXACT
from jaxrlhf.sampling import decode
from jaxrlhf.training import optimizer, plan, step
from jaxrlhf.training.optimizer import OptimizerConfig

SHAPE = TransformerConfig(64, 32, 2, 4, 2, 8, 48, 32, dtype="bfloat16", tied_head=False)
LORA = lora.LoraConfig(rank=4, targets=("query", "down", "head"))
SPEC = SamplingSpec(temperature=1.0, max_tokens=8, stop=(2,))
MESHES = {"one": sharding.MeshConfig(data=1), "eight": sharding.MeshConfig(data=2, fsdp=2, tensor=2)}
ADAMW, MUON = OptimizerConfig(), OptimizerConfig(name="muon", muon_dtype="bfloat16", learning_rate=0.01)


def mesh_of(name: str) -> jax.sharding.Mesh:
    return sharding.make_mesh(MESHES[name], jax.devices()[: 1 if name == "one" else 8])


def placed(mesh: jax.sharding.Mesh, shape: TransformerConfig = SHAPE, seed: int = 0):
    specs = transformer.param_specs(shape)
    return jax.device_put(sharding.init_params(specs, jax.random.key(seed)), sharding.shardings(specs, mesh))


def adapter(mesh: jax.sharding.Mesh, seed: int = 0):
    specs = lora.specs(SHAPE, LORA)
    return jax.device_put(sharding.init_params(specs, jax.random.key(seed)), sharding.shardings(specs, mesh))


def held(tree) -> tuple[int, int]:
    """Bytes of the arrays of a tree, each once: in all, and in the memory of the first device."""
    arrays = {id(x): x for x in jax.tree.leaves(tree)}.values()
    first = [s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == jax.devices()[0]]
    return sum(x.nbytes for x in arrays), sum(first)


def found(rows, role: str, kind: str) -> tuple[int, int]:
    [row] = [row for row in rows if (row.role, row.kind) == (role, kind)]
    return row.size.total, row.size.device


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("case", ["whole", "adapters", "muon", "alone"])
def test_what_is_trained(devices, case):
    """A critic of its own, adapters on one trunk, Muon's moment beside Adam's two, and a model without a head."""
    mesh = mesh_of(devices)
    with jax.set_mesh(mesh):
        check_training(mesh, case)


def check_training(mesh: jax.sharding.Mesh, case: str) -> None:
    tree = adapter(mesh) if case == "adapters" else placed(mesh)
    params = tree if case == "alone" else {"policy": tree, "critic": roles.critic(tree, SHAPE.width)}
    update = optimizer.make(MUON if case == "muon" else ADAMW, 10, params)
    rows = plan.training(params, update, average=True)
    state = step.update_ema(step.init_state(params, update, jax.random.key(0)), 0.9)
    for role in ("policy",) if case == "alone" else ("policy", "critic"):
        own = state.params if case == "alone" else state.params[role]
        for kind in ("parameters", "gradient", "average"):
            assert found(rows, role, kind) == held(own), (role, kind)
    moments = [row.size for row in rows if row.kind == "moments"]
    assert (sum(x.total for x in moments), sum(x.device for x in moments)) == held(state.opt_state.inner)
    if case == "whole":
        whole, head = held(state.params["policy"])[0], 4 * (SHAPE.width + 1)
        counts = moments[0].total - 2 * whole  # of steps: a few integers, which go with the first role
        assert 0 < counts < 64
        assert moments[1].total == 2 * (whole + head)
    if case == "muon":
        assert moments[0].total < 2 * held(state.params["policy"])[0]


def test_what_is_frozen_counts_once():
    mesh = mesh_of("eight")
    base, own = placed(mesh), placed(mesh, seed=1)
    reward = {"trunk": lora.attach(base, adapter(mesh), LORA), "head": {"weight": jnp.ones(SHAPE.width)}}
    rows = plan.frozen({"reference": base, "reward": reward, "other": own})
    assert found(rows, "reference", "frozen") == held(base)
    total, device = held(adapter(mesh))
    assert found(rows, "reward", "frozen") == (total + 4 * SHAPE.width, device + 4 * SHAPE.width)
    assert found(rows, "other", "frozen") == held(own)


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("case", ["narrow", "same", "tied", "adapters"])
def test_what_is_sampled_with(devices, case):
    """Weights that are not the policy's own arrays; keys and values of prompts and of n responses to each."""
    shape = dataclasses.replace(SHAPE, dtype="float32") if case == "same" else SHAPE
    shape = dataclasses.replace(shape, tied_head=case == "tied")
    model, mesh, n = transformer.build(shape), mesh_of(devices), 3
    with jax.set_mesh(mesh):
        policy = placed(mesh, shape)
        if case == "adapters":
            policy = lora.attach(policy, adapter(mesh), LORA)
        rows = plan.sampling(model, policy, SPEC, (8, 6), n)
        weights = decode.decode_params(model, policy)
        count = np.arange(8, dtype=np.int32)
        prompts = Prompts(np.full((8, 6), 3, np.int32), np.full(8, 6, np.int32), count, count)
        how = decode.Shape(n, 8, EXACT)
        wave = decode.start(model, SPEC, how, 8, weights, sharding.shard_batch(prompts, mesh), jax.random.key(0), None)
    given = {buffer(x) for x in jax.tree.leaves(policy)}
    made = [x for x in jax.tree.leaves(weights) if buffer(x) not in given]
    assert 0 < len(made) < len(jax.tree.leaves(weights))  # the embedding is handed on
    assert found(rows, "sampling", "weights") == held(made)
    for part in ("prompt", "response"):
        assert found(rows, "sampling", f"cache of {part}s") == held(wave.cache[part]), part


def buffer(x: jax.Array) -> int:
    return x.addressable_shards[0].data.unsafe_buffer_pointer()


def test_shapes_alone_give_the_same():
    """As a model that is not there is planned for: every size, without an array."""
    mesh = mesh_of("eight")
    shapes = sharding.abstract(transformer.param_specs(SHAPE), mesh)
    model, update = transformer.build(SHAPE), optimizer.make(ADAMW, 10, {"policy": shapes})
    found = []
    with jax.set_mesh(mesh):
        for tree in (shapes, placed(mesh)):
            rows = plan.training({"policy": tree}, update) + plan.frozen({"reference": tree})
            found.append(rows + plan.sampling(model, tree, SPEC, (8, 6), 2))
    assert found[0] == found[1]
    assert plan.limit(jax.devices()) is None  # a CPU does not say


ROWS = (
    plan.Row("policy", "parameters", "always", plan.Size(4 << 30, 1 << 30)),
    plan.Row("policy", "gradient", "update", plan.Size(2 << 30, 1 << 29)),
    plan.Row("policy", "average", "always", plan.Size()),
    plan.Row("sampling", "weights", "sampling", plan.Size(3 << 30, 3 << 28)),
    plan.Row("sampling", "cache of responses", "sampling", plan.Size(1 << 20, 1 << 18)),
)


def test_the_most_at_once_is_what_stands_together():
    assert plan.peak(ROWS) == plan.Size((7 << 30) + (1 << 20), (7 << 28) + (1 << 18))  # the gradient is gone while sampling
    assert plan.peak(ROWS[:3]) == plan.Size(6 << 30, 3 << 29)


def test_the_table_and_a_run_that_cannot_fit():
    lines = plan.table(ROWS, 2 << 30).splitlines()
    assert lines[1].split("  ")[0] == "policy"
    assert "parameters 4.00 GiB, gradient 2.00 GiB" in lines[1]
    assert "average" not in lines[1]
    assert "cache of responses 1.0 MiB" in lines[2]
    assert lines[-1].split() == ["at", "most", "at", "once", "7.00", "GiB", "1.75", "GiB", "88%", "of", "2.00", "GiB"]
    devices = [types.SimpleNamespace(memory_stats=lambda size=size: {"bytes_limit": size << 30}) for size in (2, 1)]
    assert plan.limit(devices) == 1 << 30
    plan.check(ROWS, None)
    plan.check(ROWS, 2 << 30)
    with pytest.raises(
        ValueError, match=r"take 1.75 GiB a device, of 1.00 GiB .*largest: policy parameters 1.00 GiB.*lora.rank"
    ):
        plan.check(ROWS, plan.limit(devices))
