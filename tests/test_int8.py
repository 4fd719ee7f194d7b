"""Frozen weights in eight bits: against NumPy and the weights they stand for, sampled, adapted, split over devices."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
from adapter_cases import CONFIG, GPT, KINDS, LLAMA, SPEC, adapter_of, base_of, batch_of, logits_of, prompts, tokens

from jaxrlhf.algorithms import lm
from jaxrlhf.core import members, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import hf, int8, lora, pretrained, products, transformer
from jaxrlhf.models.products import Quantised
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig


@functools.cache
def narrow_of(shape):
    return int8.quantise(base_of(shape))


def wide(params):
    """What a tree of eight-bit weights stands for, by their definition, in float64."""

    def one(leaf):
        if isinstance(leaf, Quantised):
            return np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)
        return np.asarray(leaf, np.float64)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Quantised))


# ------------------------------------------------------------------------------------------------ rounding


def test_a_column_by_hand():
    weight = jnp.asarray([[[1.0, 0.0, -1e-30], [-2.54, 0.0, 0.5e-30], [0.009, 0.0, 0.0]]])
    found = int8.quantise({"layers": {"up": weight}})["layers"]["up"]
    np.testing.assert_array_equal(found.values, [[[50, 0, -127], [-127, 0, 64], [0, 0, 0]]])
    np.testing.assert_allclose(found.scale, [[[0.02, 1.0, 1e-30 / 127]]], rtol=1e-6)
    assert (found.values.dtype, found.scale.dtype) == (jnp.int8, jnp.float32)


@KINDS
def test_matrices_have_eight_bits_and_all_else_stays(shape, config):
    base, narrow = base_of(shape), narrow_of(shape)
    matrices = {"embed", *(f"layers/{name}" for name in int8.MATRICES if name in base["layers"]), *({"head"} & set(base))}
    assert set(int8.inside(narrow)) == matrices
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        kept = functools.reduce(lambda tree, key: tree[key.key], path, narrow)
        if sharding.path_name(path) not in matrices:
            assert kept is leaf
            continue
        axis = -1 if path[-1].key == "embed" else -2
        largest = np.abs(leaf).max(axis, keepdims=True)
        # Half a step of the scale, and the last bit of the quotient.
        assert (np.abs(wide(kept) - np.asarray(leaf)) <= largest / 127 * (0.5 + 1e-5)).all()
        assert (np.abs(kept.values).max(axis) == 127).all()
    again = int8.quantise(narrow)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(narrow), strict=True))


def test_biases_that_are_named_as_their_matrix_stay():
    shape = dataclasses.replace(GPT, qkv_bias=True, output_bias=True, mlp_bias=True)
    narrow = int8.quantise({"trunk": transformer.build(shape).init(jax.random.key(0)), "head": {"weight": jnp.ones((2, 2))}})
    assert not [name for name in int8.inside(narrow) if "bias" in name or name.startswith("head")]
    assert "trunk/layers/query" in int8.inside(narrow)


def test_a_weight_that_is_not_finite_shows():
    """int8 has no NaN: without it in the scale, a broken weight would be 0."""
    weight = jnp.ones((1, 3, 3)).at[0, 0, 0].set(jnp.nan).at[0, 1, 1].set(jnp.inf)
    found = products.whole(int8.quantise({"layers": {"up": weight}})["layers"]["up"])
    assert np.isnan(found[0, :, 0]).all()
    assert not np.isfinite(found[0, 1, 1])
    np.testing.assert_allclose(found[0, :, 2], 1, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ products


@KINDS
def test_logits_are_those_of_the_weights_it_stands_for(shape, config):
    """In float64; and not those of the weights it was made from."""
    expected = [reference_model.logits(wide(narrow_of(shape)), row, dataclasses.asdict(shape)) for row in np.asarray(tokens())]
    found = logits_of(shape)(narrow_of(shape), tokens())
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)  # float32 sums, as in test_transformer.py
    assert 1e-4 < np.abs(found - logits_of(shape)(base_of(shape), tokens())).max() < 0.5


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_and_its_gradient(dtype, flipped):
    """The int8 is exact in bfloat16, so only x and the gradient that comes in are rounded; the weight gets no gradient."""
    random = np.random.default_rng(0)
    x, g = (random.normal(size=(2, 3, n)).astype(np.float32) for n in (7, 5))
    matrix = jnp.asarray(random.normal(size=(7, 5)), jnp.float32)
    weight = int8.quantise({"embed": matrix.T})["embed"] if flipped else int8.quantise({"head": matrix})["head"]
    exact = wide(weight).T if flipped else wide(weight)

    def rounded(value):
        return np.asarray(jnp.asarray(value).astype(dtype).astype(jnp.float32), np.float64)

    def loss(x, scale):
        y = products.product(dtype, x, Quantised(weight.values, scale), flipped)
        return (y * g).sum(), y

    (_, y), (dx, dscale) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, weight.scale)
    np.testing.assert_allclose(y, rounded(x) @ exact, atol=1e-5)  # float32 sums of 7 products
    scale = np.asarray(weight.scale, np.float64).reshape(-1)
    np.testing.assert_allclose(dx, rounded((g * scale).astype(np.float32)) @ (exact / scale).T, atol=1e-5)
    assert not dscale.any()


def test_a_look_up_reads_whole_rows_and_gives_the_table_no_gradient():
    table = int8.quantise({"embed": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)})["embed"]
    np.testing.assert_allclose(products.look_up(table, jnp.asarray([[5, 0, 99, -9]])), wide(table)[[[5, 0, 5, 0]]], rtol=1e-6)
    slope = jax.grad(lambda scale: products.look_up(Quantised(table.values, scale), jnp.asarray([1])).sum())(table.scale)
    assert not slope.any()


@pytest.mark.parametrize("switches", [{"remat": "layers"}, pytest.param({"scan": False}, marks=pytest.mark.full)], ids=str)
def test_scan_and_remat_change_nothing(switches):
    shapes = (dataclasses.replace(LLAMA, **switches), LLAMA)
    found, expected = (gradient_of(shape)(adapter_of(LLAMA, CONFIG), narrow_of(LLAMA)) for shape in shapes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


@functools.cache
def gradient_of(shape):
    model = transformer.build(shape)

    def loss(adapter, base):
        params = lora.attach(base, adapter, CONFIG)
        return jax.nn.log_softmax(model.logits(params, model.hidden(params, tokens()))).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.full
def test_no_program_holds_all_layers_wide():
    """Neither the forward nor the backward pass over stacked layers; of float weights, the same search finds them."""
    shape = dataclasses.replace(LLAMA, dtype="bfloat16", remat="layers")
    stacks = re.compile(rf"(?:f32|bf16)\[{shape.layers},(?:24,24|24,12|24,32|32,24)\]")
    for base, least, most in ((narrow_of(LLAMA), 0, 0), (base_of(LLAMA), 1, 99)):
        text = gradient_of(shape).lower(adapter_of(LLAMA, CONFIG), base).compile().as_text()
        assert least <= len(set(stacks.findall(text))) <= most


# ------------------------------------------------------------------------------------------------ sampling and adapters


@KINDS
def test_sampler_and_scorer_agree(shape, config):
    """Of the model itself, and with an adapter over it, which is not merged: 5e-5, float32 sums of another order at t = 0.7."""
    model, base = transformer.build(shape), narrow_of(shape)
    for params in (base, lora.attach(base, adapter_of(shape, config), config)):
        answers = generate.generate(model, params, prompts(), SPEC, jax.random.key(3), n=2)
        forced, _ = rollout.score_rollout(model, params, answers, SPEC)
        np.testing.assert_allclose(answers.logprobs, forced, atol=5e-5)
    kept = model.decode_params(params)
    layers = kept["layers"][0] if isinstance(kept["layers"], tuple) else kept["layers"]
    assert isinstance(layers["query"], products.Adapted)
    assert {leaf.dtype for leaf in (layers["query"].weight.values, kept["embed"].values)} == {jnp.dtype("int8")}
    head = kept["head"].weight if isinstance(kept["head"], products.Adapted) else kept["head"]
    assert (head.values.shape, head.scale.shape) == ((shape.width, shape.vocab_size), (1, shape.vocab_size))


@KINDS
def test_merged_is_what_was_trained(shape, config):
    base, adapter = narrow_of(shape), adapter_of(shape, config)
    merged = lora.merge(base, adapter, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
    run = logits_of(shape)
    beside = run(lora.attach(base, adapter, config), tokens())
    np.testing.assert_allclose(run(merged, tokens()), beside, rtol=1e-5, atol=2e-5)  # as of float weights in test_lora.py
    float_merged = run(lora.merge(base_of(shape), adapter, config), tokens())
    assert np.abs(float_merged - beside).max() > 1e-3  # another model


def test_the_reference_in_eight_bits_is_scored_as_such():
    """A whole float policy beside it; at a start on one base the adapter off is that base."""
    model, base, narrow = transformer.build(LLAMA), base_of(LLAMA), narrow_of(LLAMA)
    found = rollout.collect(model, {"policy": base}, {"reference": narrow}, prompts(), SPEC, jax.random.key(1))
    forced, _ = rollout.score_rollout(model, narrow, found.rollout, SPEC)
    np.testing.assert_allclose(found.ref_logprobs, forced, atol=1e-6)
    assert np.abs(found.ref_logprobs - found.logprobs).max() > 1e-4
    fresh = sharding.init_params(lora.specs(LLAMA, CONFIG), jax.random.key(1))
    params = {"policy": lora.attach(narrow, fresh, CONFIG)}
    found = rollout.experience(model, params, {"reference": narrow}, found.rollout, SPEC)
    # 1e-5: times the scale plus the adapter's zero may be one rounding, where the base alone has two.
    np.testing.assert_allclose(found.logprobs, found.ref_logprobs, atol=1e-5)


def test_adapters_of_an_ensemble_share_it():
    model, base = transformer.build(LLAMA), narrow_of(LLAMA)
    own = [adapter_of(LLAMA, CONFIG, seed) for seed in (1, 2)]

    def states(adapter):
        return model.hidden(lora.attach(base, adapter, CONFIG), tokens())

    alone = [jax.jit(states)(adapter) for adapter in own]
    np.testing.assert_allclose(jax.jit(jax.vmap(states))(members.stack(own)), np.stack(alone), atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda x: members.each(states, x))(members.stack(own)), np.stack(alone), atol=1e-5)


@jax.jit
def next_logits(params, rows, length):
    """Of the token after each prompt, as the sampler reads them."""
    model = transformer.build(LLAMA)
    weights = model.decode_params(params)
    return model.logits(weights, model.prefill(weights, rows, length, 1, 2)[0])


def train_step_of(adapter):
    update = optimizer.make(OptimizerConfig(name="adamw", learning_rate=0.01), 4, adapter)
    outputs = objective.make_outputs(transformer.build(LLAMA), adapters=CONFIG)
    return step.make_train_step(outputs, lm.loss, lm.Config(), update), step.init_state(adapter, update, jax.random.key(0))


@pytest.mark.full
def test_eight_devices_give_the_same():
    base, adapter = base_of(LLAMA), adapter_of(LLAMA, CONFIG)
    train_step, state = train_step_of(adapter)
    state, metrics = train_step(state, {"base": narrow_of(LLAMA)}, batch_of())
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        narrow = int8.quantise(jax.device_get(base), sharding.shardings(transformer.param_specs(LLAMA), mesh))
        placed = jax.device_put(adapter, sharding.shardings(lora.specs(LLAMA, CONFIG), mesh))
        train_step, spread = train_step_of(placed)
        spread, seen = train_step(spread, {"base": narrow}, sharding.shard_batch(batch_of(), mesh))
        first = next_logits(narrow, *sharding.shard_batch((prompts().tokens, prompts().length), mesh))
    for found, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(narrow_of(LLAMA)), strict=True):
        np.testing.assert_array_equal(found, expected)
    query = narrow["layers"]["query"]
    assert query.values.sharding.shard_shape(query.values.shape) == (2, 12, 12)  # each device its own part
    assert query.scale.sharding.shard_shape(query.scale.shape) == (2, 1, 12)
    np.testing.assert_allclose(first, next_logits(narrow_of(LLAMA), prompts().tokens, prompts().length), atol=2e-5)
    assert float(seen["loss/lm"]) == pytest.approx(float(metrics["loss/lm"]), rel=1e-5)
    # 1e-5: Adam's steps of 0.01 turn the last bits of a gradient into no more.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), spread.params, state.params)


# ------------------------------------------------------------------------------------------------ refusals


def test_eight_bits_are_neither_trained_nor_saved(tmp_path):
    update = optimizer.make(OptimizerConfig(), 4, base_of(LLAMA))
    with pytest.raises(ValueError, match=r"parameter policy/embed is in eight bits \(int8\) and cannot be trained"):
        step.init_state({"policy": narrow_of(LLAMA)}, update, jax.random.key(0))
    for params in (narrow_of(LLAMA), lora.attach(narrow_of(LLAMA), adapter_of(LLAMA, CONFIG), CONFIG)):
        with pytest.raises(ValueError, match=r"eight bits \(int8\) and cannot be saved"):
            pretrained.save(tmp_path / "model", params, {})
        with pytest.raises(ValueError, match=r"eight bits \(int8\) and cannot be exported"):
            hf.save(tmp_path / "hf", params, LLAMA, None)
    assert not list(tmp_path.iterdir())


def test_weights_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"layers/up \[2, 4, 8, 16\]: only matrices"):
        int8.quantise({"layers": {"up": jnp.zeros((2, 4, 8, 16))}})
