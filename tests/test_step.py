"""The train step: what it minimises, that no split of a batch matters, donation, compilation, the guard, and many devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Outputs, SamplingSpec, Term
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import objective, optimizer, plan, step
from jaxrlhf.training.optimizer import OptimizerConfig

CONFIG = TransformerConfig(22, 8, 2, 2, 2, 4, 16, 12, remat="none")
MODEL = transformer.build(CONFIG)
SPECS = {"policy": transformer.param_specs(CONFIG), "value": heads.value_specs(8)}
SPEC = SamplingSpec(0.8, 6, (2,), min_tokens=2, forbidden=(0, 1))
PPO = ppo.Config(entropy_coef=0.01)
OUTPUTS = objective.make_outputs(MODEL, SPEC, entropy=True, values=True, trunk="policy")
KEY = jax.random.key(7)


@functools.cache
def parameters() -> dict:
    params = jax.jit(lambda key: sharding.init_params(SPECS, key))(jax.random.key(0))
    return params | {"value": {"weight": jnp.linspace(-1, 1, 8), "bias": jnp.float32(0.1)}}


@functools.cache
def optimizer_named(name: str) -> optax.GradientTransformation:
    if name == "sgd":
        return optax.sgd(1.0)
    # A large epsilon: Adam's own turns the rounding of a gradient near 0 into the sign of its update.
    kind = "constant" if name == "schedule_free" else "cosine"
    return optimizer.make(OptimizerConfig(name=name, learning_rate=0.01, epsilon=0.1, schedule=kind), 10, parameters())


def ppo_batch(rows: int = 16) -> ppo.Batch:
    """Rows of very unequal length, some of which do not count at all."""
    rng = np.random.default_rng(3)
    response_len = jnp.asarray(rng.integers(1, 7, rows), jnp.int32)
    mask = masking.length_mask(response_len, 6) & (jnp.arange(rows) % 5 != 3)[:, None]
    noise = [jnp.asarray(rng.normal(size=(rows, 6)), jnp.float32) for _ in range(4)]
    return ppo.Batch(
        tokens=jnp.asarray(rng.integers(3, 22, (rows, 12)), jnp.int32),
        prompt_len=jnp.asarray(rng.integers(1, 6, rows), jnp.int32),
        response_len=response_len,
        mask=mask,
        old_logprobs=0.1 * noise[0] - 3,
        ref_logprobs=0.1 * noise[1] - 3,
        old_values=noise[1],
        advantages=noise[2],
        returns=noise[3],
        importance=jnp.ones(mask.shape),
        kl_coef=jnp.zeros(rows),
        learns=jnp.ones(rows),
    )


@functools.cache
def ppo_step(microbatches: int = 1, name: str = "sgd"):
    return step.make_train_step(OUTPUTS, ppo.loss, PPO, optimizer_named(name), microbatches)


def run(train_step, batch, name: str = "sgd", params=None, calls: int = 1):
    state = step.init_state(parameters() if params is None else params, optimizer_named(name), KEY)
    for _ in range(calls):
        state, metrics = train_step(state, (), batch)
    return data_of(state), jax.device_get(metrics)


def less(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


def assert_close(a, b, rtol: float) -> None:
    """Relative to the largest number of each leaf, since single entries may be sums that cancel; plus a weight's rounding."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max() + 1e-7, err_msg=sharding.path_name(path))


def assert_equal(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def data_of(tree):
    """Copies on the host, random keys as their data: donation cannot reach them."""
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x), tree)


def test_it_minimises_coefficient_times_sum_over_count():
    """Against the objective written out with means over all real tokens of the batch."""
    batch, params = ppo_batch(), parameters()

    def loss(params):
        out = OUTPUTS(params, (), batch, None)
        ratio = jnp.exp(out.logprobs - batch.old_logprobs)
        policy = jnp.maximum(-batch.advantages * ratio, -batch.advantages * jnp.clip(ratio, 0.8, 1.2))
        clipped = batch.old_values + jnp.clip(out.values - batch.old_values, -0.2, 0.2)
        value = 0.5 * jnp.maximum((out.values - batch.returns) ** 2, (clipped - batch.returns) ** 2)
        return (jnp.where(batch.mask, policy + 0.1 * value - 0.01 * out.entropy, 0.0)).sum() / batch.mask.sum()

    want, gradient = jax.jit(jax.value_and_grad(loss))(params)
    state, metrics = run(ppo_step(), batch)
    np.testing.assert_allclose(metrics["loss/total"], want, rtol=1e-5)
    assert_close(less(params, state.params), gradient, 1e-5)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["optimizer/grad_norm"], norm, rtol=1e-5)
    total = metrics["loss/policy"] + 0.1 * metrics["loss/value"] + 0.01 * metrics["loss/entropy"]
    np.testing.assert_allclose(metrics["loss/total"], total, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [4, 16])
def test_loss_and_gradient_do_not_depend_on_the_split(microbatches):
    whole, metrics = run(ppo_step(), ppo_batch())
    split, split_metrics = run(ppo_step(microbatches), ppo_batch())
    assert_close(less(parameters(), split.params), less(parameters(), whole.params), 1e-5)
    assert metrics.keys() == split_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="16 rows cannot be split into microbatches=3"):
        run(ppo_step(3), ppo_batch())


def test_parts_too_small_for_the_devices_are_refused():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        batch = sharding.shard_batch(ppo_batch(), mesh)
        placed = jax.device_put(parameters(), sharding.shardings(SPECS, mesh))
        state = step.init_state(placed, optimizer_named("sgd"), KEY)
        train_step = step.make_train_step(OUTPUTS, ppo.loss, PPO, optimizer_named("sgd"), 8)
        with pytest.raises(ValueError, match="microbatches=8 parts of 2 rows cannot be shared by data x fsdp = 4 devices"):
            train_step(state, (), batch)


def test_nothing_to_learn_from_gives_zero_not_nan():
    batch = ppo_batch().replace(mask=jnp.zeros((16, 6), bool))
    state, metrics = run(ppo_step(2), batch)
    assert metrics["loss/total"] == 0
    assert_equal(state.params, parameters())


def test_donation_happened():
    state = step.init_state(parameters(), optimizer_named("adamw"), KEY)
    donated = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state.inner)))
    memory = ppo_step(2, "adamw").lower(state, (), ppo_batch()).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= donated
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000  # what is new is metrics


def test_what_others_hold_survives_donation():
    params, algorithm = parameters(), ppo.init(PPO)
    before = data_of((params, algorithm))
    state = step.init_state(params, optimizer_named("adamw"), KEY, algorithm)
    held = state.algorithm, state.key, state.step
    state, _ = ppo_step(2, "adamw")(state, params, ppo_batch())  # the start is its own frozen reference
    assert_equal(before, (params, algorithm))
    assert held[0].kl_coef == state.algorithm.kl_coef
    assert int(held[2]) == 0
    assert int(state.step) == 1
    assert_equal(data_of(held[1]), data_of(KEY))


def test_one_compile_per_step_function():
    train_step = step.make_train_step(OUTPUTS, ppo.loss, PPO, optimizer_named("muon"))
    run(train_step, ppo_batch(), "muon", calls=3)
    assert train_step.programs() == 1
    epochs = step.make_epochs(OUTPUTS, ppo.loss, PPO, optimizer_named("adamw"), 2, 4)
    run(epochs, ppo_batch(), "adamw", calls=3)
    assert epochs.programs() == 1


@pytest.mark.parametrize(
    ("name", "microbatches"),
    [
        ("adamw", 1),
        ("adamw", 2),
        ("muon", 1),
        *(pytest.param(name, 1, marks=pytest.mark.full) for name in ("lion", "adafactor", "schedule_free")),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(name, microbatches):
    train_step = ppo_step(microbatches, name)
    good = ppo_batch()
    bad = good.replace(advantages=good.advantages.at[5, 0].set(jnp.nan), mask=good.mask.at[5, 0].set(True))
    state = step.init_state(parameters(), optimizer_named(name), KEY)
    state, metrics = train_step(state, (), good)
    before = data_of((state.params, state.opt_state.inner))
    state, metrics = train_step(state, (), bad)
    assert_equal(before, (state.params, state.opt_state.inner))
    assert int(metrics["optimizer/skipped"]) == 1
    assert int(metrics["optimizer/skipped_in_a_row"]) == 1
    assert np.isnan(metrics["loss/policy"])
    assert int(state.step) == 2  # the batch was seen: the next one has its own randomness
    state, metrics = train_step(state, (), good)
    assert int(metrics["optimizer/skipped"]) == 1
    assert int(metrics["optimizer/skipped_in_a_row"]) == 0
    assert not np.array_equal(state.params["value"]["weight"], before[0]["value"]["weight"])


def sums_outputs(params, frozen, batch, key):
    del frozen, key
    return Outputs(scores=params["a"] * batch.number + jnp.sqrt(params["b"] * batch.number))  # of the root infinite at 0


def test_where_one_gradient_overflows_the_moments_of_others_stay_too():
    update = optimizer.make(OptimizerConfig(clip_norm=None), 10, {"a": jnp.zeros(8), "b": jnp.ones(8)})
    train = step.make_train_step(sums_outputs, numbers_loss, None, update)
    state = step.init_state({"a": jnp.zeros(8), "b": jnp.ones(8)}, update, KEY)
    state, _ = train(state, (), Numbers(jnp.arange(8.0) + 1.0))
    before = data_of((state.params, state.opt_state.inner))
    state, metrics = train(state, (), Numbers(jnp.arange(8.0)))
    assert np.isfinite(metrics["loss/numbers"])
    assert int(metrics["optimizer/skipped"]) == 1
    assert_equal(before, (state.params, state.opt_state.inner))


@struct.dataclass
class Numbers:
    number: jax.Array  # [B] float32


def numbers_outputs(params, frozen, batch, key):
    del frozen, key
    return Outputs(scores=params["w"][batch.number.astype(int)])


def numbers_loss(outputs, batch, config):
    del config
    return {"loss/numbers": Term(outputs.scores.sum(), jnp.float32(1.0))}, {"rows": Term(batch.number.sum(), jnp.float32(1.0))}


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 4), (3, 2)])
def test_each_epoch_shows_each_row_once(epochs, minibatches):
    """The gradient of row i is 1 at w[i], so w counts how often each row was used."""
    train = step.make_epochs(numbers_outputs, numbers_loss, None, optax.sgd(1.0), epochs, minibatches)
    state = step.init_state({"w": jnp.zeros(8)}, optax.sgd(1.0), KEY)
    state, metrics = train(state, (), Numbers(jnp.arange(8.0)))
    np.testing.assert_array_equal(state.params["w"], np.full(8, -float(epochs)))
    np.testing.assert_allclose(metrics["rows"], 28 / minibatches)  # a mean over updates
    assert int(state.step) == 1


def last_loss(outputs, batch, config):
    del config
    mean = batch.number.mean()
    return {"loss/last": Term(jnp.square(outputs.scores[0] - mean), jnp.float32(1.0))}, {}


def test_each_epoch_and_each_call_has_its_own_order():
    """The parameter becomes the mean of the last minibatch."""
    outputs = lambda params, frozen, batch, key: Outputs(scores=params["w"] + 0 * batch.number)  # noqa: E731
    ends = []
    for epochs in (1, 2):
        train = step.make_epochs(outputs, last_loss, None, optax.sgd(0.5), epochs, 4)
        state = step.init_state({"w": jnp.zeros(1)}, optax.sgd(0.5), KEY)
        for _ in range(3):
            state, _ = train(state, (), Numbers(2.0 ** jnp.arange(8.0)))
            ends.append(round(float(state.params["w"][0]), 3))
    assert len(set(ends)) == 6


def test_epochs_are_the_same_updates_as_steps():
    epochs = step.make_epochs(OUTPUTS, ppo.loss, PPO, optimizer_named("sgd"), 1, 1)
    scanned, metrics = run(epochs, ppo_batch())
    single, single_metrics = run(ppo_step(), ppo_batch())
    assert_close(less(parameters(), scanned.params), less(parameters(), single.params), 1e-5)  # rows in another order
    for name, value in single_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.full) for name in ("muon", "schedule_free"))])
def test_eight_devices_do_what_one_does(name):
    one, metrics = run(ppo_step(2, name), ppo_batch(), name, calls=2)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(parameters(), sharding.shardings(SPECS, mesh))
    with jax.set_mesh(mesh):
        state = step.init_state(placed, optimizer_named(name), KEY)
        batch = sharding.shard_batch(ppo_batch(), mesh)
        train_step = step.make_train_step(OUTPUTS, ppo.loss, PPO, optimizer_named(name), 2)
        start = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(2):
            state, sharded_metrics = train_step(state, (), batch)
        assert train_step.programs() == 1
        memory = train_step.lower(state, (), batch).compile().memory_analysis()
    assert jax.tree.map(lambda x: x.sharding, state) == start
    for label, value in metrics.items():
        np.testing.assert_allclose(sharded_metrics[label], value, rtol=1e-5, atol=1e-6, err_msg=label)
    # Newton-Schulz multiplies rounding by its slope at 0, 3.4 a step, so Muon agrees less closely.
    assert_close(less(state.params, parameters()), less(one.params, parameters()), 1e-3 if name == "muon" else 1e-5)
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, state.opt_state.inner)))
    assert memory.alias_size_in_bytes >= own  # bytes a device


def test_optimizer_state_is_split_as_its_parameters():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(parameters(), sharding.shardings(SPECS, mesh))
    for name in ("adamw", "muon"):
        with jax.set_mesh(mesh):
            state = step.init_state(placed, optimizer_named(name), KEY)
        shards = {
            sharding.path_name(path): x.addressable_shards[0].data.size / x.size
            for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
        }
        moments = {path: share for path, share in shards.items() if path.endswith(("layers/up", "embed"))}
        assert len(moments) == (4 if name == "adamw" else 3)  # muon has one moment, Adam two
        assert set(moments.values()) == {1 / 4}, moments


def test_state_shardings_follow_names_and_shapes():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    params = {"a": jnp.zeros(8), "b": jnp.zeros((8, 8))}
    params = jax.device_put(params, {"a": sharding.replicated(mesh), "b": sharding.batch_sharding(mesh)})
    state = {"mu": params, "nu": {"a": jnp.zeros(8), "b": jnp.zeros(2)}, "count": jnp.zeros(())}
    found = step.state_shardings(jax.eval_shape(lambda: state), params)
    assert found["mu"] == {"a": sharding.replicated(mesh), "b": sharding.batch_sharding(mesh)}
    assert found["nu"]["b"] == found["count"] == sharding.replicated(mesh)


def test_dropout_draws_anew_at_every_step_and_repeats_with_the_key():
    config = dataclasses.replace(CONFIG, dropout=0.5)
    outputs = objective.make_outputs(transformer.build(config), SPEC, trunk="policy", dropout=True)

    def loss(outputs, batch, config):
        del config
        return {"loss/x": Term(masking.masked_sum(outputs.logprobs, batch.mask), jnp.float32(1.0))}, {}

    train_step = step.make_train_step(outputs, loss, None, optax.sgd(0.0), 2)

    def losses(key):
        state = step.init_state(parameters(), optax.sgd(0.0), key)
        found = []
        for _ in range(2):
            state, metrics = train_step(state, (), ppo_batch())
            found.append(float(metrics["loss/x"]))
        return found

    first = losses(KEY)
    assert first == losses(KEY)
    assert len({*first, *losses(jax.random.key(8))}) == 4


def test_factored_moments_are_split_as_the_axes_that_are_left():
    """Adafactor's rows [L, in] and columns [L, out], and what they take on each device by the memory table."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    config = dataclasses.replace(CONFIG, width=128, mlp_width=256)
    specs = transformer.param_specs(config)
    params = jax.device_put(sharding.init_params(specs, KEY), sharding.shardings(specs, mesh))
    update = optimizer.make(OptimizerConfig(name="adafactor"), 10, params)
    with jax.set_mesh(mesh):
        state = step.init_state(params, update, KEY)
        told = plan.training(params, update)
    found = {
        sharding.path_name(path): (x.shape, x.addressable_shards[0].data.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    split = {path.split("0/v_")[1]: shapes for path, shapes in found.items() if path.endswith("layers/up") and "/v_" in path}
    assert split == {"row/layers/up": ((2, 128), (2, 64)), "col/layers/up": ((2, 256), (2, 128))}  # over fsdp; over tensor
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.opt_state.inner))
    assert [row.size.device for row in told if row.kind == "moments"] == [own]
    assert own < 0.1 * sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
