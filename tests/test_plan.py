"""The bytes that are told before a run are those of the arrays that it then holds, in all and on each device."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Experience, Prompts, Rollout, SamplingSpec, TrainState
from jaxrlhf.models import heads, lora, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import EXACT
from jaxrlhf.sampling import decode, rollout
from jaxrlhf.sampling.rows import Shape
from jaxrlhf.training import flops, objective, optimizer, plan, step
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
        how = Shape(n, 8, EXACT)
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


WIDE = TransformerConfig(512, 128, 4, 4, 4, 32, 384, 64)
# Of the arrays that XLA keeps at one moment the estimate knows widths, not fusions: what it fits to 5 % at one shape is off by
# up to 25 % at others. What is exact (the gradient) is compared as such in `test_what_is_trained`.
ESTIMATED = 0.25
UPDATES = {
    "whole": (WIDE, 32, 1),
    "few rows": (WIDE, 8, 1),
    "microbatches": (WIDE, 32, 4),
    "all is kept": (dataclasses.replace(WIDE, remat="none"), 16, 1),
    "gpt2": (dataclasses.replace(WIDE, mlp="gelu", norm="layer"), 32, 1),
    "wide MLP": (dataclasses.replace(WIDE, mlp_width=768), 16, 1),
    "deep": (dataclasses.replace(WIDE, layers=12), 16, 1),
    "few keys": (dataclasses.replace(WIDE, kv_heads=1), 16, 1),
    "many words": (dataclasses.replace(WIDE, vocab_size=8192), 16, 1),
}
SMALL = ("whole", "microbatches")


def on_one_device(tree):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SMALL else pytest.mark.full) for name in UPDATES])
def test_an_update_holds_what_the_compiler_gives_it(name):
    """PPO's own program: arguments to the byte, temporaries as far as an estimate goes."""
    shape, count, parts = UPDATES[name]
    width, response = 64, 32
    model, spec = transformer.build(shape), dataclasses.replace(SPEC, max_tokens=response)
    value = sharding.abstract(heads.value_specs(shape.width), mesh_of("one"))
    params = on_one_device({"policy": jax.eval_shape(model.init, jax.random.key(0)), "value": value})
    update = optimizer.make(ADAMW, 10, params)
    number, key = jax.eval_shape(lambda: (jnp.int32(0), jax.random.key(0)))
    opt_state = step.GuardedState(jax.eval_shape(update.init, params), number, number)
    state = on_one_device(TrainState(number, params, opt_state, (), key))
    data = drawn(count, width)
    batch = on_one_device(jax.eval_shape(lambda x: ppo.prepare(x, ppo.init(ppo.Config()), ppo.Config())[0], data))
    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy")
    program = step.make_train_step(outputs, ppo.loss, ppo.Config(), update, parts)
    real = plan.compiled(program, state, None, batch)
    rows = plan.training(params, update, microbatches=parts)
    always = sum(row.size.device for row in rows if row.when == "always")
    assert always < real["arguments"] <= always + plan.size(batch).total + 64  # step, key, counts; not what no loss reads
    logits = heads.at_once("cpu", shape.vocab_size)
    rows += plan.update((flops.Pass(shape, gradient=True),), count // parts, width, response, logits)
    told = sum(row.size.device for row in rows if row.when == "update")
    assert told == pytest.approx(real["temporaries"], rel=ESTIMATED), told / real["temporaries"]


@pytest.mark.parametrize("name", ["whole", pytest.param("wide MLP", marks=pytest.mark.full)])
def test_scoring_holds_what_the_compiler_gives_it(name):
    shape, count, _ = UPDATES[name]
    model, spec = transformer.build(shape), dataclasses.replace(SPEC, max_tokens=32)
    params = on_one_device({"policy": jax.eval_shape(model.init, jax.random.key(0))})
    given = on_one_device(drawn(count, 64).rollout)
    real = plan.compiled(rollout._experience, model, spec, rollout.Options(rows=count), params, params["policy"], given)
    [row] = plan.scoring((flops.Pass(shape),) * 2, count, 64, 32, heads.at_once("cpu", shape.vocab_size))
    assert row.size.device == pytest.approx(real["temporaries"], rel=ESTIMATED)


def drawn(rows: int, width: int, response: int = 32) -> Experience:
    """An experience's shapes."""
    whole, each = jax.ShapeDtypeStruct((rows, width), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    numbers, one = jax.ShapeDtypeStruct((rows, response), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    ended = jax.ShapeDtypeStruct((rows,), bool)
    found = Rollout(whole, each, each, ended, each, each, each, numbers, numbers)
    return Experience(found, numbers, numbers, numbers, one, one, one)


def test_activations_are_split_as_rows_and_heads_are():
    """Eight devices: states over data and fsdp, a layer's heads and MLP over tensor too."""
    passes = (flops.Pass(WIDE, gradient=True),)
    [kept, working] = plan.update(passes, 32, 64, 32, 2**20)
    with jax.set_mesh(mesh_of("eight")):
        [kept_there, working_there] = plan.update(passes, 32, 64, 32, 2**20)
    assert kept_there.size == plan.Size(kept.size.total, kept.size.total // 4)
    assert working.size.total / 8 < working_there.size.device < working.size.total / 4


def test_microbatches_halve_activations_and_hold_a_second_gradient():
    shapes = sharding.abstract(transformer.param_specs(SHAPE), mesh_of("one"))
    update = optimizer.make(ADAMW, 10, shapes)
    gradients = [found(plan.training(shapes, update, microbatches=parts), "policy", "gradient") for parts in (1, 2)]
    assert gradients[1] == (2 * gradients[0][0], 2 * gradients[0][1])
    kept = [plan.update((flops.Pass(WIDE, gradient=True),), rows, 64, 32, 2**20)[0].size.total for rows in (32, 16)]
    assert kept[0] == 2 * kept[1] == 4 * 32 * 64 * WIDE.width * WIDE.layers


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
        ValueError,
        match=r"takes 1.75 GiB a device, 768.2 MiB more than the 1.00 GiB .*largest: policy parameters 1.00 GiB.*lora.rank",
    ):
        plan.check(ROWS, plan.limit(devices))
