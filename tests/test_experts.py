"""A mixture of experts against NumPy, in both forms of its products, independent of the batch, and inside the transformer."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model
import test_transformer as whole

from jaxrlhf.core import sharding
from jaxrlhf.models import experts, lora, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import optimizer

MIXTRAL = TransformerConfig(
    vocab_size=40,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=6,
    mlp_width=16,
    max_length=20,
    remat="none",
    experts=6,
    experts_per_token=2,
)
QWEN = dataclasses.replace(MIXTRAL, qk_norm=True, experts=5, experts_per_token=3, renormalise_experts=False, tied_head=False)
NARROW = dataclasses.replace(MIXTRAL, dtype="bfloat16", remat="layers")
KINDS = pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=["mixtral", "qwen"])
FEW = pytest.mark.parametrize("config", [QWEN, pytest.param(MIXTRAL, marks=pytest.mark.full)], ids=["qwen", "mixtral"])
FORMS = pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "ragged"])


def layer(config: TransformerConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Weights of one layer's experts."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.3 * random.normal(size=spec.shape[1:]).astype(np.float32))
        for name, spec in experts.specs(config).items()
    }


def states(*lead: int, seed: int = 1) -> jax.Array:
    return whole.normal((*lead, MIXTRAL.width), seed)


@functools.cache
def jitted(config: TransformerConfig, blocks: bool):
    return jax.jit(functools.partial(experts.mlp, config, blocks=blocks))


@functools.cache
def gradient(config: TransformerConfig, blocks: bool):
    """Of a sum with weights [B,T,D], for the experts' parameters and the states."""
    return jax.jit(jax.grad(lambda w, x, out: (experts.mlp(config, w, x, blocks) * out).sum(), (0, 1)))


@functools.cache
def both(blocks: bool, config: TransformerConfig = QWEN):
    """A number of what the experts make of tokens, and its gradient."""
    return jax.jit(jax.value_and_grad(lambda w, x, out: (experts.mlp(config, w, x, blocks) * out).sum(), (0, 1)))


def reference(config: TransformerConfig, weights, x) -> np.ndarray:
    wide = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    rows = np.asarray(x, np.float64).reshape(-1, config.width)
    return reference_model.experts(wide, rows, config.experts_per_token, config.renormalise_experts).reshape(np.shape(x))


# ------------------------------------------------------------------------------------------------------------ one layer


@KINDS
@FORMS
def test_what_experts_make_of_tokens_equals_numpy(config, blocks):
    weights, x = layer(config), states(3, 7)
    # 5e-6: float32 sums of at most 24 products near 1; the largest output is 5.
    np.testing.assert_allclose(jitted(config, blocks)(weights, x), reference(config, weights, x), atol=5e-6)
    geglu = dataclasses.replace(config, mlp="geglu")
    assert np.abs(jitted(geglu, blocks)(weights, x) - jitted(config, blocks)(weights, x)).max() > 1e-2


@FORMS
def test_many_tokens_fill_blocks_of_many_rows(blocks):
    weights, x = layer(MIXTRAL), states(20, 20)
    assert experts._block_size(800, 6) == 33
    np.testing.assert_allclose(jitted(MIXTRAL, blocks)(weights, x), reference(MIXTRAL, weights, x), atol=5e-6)


@FORMS
def test_experts_without_a_token_and_one_with_all(blocks):
    weights, x = layer(MIXTRAL), states(4, 30)
    # The bias of an expert: a state that all tokens share.
    x = x.at[..., 0].set(1.0)
    weights["router"] = weights["router"].at[0].set(jnp.asarray([-50.0, 50.0, -50.0, 30.0, -50.0, -50.0]))
    chosen, _ = experts.route(MIXTRAL, weights["router"], x.reshape(-1, 24))
    np.testing.assert_array_equal(chosen, np.broadcast_to([1, 3], (120, 2)))
    np.testing.assert_allclose(jitted(MIXTRAL, blocks)(weights, x), reference(MIXTRAL, weights, x), atol=5e-6)
    slope, _ = gradient(MIXTRAL, blocks)(weights, x, jnp.ones(x.shape))
    for name in ("gate", "up", "down"):
        assert set(np.flatnonzero(np.abs(slope[name]).max((1, 2)))) == {1, 3}


@KINDS
@FORMS
def test_the_gradient_is_that_of_numpy(config, blocks):
    """Differences of the float64 reference, in a random direction of each parameter and of the states."""
    weights, x, out = layer(config), states(2, 7), states(2, 7, seed=2)
    slope, back = gradient(config, blocks)(weights, x, out)
    for name, found in {**slope, "x": back}.items():
        way = np.random.default_rng(3).normal(size=found.shape)

        def loss(s, name=name, way=way):
            moved = {n: np.asarray(w, np.float64) for n, w in weights.items()}
            there = np.asarray(x, np.float64)
            if name == "x":
                there = there + s * way
            else:
                moved[name] = moved[name] + s * way
            return (reference(config, moved, there) * np.asarray(out, np.float64)).sum()

        ahead, behind = loss(1e-6), loss(-1e-6)  # float64: so small a step that no token changes its experts
        np.testing.assert_allclose((np.asarray(found) * way).sum(), (ahead - behind) / 2e-6, rtol=2e-5, atol=2e-5)


@FORMS
def test_narrow_operands_are_rounded_and_summed_wide(blocks):
    """The router's are not: a token keeps its experts and their weights."""
    weights, x, out = layer(MIXTRAL), states(2, 7), states(2, 7, seed=2)
    rounded = {name: w if name == "router" else w.astype(jnp.bfloat16) for name, w in weights.items()}
    found = jitted(NARROW, blocks)(weights, x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, jitted(NARROW, blocks)(rounded, x))
    # Operands near 1 to 2^-9 each, three products deep.
    np.testing.assert_allclose(found, reference(MIXTRAL, weights, x), atol=6e-2)
    wide, narrow = (gradient(config, blocks)(weights, x, out) for config in (MIXTRAL, NARROW))
    assert {g.dtype for g in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(a).max()), wide, narrow)
    assert experts.decode_weights(NARROW, weights)["router"] is weights["router"]
    assert experts.decode_weights(NARROW, weights)["down"].dtype == jnp.bfloat16


@FORMS
def test_equals_go_to_the_lower_numbers(blocks):
    weights, x = layer(MIXTRAL), states(2, 3)
    weights["router"] = jnp.zeros_like(weights["router"])
    chosen, weight = experts.route(MIXTRAL, weights["router"], x.reshape(-1, 24))
    np.testing.assert_array_equal(chosen, np.broadcast_to([0, 1], (6, 2)))
    np.testing.assert_array_equal(weight, 0.5)
    np.testing.assert_allclose(jitted(MIXTRAL, blocks)(weights, x), reference(MIXTRAL, weights, x), atol=5e-6)


def test_every_place_has_a_row_of_its_own_in_a_block_of_its_expert():
    placed = jax.jit(experts._places, static_argnums=(1, 2))
    for m, count, size in ((1, 3, 8), (64, 6, 8), (500, 6, 41), (40, 128, 8)):
        chosen = np.random.default_rng(m).integers(0, count, m) if m > 1 else np.array([2])
        chosen = np.minimum(chosen, 3)  # the rest have none
        places = placed(jnp.asarray(chosen, jnp.int32), count, size)
        of = np.asarray(places.of)
        assert len(set(of)) == m
        assert of.max() < places.total == size * len(places.groups) <= m + count * size
        np.testing.assert_array_equal(np.asarray(places.groups)[of // size], chosen)
        plain = placed(jnp.asarray(chosen, jnp.int32), count, 1)
        np.testing.assert_array_equal(np.asarray(plain.of), np.argsort(np.argsort(chosen, kind="stable"), kind="stable"))
        np.testing.assert_array_equal(plain.groups, np.bincount(chosen, minlength=count))
    assert placed(jnp.zeros(16_000, jnp.int32), 64, experts._block_size(16_000, 64)).total <= 1.25 * 16_000


# -------------------------------------------------------------------------------------------- independence of the batch


@FORMS
def test_a_token_does_not_know_the_others(blocks):
    weights, x = layer(MIXTRAL), states(4, 9)
    run = jitted(MIXTRAL, blocks)
    together = run(weights, x)
    # 5e-6: products of other sizes sum in another order.
    for rows in (slice(0, 1), slice(1, 3)):
        np.testing.assert_allclose(run(weights, x[rows]), together[rows], atol=5e-6)
    np.testing.assert_allclose(run(weights, x[:, 4]), together[:, 4], atol=5e-6)  # [B, D], as in decoding
    turned = run(weights, x[::-1, ::-1])[::-1, ::-1]
    np.testing.assert_allclose(turned, together, atol=5e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e38])
@FORMS
def test_garbage_in_a_row_stays_there(blocks, garbage):
    """Neither where its tokens are sorted to nor what they give reaches another row, forwards or backwards."""
    weights, x, out = layer(MIXTRAL), states(4, 9), states(4, 9, seed=2)
    spoilt = x.at[2].set(garbage)
    clean, dirty = (jitted(MIXTRAL, blocks)(weights, rows) for rows in (x, spoilt))
    others = jnp.asarray([0, 1, 3])
    np.testing.assert_allclose(dirty[others], clean[others], atol=5e-6)
    assert not np.isfinite(dirty[2]).all()
    (_, back), (_, spoilt_back) = (gradient(MIXTRAL, blocks)(weights, rows, out) for rows in (x, spoilt))
    np.testing.assert_allclose(spoilt_back[others], back[others], atol=2e-5)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.full)])
@FORMS
def test_a_stack_of_models_under_vmap(blocks, devices):
    weights, x, out = layer(QWEN), states(3, 4, 5), states(4, 5, seed=2)
    stacked = jax.tree.map(lambda w: jnp.stack([w, 1.1 * w, -w]), weights)
    shape = (2, 2, 2) if devices == 8 else (1, 1, 1)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(*shape), jax.devices()[:devices])):
        found = jax.jit(jax.vmap(functools.partial(experts.mlp, QWEN, blocks=blocks)))(stacked, x)
        slopes = jax.jit(jax.vmap(lambda w, x: gradient(QWEN, blocks)(w, x, out)))(stacked, x)
    for i in range(3):
        own = jax.tree.map(lambda w, i=i: w[i], stacked)
        np.testing.assert_allclose(found[i], reference(QWEN, own, x[i]), atol=5e-6)
        one = gradient(QWEN, blocks)(own, x[i], out)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=2e-5), slopes, one)


# ------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize(
    ("rows", "shape", "blocks"),
    [
        (8, (2, 2, 2), True),
        (8, (4, 1, 2), False),
        pytest.param(3, (2, 2, 2), True, marks=pytest.mark.full),
        pytest.param(8, (2, 2, 2), False, marks=pytest.mark.full),
        pytest.param(8, (1, 4, 2), True, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_eight_devices_give_the_same_numbers(rows, shape, blocks):
    """Each computes its own tokens with its own part of the width; a batch that does not divide is computed by all."""
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
    weights, x, out = layer(QWEN), states(rows, 5), states(rows, 5, seed=2)
    places = {n: jax.NamedSharding(mesh, sharding.partition_spec(s.axes[1:])) for n, s in experts.specs(QWEN).items()}
    with jax.set_mesh(mesh):
        there = jax.device_put(x, sharding.batch_sharding(mesh)) if rows == 8 else x
        split = jax.device_put(weights, places)
        run = jax.jit(both(blocks).__wrapped__).lower(split, there, out).compile()
        found = run(split, there, out)
    # Sums over the devices' parts in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), found, both(blocks)(weights, x, out))
    # Split over fsdp a weight is gathered, as any layer's is; its part of the width F never is, and tokens are not.
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", run.as_text()))
    weights_over_fsdp = {"24,5", "5,24,8", "5,8,24"}
    assert gathered == (weights_over_fsdp if shape[1] > 1 else set())
    assert "all-to-all" not in run.as_text()


@pytest.mark.parametrize(
    ("rows", "shape", "blocks", "at_once"),
    [
        (8, (1, 2, 2, 2), True, 1),  # a device's tokens after another's
        pytest.param(8, (4, 1, 1, 2), True, 1024, marks=pytest.mark.full),
        pytest.param(8, (1, 1, 1, 6), True, 1024, marks=pytest.mark.full, id="one expert a device"),
        pytest.param(8, (2, 1, 2, 2), False, 1, marks=pytest.mark.full),
        pytest.param(3, (2, 1, 2, 2), True, 1024, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_experts_on_devices_of_their_own_give_the_same_numbers(monkeypatch, rows, shape, blocks, at_once):
    """Tokens travel, and no expert does but over fsdp: of the gathers over `expert` none has a weight's shape."""
    monkeypatch.setattr(experts, "AT_ONCE", at_once)
    count = shape[0] * shape[1] * shape[2] * shape[3]
    rows = 12 if count == 6 else rows
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape), jax.devices()[:count])
    weights, x, out = layer(MIXTRAL), states(rows, 5), states(rows, 5, seed=2)
    x = x.at[0].set(x[0, 0])  # a whole row of tokens to the same experts: none is dropped
    names = experts.specs(MIXTRAL)
    places = {name: jax.NamedSharding(mesh, sharding.partition_spec(spec.axes[1:])) for name, spec in names.items()}
    with jax.set_mesh(mesh):
        there = jax.device_put(x, sharding.batch_sharding(mesh)) if rows % sharding.ways() == 0 else x
        split = jax.device_put(weights, places)
        assert split["gate"].addressable_shards[0].data.shape[0] == 6 // shape[3]
        compiled = jax.jit(both(blocks, MIXTRAL).__wrapped__).lower(split, there, out).compile()
        found = compiled(split, there, out)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), found, both(blocks, MIXTRAL)(weights, x, out))
    text, here = compiled.as_text(), 6 // shape[3]
    gathered = {tuple(map(int, each.split(","))) for each in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)}
    assert not any(each[0] == 6 for each in gathered if len(each) == 3), gathered  # all experts, on no device
    assert all(each[0] == here for each in gathered if len(each) == 3)
    assert "reduce-scatter(" in text or "all-reduce(" in text
    assert "all-to-all" not in text


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "ragged"])
def test_rows_of_experts_elsewhere_take_no_product(blocks):
    """Garbage among their tokens does not come through, and blocks past those of the experts that are here are not in use."""
    chosen = jnp.asarray([0, 2, 1, 2, 2, 0, 2, 2], jnp.int32)
    places = experts._places(chosen, 2, 8 if blocks else 1, True)
    if blocks:
        assert int(places.used) == 2  # one of each that is here
    else:
        np.testing.assert_array_equal(places.groups, [2, 1])
    config, weights = dataclasses.replace(MIXTRAL, experts=3), {name: w[:2] for name, w in layer(MIXTRAL).items()}
    chosen = jnp.asarray([[0, 1], [2, 1], [2, 3]]) % 3
    x, weight = states(3), jnp.full((3, 2), 0.5)
    mixed = jax.jit(functools.partial(experts._mixed, config, blocks))
    plain = mixed(weights, x, chosen, weight)
    x = x.at[2, 3].set(jnp.nan)  # whose experts are 2, elsewhere, and 0
    found = mixed(weights, x, chosen, weight)
    np.testing.assert_array_equal(found[:2], plain[:2])
    alone = mixed(weights, states(3), jnp.where(chosen == 2, 0, chosen), jnp.where(chosen == 2, 0, 0.5))
    np.testing.assert_allclose(plain, alone, atol=5e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    ("config", "shape"),
    [(QWEN, (2, 2, 2)), (NARROW, (2, 2, 2)), (MIXTRAL, (1, 2, 2, 2)), (NARROW, (2, 1, 2, 2))],
    ids=["float32", "bfloat16", "float32-apart", "bfloat16-apart"],
)
def test_the_transformer_on_eight_devices(config, shape):
    params, rows = parameters(config), whole.tokens(8, 12)
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
    places = sharding.shardings(transformer.param_specs(config), mesh)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, places)
        assert split["layers"]["experts"]["down"].sharding.spec == jax.P(None, "expert", "tensor", "fsdp")
        step = jax.jit(whole.gradient(config).__wrapped__, out_shardings=(None, places))
        value, slope = step(split, sharding.shard_batch(rows, mesh))
    tolerance = 2e-5 if config.dtype == "float32" else 3e-2  # of bfloat16: where a sum's last bit turns a rounding
    whole.assert_close(jax.device_get((value, slope)), whole.gradient(config)(params, rows), tolerance)


# ------------------------------------------------------------------------------------------------ inside the transformer


def parameters(config):
    return whole.parameters(dataclasses.replace(config, dtype="float32", remat="none"))


@KINDS
def test_logits_equal_numpy_in_float64(config):
    params, rows = parameters(config), whole.tokens(2)
    plain = dataclasses.replace(config, qk_norm=False)  # which the reference has not
    shape = dataclasses.asdict(plain)
    params = params | {"layers": {n: w for n, w in params["layers"].items() if n not in ("query_norm", "key_norm")}}
    expected = [reference_model.logits(jax.tree.map(np.float64, params), row, shape) for row in rows]
    # 2e-5: float32 sums of at most 32 numbers near 1, through two layers.
    np.testing.assert_allclose(whole.jitted(plain)(params, rows), np.stack(expected), atol=2e-5)
    if config is QWEN:  # the same code as of the other
        return
    loop = dataclasses.replace(plain, scan=False, remat="layers")
    np.testing.assert_allclose(whole.jitted(loop)(params, rows), np.stack(expected), atol=2e-5)


@FEW
def test_packed_padded_and_decoded_rows_are_the_same(config):
    params, rows = parameters(config), whole.tokens(2, 16)
    alone = np.asarray(whole.jitted(config)(params, rows))
    packed = np.concatenate([rows[0, :7], rows[1, :6], [39, 39, 39]])[None]
    segments = np.repeat([1, 2, 0], [7, 6, 3])[None]
    found = np.asarray(whole.jitted(config)(params, packed, segments))[0]
    whole.assert_close(found[:13], np.concatenate([alone[0, :7], alone[1, :6]]), 1e-5)
    padded = np.concatenate([rows[:, :9], np.full((2, 7), [-5, 10**6, 0, 1, 2, 3, 2**31 - 1])], axis=1).astype(np.int32)
    whole.assert_close(np.asarray(whole.jitted(config)(params, padded))[:, :9], alone[:, :9], 1e-5)
    responses = np.stack([rows[0, 6:11], rows[1, 3:8]])
    decoded = whole.sampler(config, 1)(params, rows[:, :6], np.array([6, 3]), responses)
    whole.assert_close(decoded, np.stack([alone[0, 5:10], alone[1, 2:7]]), 2e-5)


@pytest.mark.full
def test_narrow_decoding_takes_the_experts_of_training():
    prompts, length, responses = whole.tokens(2, 6), np.array([6, 3]), whole.tokens(4, 5, seed=9)
    params = parameters(NARROW)
    logits = np.asarray(whole.jitted(NARROW)(params, whole.rows_of(prompts, length, responses, 2)))
    forced = np.stack([logits[i, length[i // 2] - 1 :][:5] for i in range(4)])
    # A sum's last bit turns a rounding to bfloat16. Another expert would differ by 1.
    whole.assert_close(whole.sampler(NARROW, 2)(params, prompts, length, responses), forced, 3e-2)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 2, 2)], ids=str)
def test_sampling_on_eight_devices_gives_the_same_logits(shape):
    prompts, length, responses = whole.tokens(4, 6), np.array([6, 1, 4, 2]), whole.tokens(8, 5, seed=9)
    params, mesh = parameters(MIXTRAL), sharding.make_mesh(sharding.MeshConfig(*shape))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, sharding.shardings(transformer.param_specs(MIXTRAL), mesh))
        out = jax.jit(whole.sampler(MIXTRAL, 2).__wrapped__)(split, *sharding.shard_batch((prompts, length, responses), mesh))
    whole.assert_close(np.asarray(out), whole.sampler(MIXTRAL, 2)(params, prompts, length, responses), 2e-5)


def test_load_of_each_layer():
    chosen = jnp.asarray([[0, 2], [0, 1], [2, 3]])
    np.testing.assert_allclose(experts.load(chosen, 5), np.array([2, 1, 2, 1, 0]) / 6)
    np.testing.assert_allclose(experts.load(chosen, 5, jnp.asarray([True, False, True])), np.array([1, 0, 2, 1, 0]) / 4)
    params, rows = parameters(MIXTRAL), jnp.asarray(whole.tokens(3, 8))
    mask = jnp.arange(8) < jnp.asarray([8, 2, 5])[:, None]
    load = jax.jit(functools.partial(transformer.expert_load, MIXTRAL))
    found = np.asarray(load(params, rows, mask))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found, load(params, jnp.where(mask, rows, 7), mask))
    # Of the second layer's router on its own: the places of one text are a multiple of 1 / (2 * 8).
    one = np.asarray(load(params, rows[:1]))
    np.testing.assert_allclose(one * 16, np.round(one * 16), atol=1e-5)
    bent = jax.tree.map(lambda x: x, params)
    bent["layers"]["experts"]["router"] = jnp.zeros_like(params["layers"]["experts"]["router"])
    np.testing.assert_allclose(load(bent, rows, mask), np.tile([0.5, 0.5, 0, 0, 0, 0], (2, 1)))
    with pytest.raises(ValueError, match="this model has experts=0"):
        transformer.expert_load(whole.LLAMA, params, rows)


def test_adapters_go_on_attention_alone():
    with pytest.raises(ValueError, match=r"lora target 'gate': this model has no such.*it has query, key, value, output"):
        lora.specs(MIXTRAL, lora.LoraConfig(rank=2, targets=("gate",)))
    config = lora.LoraConfig(rank=2)
    specs = lora.specs(MIXTRAL, config)
    assert specs["layers"].keys() == {"query", "key", "value", "output"}
    base, rows = parameters(MIXTRAL), whole.tokens()
    adapter = jax.tree.map(lambda spec: 0.3 * whole.normal(spec.shape), specs, is_leaf=whole.is_spec)
    beside = whole.jitted(MIXTRAL)(lora.attach(base, adapter, config), rows)
    whole.assert_close(beside, whole.jitted(MIXTRAL)(lora.merge(base, adapter, config), rows), 3e-5)
    assert np.abs(beside - whole.jitted(MIXTRAL)(base, rows)).max() > 0.1


def test_muon_takes_each_expert_by_itself():
    params = {"layers": {"experts": {n: w[None] for n, w in layer(MIXTRAL).items()}}}
    labels = optimizer.label(params, "muon")
    assert set(jax.tree.leaves(labels)) == {"muon"}
    slope = jax.tree.map(lambda x: whole.normal(x.shape, 5), params)
    for dtype in ("float32", "bfloat16"):
        config = optimizer.OptimizerConfig(name="muon", learning_rate=0.02, schedule="constant", muon_dtype=dtype)
        update = optimizer.make(config, 10, params)
        found, _ = jax.jit(update.update)(slope, update.init(params), params)
        singular = np.linalg.svd(found["layers"]["experts"]["down"], compute_uv=False)  # of each matrix [F, D]
        assert singular.shape == (1, 6, 16)
        scale = 0.02 * np.sqrt(24 / 16)
        # What five Newton-Schulz steps leave of 1.
        assert (singular > 0.3 * scale).all()
        assert (singular < 1.3 * scale).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": -1}, r"experts_per_token=2 must be in 1 .. experts=-1, or both 0: no experts"),
        ({"experts": 0}, r"experts_per_token=2 must be in 1 .. experts=0"),
        ({"experts_per_token": 0}, r"experts_per_token=0 must be in 1 .. experts=6"),
        ({"experts_per_token": 7}, r"experts_per_token=7 must be in 1 .. experts=6"),
        ({"mlp": "gelu"}, r"experts=6 go with a gated MLP \(swiglu, geglu\) without mlp_bias, not with mlp='gelu'"),
        ({"mlp_bias": True}, r"experts=6 go with .* mlp_bias=True"),
    ],
)
def test_a_bad_config_is_refused_with_the_fix(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MIXTRAL, **change)
