"""Adapters: against the merged weights, the chain rule, the model without them, many devices, and the peft package."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_cases import CONFIG, GPT, KINDS, LLAMA, SPEC, adapter_of, base_of, batch_of, logits_of, prompts, tokens

from jaxrlhf.algorithms import lm
from jaxrlhf.core import sharding
from jaxrlhf.models import lora, products, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig


@KINDS
def test_merged_equals_unmerged(shape, config):
    """Logits, log-probs of given rows, and greedy answers; 1e-5: float32 sums of another order, logits of size 10."""
    model, base, adapter = transformer.build(shape), base_of(shape), adapter_of(shape, config)
    beside, merged = lora.attach(base, adapter, config), lora.merge(base, adapter, config)
    run = logits_of(shape)
    np.testing.assert_allclose(run(beside, tokens()), run(merged, tokens()), rtol=1e-5, atol=1e-5)
    assert np.abs(run(merged, tokens()) - run(base, tokens())).max() > 0.1  # the adapter does something
    spec = dataclasses.replace(SPEC, greedy=True)
    answers = [generate.generate(model, params, prompts(), spec, jax.random.key(0), n=2) for params in (beside, merged)]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    scored = [rollout.score_rollout(model, params, answers[0], spec)[0] for params in (beside, merged)]
    np.testing.assert_allclose(scored[0], scored[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answers[0].logprobs, scored[0], atol=1e-4)  # sampled merged, scored unmerged


@KINDS
def test_an_adapter_of_zeros_changes_no_bit(shape, config):
    fresh = sharding.init_params(lora.specs(shape, config), jax.random.key(1))
    beside = lora.attach(base_of(shape), fresh, config)
    run = logits_of(shape)
    np.testing.assert_array_equal(run(beside, tokens()), run(base_of(shape), tokens()))


def test_merge_by_hand_and_back():
    base, adapter = base_of(LLAMA), adapter_of(LLAMA, CONFIG)
    merged = lora.merge(base, adapter, CONFIG)
    for name in ("query", "down"):
        a, b = (np.asarray(adapter["layers"][name][part], np.float64) for part in "ab")
        want = np.asarray(base["layers"][name], np.float64) + 6 / 3 * np.einsum("lir,lro->lio", a, b)
        np.testing.assert_allclose(merged["layers"][name], want, rtol=1e-5, atol=1e-6)
    assert merged["embed"] is base["embed"]
    back = lora.unmerge(merged, adapter, CONFIG)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, base)


def test_scales_by_hand():
    assert lora.LoraConfig(rank=8, alpha=16).scale == 2
    assert lora.LoraConfig(rank=16, alpha=8, rank_stabilised=True).scale == 2


@KINDS
def test_gradients_are_those_through_the_merged_weight(shape, config):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW; the base gets none."""
    model, base, adapter = transformer.build(shape), base_of(shape), adapter_of(shape, config)
    weight = jax.random.normal(jax.random.key(5), (*tokens().shape, shape.vocab_size))

    def loss(params):
        return (jax.nn.log_softmax(model.logits(params, model.hidden(params, tokens()))) * weight).mean()

    through = jax.jit(jax.grad(loss))(lora.merge(base, adapter, config))
    by_base, found = jax.jit(jax.grad(lambda b, a: loss(lora.attach(b, a, config)), (0, 1)))(base, adapter)
    assert not any(np.any(x) for x in jax.tree.leaves(by_base))
    for name in (*found["layers"], *(("head",) if "head" in found else ())):
        of = [tree[name] if name == "head" else tree["layers"][name] for tree in (through, adapter, found)]
        whole, pair, own = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in of)
        for part, want in (("a", whole @ pair["b"].swapaxes(-1, -2)), ("b", pair["a"].swapaxes(-1, -2) @ whole)):
            want = config.scale * want
            np.testing.assert_allclose(own[part], want, atol=1e-5 * np.abs(want).max(), err_msg=f"{name} {part}")


def train_step_of(shape: TransformerConfig, config: lora.LoraConfig, adapter):
    update = optimizer.make(OptimizerConfig(learning_rate=0.01, epsilon=1e-3), 10, adapter)
    outputs = objective.make_outputs(transformer.build(shape), adapters=config)
    return step.make_train_step(outputs, lm.loss, lm.Config(), update), step.init_state(adapter, update, jax.random.key(0))


def held_by(tree) -> list[tuple[int, ...]]:
    """Shapes of the matrices; without ranks below, which are counts and constants."""
    return [leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]


def test_training_holds_and_moves_the_adapter_alone():
    adapter, frozen = adapter_of(LLAMA, CONFIG), {"base": base_of(LLAMA)}
    before = jax.tree.map(np.asarray, frozen)
    train_step, state = train_step_of(LLAMA, CONFIG, adapter)
    assert sorted(held_by(state.params)) == sorted(held_by(adapter))
    assert sorted(held_by(state.opt_state)) == sorted(2 * held_by(adapter))  # Adam's two moments, no more
    losses = []
    for _ in range(5):
        state, metrics = train_step(state, frozen, batch_of())
        losses.append(float(metrics["loss/lm"]))
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max() > 0, state.params, adapter)
    assert all(jax.tree.leaves(moved))


@pytest.mark.full
def test_no_product_makes_the_gradient_of_a_frozen_weight():
    """The step of the adapter has none of the products [in, rows] x [rows, out] that the step of the model has."""

    def products_of(config: lora.LoraConfig, params, frozen) -> int:
        train_step, state = train_step_of(shape, config, params)
        text = train_step.lower(state, frozen, batch_of()).compile().as_text()
        return sum(f"= f32[{size}]" in line and " dot(" in line for line in text.splitlines() for size in sizes)

    shape = dataclasses.replace(LLAMA, mlp_width=36)
    sizes = ("24,36", "36,24")  # of up, gate and down; of no activation
    base = base_of(shape)
    assert products_of(lora.NONE, base, None) == 3
    config = lora.LoraConfig(rank=3, targets=("up", "down"))
    assert products_of(config, adapter_of(shape, config), {"base": base}) == 0


@pytest.mark.full
def test_eight_devices_give_the_same():
    shape, config = LLAMA, lora.LoraConfig(rank=3, targets=("query", "down", "head"))
    adapter, base = adapter_of(shape, config), base_of(shape)
    train_step, state = train_step_of(shape, config, adapter)
    state, metrics = train_step(state, {"base": base}, batch_of())
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(adapter, sharding.shardings(lora.specs(shape, config), mesh))
        frozen = {"base": jax.device_put(base, sharding.shardings(transformer.param_specs(shape), mesh))}
        train_step, spread = train_step_of(shape, config, placed)
        spread, seen = train_step(spread, frozen, sharding.shard_batch(batch_of(), mesh))
    query = spread.params["layers"]["query"]
    assert query["a"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert query["b"].sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor")
    assert float(seen["loss/lm"]) == pytest.approx(float(metrics["loss/lm"]), rel=1e-5)
    # 1e-5: Adam's steps of 0.01 turn the last bits of a gradient into no more.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), spread.params, state.params)


# ------------------------------------------------------------------------------------------------ roles on one trunk


def test_the_reference_is_the_base_and_the_critic_an_adapter_of_its_own():
    model, base = transformer.build(LLAMA), base_of(LLAMA)
    head = {"weight": jax.random.normal(jax.random.key(4), (24,)), "bias": jnp.float32(0.5)}
    own = adapter_of(LLAMA, CONFIG, seed=7)
    params = {"policy": adapter_of(LLAMA, CONFIG), "critic": {"trunk": own, "head": head}}
    beside = roles.attach(base, params, CONFIG)
    found = rollout.collect(model, beside, {"reference": base}, prompts(), SPEC, jax.random.key(1), n=2)
    merged = {
        "policy": lora.merge(base, params["policy"], CONFIG),
        "critic": {"trunk": lora.merge(base, own, CONFIG), "head": head},
    }
    want = rollout.experience(model, merged, {"reference": base}, found.rollout, SPEC)
    np.testing.assert_array_equal(found.ref_logprobs, want.ref_logprobs)
    # 1e-4: of sums of another order, at temperature 0.7 and with a head of size 1.
    for name in ("logprobs", "values", "bootstrap"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), atol=1e-4, err_msg=name)
    assert np.abs(found.logprobs - found.ref_logprobs).max() > 0.1
    fresh = sharding.init_params(lora.specs(LLAMA, CONFIG), jax.random.key(1))
    start = roles.attach(base, params | {"policy": fresh}, CONFIG)
    found = rollout.experience(model, start, {"reference": base}, found.rollout, SPEC)
    np.testing.assert_array_equal(found.logprobs, found.ref_logprobs)  # before any training, to the bit


def test_a_step_reads_adapters_where_it_read_models():
    """Policy, values and the KL to the base: as of the merged models."""
    base, spec = base_of(LLAMA), SPEC
    head = {"weight": jnp.arange(24.0) / 24, "bias": jnp.float32(0.5)}
    params = {"policy": adapter_of(LLAMA, CONFIG), "value": head}
    batch = dataclasses.replace(batch_of(), segments=None)
    options = {"values": True, "ref_kl": True, "trunk": "policy"}
    outputs = objective.make_outputs(transformer.build(LLAMA), spec, adapters=CONFIG, **options)
    found = jax.jit(outputs)(params, {"reference": base}, batch, None)
    merged = params | {"policy": lora.merge(base, params["policy"], CONFIG)}
    plain = objective.make_outputs(transformer.build(LLAMA), spec, **options)
    want = jax.jit(plain)(merged, {"reference": base}, batch, None)
    for name in ("logprobs", "values", "ref_kl"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), atol=1e-4, err_msg=name)


def test_a_whole_model_may_stand_in_an_adapters_place():
    base, critic = base_of(LLAMA), {"trunk": base_of(LLAMA), "head": {}}
    beside = roles.attach(base, {"policy": adapter_of(LLAMA, CONFIG), "critic": critic}, CONFIG)
    assert beside["critic"]["trunk"] is critic["trunk"]
    assert isinstance(beside["policy"]["layers"]["query"], products.Adapted)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 4, "alpha": 0.0}, "alpha=0.0"),
        ({"rank": 4, "targets": ()}, "name some of query, key"),
        ({"rank": 4, "targets": ("up", "up")}, "each once"),
    ],
)
def test_impossible_settings(fields, told):
    with pytest.raises(ValueError, match=told):
        lora.LoraConfig(**fields)


def test_a_target_that_the_model_has_not_names_those_that_it_has():
    with pytest.raises(ValueError, match="'gate': this model has no such weight matrix; it has query, key, value, output, up"):
        lora.specs(GPT, lora.LoraConfig(rank=2, targets=("query", "gate")))
    with pytest.raises(ValueError, match="target 'head'"):
        lora.specs(GPT, lora.LoraConfig(rank=2, targets=("head",)))
    with pytest.raises(ValueError, match="rank=0 has no adapter"):
        lora.specs(GPT, lora.NONE)
    with pytest.raises(ValueError, match="target 'gate', which the base has not"):
        lora.attach(base_of(GPT), adapter_of(LLAMA, CONFIG), CONFIG)


@pytest.mark.full
def test_the_code_of_the_page_runs():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "lora.md").read_text(encoding="utf-8")
    found: dict = {}
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), "docs/lora.md", "exec"), found)
    hidden, base, tokens = found["hidden"], found["base"], found["tokens"]
    np.testing.assert_array_equal(found["before"], hidden(base, tokens))
    assert np.abs(hidden(found["merged"], tokens) - found["before"]).max() > 1e-3
    assert held_by(found["state"].params) == held_by(found["adapter"])
