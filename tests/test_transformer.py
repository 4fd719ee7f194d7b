"""The transformer against NumPy, against itself by other routes, and split over devices."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model

from jaxrlhf.core import sharding
from jaxrlhf.models import attention, heads, layers, transformer
from jaxrlhf.models.config import TransformerConfig

LLAMA = TransformerConfig(
    vocab_size=40, width=24, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=32, max_length=20, remat="none"
)
GPT = dataclasses.replace(LLAMA, kv_heads=4, norm="layer", positions="learned", mlp="gelu", tied_head=False, norm_epsilon=1e-5)
KINDS = pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt"])
NARROW = dataclasses.replace(LLAMA, dtype="bfloat16", remat="layers")


@functools.cache
def parameters(config: TransformerConfig):
    """Random weights, every norm's scale and bias moved off 1 and 0, so that leaving one out shows."""
    random = np.random.default_rng(0)

    def one(path, spec):
        drawn = random.normal(size=spec.shape).astype(np.float32)
        if path[-1].key in ("scale", "bias"):
            return jnp.asarray((path[-1].key == "scale") + 0.05 * drawn)
        return jnp.asarray(drawn * 0.2)

    return jax.tree_util.tree_map_with_path(one, transformer.param_specs(config), is_leaf=is_spec)


def is_spec(x) -> bool:
    return isinstance(x, sharding.ParamSpec)


def tokens(rows: int = 3, width: int = 12, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, LLAMA.vocab_size, (rows, width), dtype=np.int32)


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@functools.cache
def jitted(config: TransformerConfig):
    model = transformer.build(config)
    return jax.jit(lambda params, rows, segments=None: model.logits(params, model.hidden(params, rows, segments)))


@functools.cache
def gradient(config: TransformerConfig):
    """((loss, logits), gradient) of the mean log-prob of the next token."""
    model = transformer.build(config)

    def loss(params, rows):
        logits = model.logits(params, model.hidden(params, rows))
        return -heads.logprobs_and_entropy(logits[:, :-1], rows[:, 1:])[0].mean(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance), a, b)


# ---------------------------------------------------------------------------------------------------- the whole forward pass


@KINDS
def test_logits_equal_numpy_in_float64(config):
    params, rows = parameters(config), tokens()
    wide = jax.tree.map(np.float64, params)
    expected = [reference_model.logits(wide, row, dataclasses.asdict(config)) for row in rows]
    # 2e-5: float32 sums of at most 32 numbers near 1, through two layers; the logits reach 3.
    np.testing.assert_allclose(jitted(config)(params, rows), np.stack(expected), atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_equal_repeated_ones(kv_heads):
    q, k, v = normal((2, 7, 4, 6)), normal((2, 7, kv_heads, 6), 1), normal((2, 7, kv_heads, 6), 2)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0]] * 2)
    repeated = [np.repeat(x, 4 // kv_heads, axis=2) for x in (k, v)]
    ours = jax.jit(attention.attention)
    for seg in (None, segments):
        assert_close(ours(q, k, v, seg), ours(q, *repeated, seg), 1e-6)
        assert_close(ours(q, k, v, seg), plain_attention(q, k, v, seg), 1e-6)


def test_a_window_a_scale_and_a_cap_by_their_definition():
    """And their gradient, with masked places in the same row as those near the cap."""
    q, k, v, out = normal((1, 7, 2, 6)), normal((1, 7, 1, 6), 1), normal((1, 7, 1, 6), 2), normal((1, 7, 2, 6), 3)
    place = np.arange(7)
    seen = (place[:, None] >= place) & (place[:, None] - place < 3)

    def ours(q, k, v):
        return (attention.attention(q, k, v, None, "xla", jnp.int32(3), 0.7, 1.5) * out).sum()

    def plain(q, k, v):
        scores = 1.5 * jnp.tanh(0.7 * jnp.einsum("bthe,bse->bhts", q, k[:, :, 0]) / 1.5)
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return (jnp.einsum("bhts,bse->bthe", weights, v[:, :, 0]) * out).sum()

    assert_close(*(jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (ours, plain)), 2e-6)


@jax.jit
def plain_attention(q, k, v, segments):
    """jax's own, with the mask spelled out."""
    visible = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None], implementation="xla")


def test_the_gradient_of_attention_is_that_of_its_definition():
    q, k, v, out = normal((2, 7, 4, 6)), normal((2, 7, 2, 6), 1), normal((2, 7, 2, 6), 2), normal((2, 7, 4, 6), 3)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0]] * 2)

    def ours(q, k, v):
        return (attention.attention(q, k, v, segments) * out).sum()

    def plain(q, k, v):
        return (plain_attention(q, k, v, segments) * out).sum()

    slopes = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (ours, plain)]
    assert_close(*slopes, 2e-6)


def test_attention_that_cannot_be_done_is_refused():
    q = normal((1, 4, 2, 6))
    with pytest.raises(ValueError, match="'flash' is not known: choose xla or cudnn"):
        attention.attention(q, q, q, implementation="flash")
    with pytest.raises(ValueError, match="cannot keep packed segments apart"):
        attention.attention(q, q, q, jnp.asarray([[1, 1, 1, 1]]), implementation="cudnn")
    with pytest.raises(ValueError, match="'cudnn' knows no window, scale or cap: choose xla"):
        attention.attention(q, q, q, implementation="cudnn", window=2)
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            attention.attention(q, q, q, implementation="cudnn")


@pytest.mark.gpu
def test_cudnn_equals_xla():
    q, k, v = normal((3, 2, 64, 4, 64))
    assert_close(attention.attention(q, k, v, implementation="cudnn"), attention.attention(q, k, v), 2e-2)


@KINDS
def test_no_state_depends_on_a_later_token(config):
    model, params, rows = transformer.build(config), parameters(config), tokens(1, 8)
    onehot = np.eye(config.vocab_size, dtype=np.float32)[rows[0]]

    def states(onehot):  # the embeddings as a differentiable function of the tokens
        table = jnp.concatenate([params["embed"], onehot @ params["embed"]])
        return model.hidden(params | {"embed": table}, config.vocab_size + jnp.arange(8)[None])[0].sum(-1)

    reach = np.abs(jax.jit(jax.jacobian(states))(onehot)).max(-1)  # [state, token]
    assert (np.triu(reach, 1) == 0).all()
    assert (np.diagonal(reach) > 0).all()
    assert (reach[-1] > 0).all()


@KINDS
def test_garbage_after_the_end_changes_nothing(config):
    params, rows = parameters(config), tokens()
    garbage = np.concatenate([rows[:, :9], np.full((3, 3), [-5, 10**6, 2**31 - 1], np.int32)], axis=1)
    np.testing.assert_array_equal(jitted(config)(params, rows)[:, :9], jitted(config)(params, garbage)[:, :9])
    longer = np.pad(rows, ((0, 0), (0, 5)), constant_values=7)
    assert_close(jitted(config)(params, longer)[:, :12], jitted(config)(params, rows), 1e-5)


@KINDS
def test_packed_texts_do_not_see_each_other(config):
    texts = [tokens(1, width, seed)[0] for seed, width in ((3, 5), (4, 1), (5, 7))]
    other = tokens(1, 17, 6)[0]
    rows = np.stack([np.concatenate([*texts, np.full(4, 39, np.int32)]), other])
    segments = np.stack([np.repeat([1, 2, 3, 0], [5, 1, 7, 4]), np.ones(17, int)])
    out = np.asarray(jitted(config)(parameters(config), rows, segments))
    # Padded to one width, which changes nothing (the test above), so that one program reads them all.
    alone = np.stack([np.pad(text, (0, 17 - len(text))) for text in (*texts, other)])
    alone = np.asarray(jitted(config)(parameters(config), alone))
    apart = np.concatenate([alone[i, : len(text)] for i, text in enumerate(texts)])
    assert_close(out[0, :13], apart, 1e-5)
    assert_close(out[1], alone[3], 1e-5)


def test_positions_start_anew_with_each_text():
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(transformer.segment_positions(segments), expected)


# ---------------------------------------------------------------------------------------------- sampling with the cache


@functools.cache
def sampler(config, n):
    """Logits that predict each response token, from prefill and decode."""
    model = transformer.build(config)

    @jax.jit
    def run(params, prompts, length, responses):
        weights = model.decode_params(params)
        first, cache = model.prefill(weights, prompts, length, n, responses.shape[1])

        def step(cache, xs):
            state, cache = model.decode(weights, cache, *xs)
            return cache, state

        _, states = jax.lax.scan(step, cache, (responses.T[:-1], jnp.arange(responses.shape[1] - 1)))
        states = jnp.concatenate([jnp.repeat(first, n, axis=0)[None], states])
        return model.logits(weights, states).swapaxes(0, 1)

    return run


def rows_of(prompts, length, responses, n):
    """Each prompt, at once its response, then padding."""
    rows = np.full((responses.shape[0], prompts.shape[1] + responses.shape[1]), 39)
    for i, response in enumerate(responses):
        prompt = prompts[i // n, : length[i // n]]
        rows[i, : len(prompt) + len(response)] = [*prompt, *response]
    return rows


@pytest.mark.parametrize(("config", "n"), [(LLAMA, 3), (LLAMA, 1), (GPT, 2), (NARROW, 3)], ids=str)
def test_sampled_logits_equal_teacher_forced_ones(config, n):
    prompts, length = tokens(4, 6), np.array([6, 1, 4, 2])
    responses, params = tokens(4 * n, 5, seed=9), parameters(dataclasses.replace(config, dtype="float32", remat="none"))
    prompts = np.where(np.arange(6) < length[:, None], prompts, 10**6)  # what stands after a prompt is never read
    logits = np.asarray(jitted(config)(params, rows_of(prompts, length, responses, n)))
    forced = np.stack([logits[i, length[i // n] - 1 :][:5] for i in range(4 * n)])
    # 2e-5: float32 sums in another order. Narrow operands differ where a sum's last bit turns a rounding to bfloat16.
    tolerance = 2e-5 if config.dtype == "float32" else 3e-2
    assert_close(sampler(config, n)(params, prompts, length, responses), forced, tolerance)


def test_prefill_and_decode_read_the_trained_parameters_too():
    prompts, length, responses = map(jnp.asarray, (tokens(2, 6), np.array([6, 3]), tokens(2, 4, seed=9)))
    model, params = transformer.build(LLAMA), parameters(LLAMA)

    @jax.jit
    def two_tokens(weights):
        state, cache = model.prefill(weights, prompts, length, 1, 4)
        return state, model.decode(weights, cache, responses[:, 0], 0)

    assert_close(two_tokens(params), two_tokens(jax.jit(model.decode_params)(params)), 1e-6)


def test_rows_longer_than_the_context_are_refused():
    model, params = transformer.build(LLAMA), parameters(LLAMA)
    with pytest.raises(ValueError, match="21 tokens exceed max_length=20"):
        model.hidden(params, jnp.asarray(tokens(1, 21)))
    with pytest.raises(ValueError, match="21 tokens exceed max_length=20"):
        model.prefill(params, jnp.asarray(tokens(1, 8)), jnp.asarray([8]), 1, 13)


# ------------------------------------------------------------------------------------- switches that are a matter of speed


@pytest.mark.parametrize(
    "switches",
    [
        {"remat": "layers"},
        pytest.param({"remat": "dots"}, marks=pytest.mark.full),
        pytest.param({"remat": "attention"}, marks=pytest.mark.full),
        pytest.param({"scan": False}, marks=pytest.mark.full),
        {"scan": False, "remat": "layers"},
    ],
    ids=str,
)
def test_scan_and_remat_change_nothing(switches):
    results = [gradient(c)(parameters(LLAMA), tokens()) for c in (LLAMA, dataclasses.replace(LLAMA, **switches))]
    assert_close(*results, 2e-6)  # float32 sums in another order


@pytest.mark.full
@pytest.mark.parametrize("experts", [0, 4])
def test_what_is_stored_follows_the_choice(experts):
    """Bytes of temporaries of a gradient, of a dense model and of a mixture; loss and gradient are the same."""
    shape = TransformerConfig(40, 32, 3, 4, 4, 8, 96, 64, experts=experts, experts_per_token=min(experts, 2))
    stored, found = [], []
    params, rows = transformer.build(shape).init(jax.random.key(0)), jnp.asarray(tokens(4, 64))
    for remat in ("none", "dots", "attention", "layers"):
        model = transformer.build(dataclasses.replace(shape, remat=remat))

        def loss(params, model=model):
            return jnp.square(model.logits(params, model.hidden(params, rows))).mean()

        program = jax.jit(jax.value_and_grad(loss))
        compiled = program.lower(params).compile()
        stored.append(compiled.memory_analysis().temp_size_in_bytes)
        found.append(jax.device_get(compiled(params)))
    assert stored == sorted(stored, reverse=True)
    assert stored[0] > 1.3 * stored[1] > 1.3 * 1.2 * stored[2]
    assert stored[2] > stored[3]
    for loss, slope in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-6)
        assert_close(slope, found[0][1], 1e-5)


def test_a_model_saved_before_remat_had_names_is_read():
    assert dataclasses.replace(LLAMA, remat=True).remat == "layers"
    assert dataclasses.replace(LLAMA, remat=False).remat == "none"
    with pytest.raises(ValueError, match="remat='full' must be one of none, dots, attention, layers"):
        dataclasses.replace(LLAMA, remat="full")


def test_narrow_products_are_near_wide_ones_and_their_gradients_too():
    ((loss, _), slope), ((loss2, _), slope2) = (gradient(c)(parameters(LLAMA), tokens()) for c in (LLAMA, NARROW))
    assert loss != loss2
    # bfloat16 keeps 8 bits: 2^-9 = 0.2 % for each operand.
    np.testing.assert_allclose(loss2, loss, rtol=5e-3)
    cosine = jax.tree.map(lambda a, b: np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), *jax.device_get((slope, slope2)))
    assert min(jax.tree.leaves(cosine)) > 0.995


def test_gradients_equal_finite_differences():
    model, params, rows = transformer.build(LLAMA), parameters(LLAMA), jnp.asarray(tokens())

    @jax.jit
    def loss(params):
        return jnp.square(model.logits(params, model.hidden(params, rows))).mean()

    slope = jax.jit(jax.grad(loss))(params)
    for seed in range(3):
        leaves, tree = jax.tree.flatten(params)
        random = np.random.default_rng(seed)
        way = tree.unflatten([random.normal(size=x.shape).astype(np.float32) for x in leaves])
        along = sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(a * b), jax.device_get(slope), way)))
        ahead, behind = (loss(jax.tree.map(lambda p, w, s=s: np.asarray(p) + s * 1e-3 * w, params, way)) for s in (1, -1))
        # Differences of two float32 losses near 1, over a step of 1e-3.
        np.testing.assert_allclose((ahead - behind) / 2e-3, along, rtol=2e-2, atol=2e-3)


def test_dropout_only_where_a_key_is_given_and_right_on_average():
    config = dataclasses.replace(LLAMA, dropout=0.5, layers=1)
    model, params, rows = transformer.build(config), parameters(dataclasses.replace(LLAMA, layers=1)), jnp.asarray(tokens(1, 4))
    dropped = jax.jit(lambda key: model.hidden(params, rows, dropout_key=key))
    none, a, b = (np.asarray(dropped(key)) for key in (None, jax.random.key(0), jax.random.key(1)))
    assert (a != none).any()
    assert (a != b).any()
    off = transformer.build(dataclasses.replace(config, dropout=0.0))
    assert_close(jax.jit(lambda key: off.hidden(params, rows, dropout_key=key))(jax.random.key(0)), none, 1e-6)
    branch = np.asarray(layers.dropout(config, jax.random.key(2), jnp.ones(20_000)))
    np.testing.assert_allclose(branch.mean(), 1.0, atol=0.03)  # kept values are scaled up: the mean stays
    assert set(np.unique(branch)) == {0.0, 2.0}


def test_training_compiles_narrow_products_only():
    """Every weight product of the train step keeps bfloat16 operands: none was widened, which on a CPU costs four times."""
    assert_narrow(gradient(NARROW).lower(parameters(LLAMA), tokens()).compile().as_text(), 20)


def assert_narrow(text, least):
    """All products without a batch axis in this compiled program have bfloat16 operands, and there are at least so many."""
    if jax.default_backend() != "cpu":
        pytest.skip("how XLA's CPU backend treats narrow operands")
    made = dict(line.strip().removeprefix("ROOT ").split(" = ", 1) for line in text.splitlines() if " = " in line)
    products = [value for value in made.values() if " dot(" in value and "batch_dims" not in value]
    assert len(products) >= least
    for value in products:
        operands = value.split(" dot(")[1].split(")")[0].split(", ")
        assert all(made[name].startswith("bf16") for name in operands), value


# ------------------------------------------------------------------------------------------------------ specs and meshes


def test_parameters_are_what_the_specs_declare():
    for config in (LLAMA, GPT):
        specs, params = transformer.param_specs(config), jax.eval_shape(transformer.build(config).init, jax.random.key(0))
        assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda s: s.shape, specs, is_leaf=is_spec)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert "head" not in transformer.param_specs(LLAMA)
    assert "positions" not in transformer.param_specs(LLAMA)
    assert "gate" not in transformer.param_specs(GPT)["layers"]


def test_initial_logits_are_small_so_that_the_first_loss_is_near_that_of_a_uniform_guess():
    logits = np.asarray(jitted(LLAMA)(jax.jit(transformer.build(LLAMA).init)(jax.random.key(0)), tokens()))
    assert 0.03 < logits.std() < 0.3  # half the variance is what the loss lies above log V


def test_equal_configs_give_one_model():
    assert transformer.build(LLAMA) is transformer.build(TransformerConfig(**dataclasses.asdict(LLAMA)))
    assert transformer.build(LLAMA) is not transformer.build(GPT)


@pytest.mark.parametrize(
    ("shape", "config"),
    [((2, 2, 2), LLAMA), pytest.param((1, 4, 2), NARROW, marks=pytest.mark.full)],
    ids=["float32", "bfloat16"],
)
def test_eight_devices_give_the_same_numbers(shape, config):
    params, rows = parameters(LLAMA), tokens(8, 12)
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape))
    places = sharding.shardings(transformer.param_specs(config), mesh)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, places)
        assert split["layers"]["gate"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
        assert split["embed"].sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
        step = jax.jit(gradient(config).__wrapped__, out_shardings=(None, places))
        step = step.lower(split, sharding.shard_batch(rows, mesh)).compile()
        value, slope = step(split, sharding.shard_batch(rows, mesh))
    if config.dtype == "bfloat16":
        assert_narrow(step.as_text(), 20)
    # Rounding to bfloat16 turns on the last bit of a sum, whose order the split changes.
    tolerance = 2e-5 if config.dtype == "float32" else 3e-2
    assert_close(jax.device_get((value, slope)), gradient(config)(params, rows), tolerance)
    assert jax.tree.map(lambda x: x.sharding, slope) == places


def test_sampling_on_eight_devices_gives_the_same_logits():
    prompts, length, responses = tokens(4, 6), np.array([6, 1, 4, 2]), tokens(8, 5, seed=9)
    params, mesh = parameters(GPT), sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, sharding.shardings(transformer.param_specs(GPT), mesh))
        there = sharding.shard_batch((prompts, length, responses), mesh)
        out = jax.jit(sampler(GPT, 2).__wrapped__)(split, *there)
    assert_close(np.asarray(out), sampler(GPT, 2)(params, prompts, length, responses), 2e-5)


@pytest.mark.full
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["tied", "head"])
def test_a_vocabulary_that_the_mesh_does_not_divide_is_whole_on_each_device_and_told(config):
    """39 ids over two devices: the same numbers, and no id more."""
    config = dataclasses.replace(config, vocab_size=39)
    specs, mesh = transformer.param_specs(config), sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    params, rows = parameters(config), tokens(8, 12) % 39
    places = sharding.shardings(specs, mesh)
    assert places["embed"].spec == jax.sharding.PartitionSpec(None, "fsdp")
    told = ["embed: axis 'vocab' of size 39 is not split, since 2 do not divide it"]
    assert sharding.undivided(specs, mesh) == told + [told[0].replace("embed", "head")] * ("head" in specs)
    assert not sharding.undivided(transformer.param_specs(LLAMA), mesh)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, places)
        found = jax.jit(gradient(config).__wrapped__)(split, sharding.shard_batch(rows, mesh))
    assert_close(jax.device_get(found), gradient(config)(params, rows), 2e-5)


def test_a_mesh_that_does_not_divide_the_heads_is_refused():
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 8))
    specs = transformer.param_specs(dataclasses.replace(LLAMA, vocab_size=64, heads=6, kv_heads=6))
    with pytest.raises(ValueError, match=r"layers/query.*'heads' of size 36 cannot be split 8 ways"):
        sharding.shardings({"layers": {"query": specs["layers"]["query"]}}, mesh)


# ---------------------------------------------------------------------------------------------------------- the configuration


def test_a_config_survives_json():
    assert TransformerConfig(**json.loads(json.dumps(dataclasses.asdict(GPT)))) == GPT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
        ({"head_width": 5}, "head_width=5 must be even"),
        ({"dropout": 0.999}, r"dropout=0.999 must be in \[0, 0.998\)"),
        ({"norm": "batch"}, "norm='batch' must be one of rms, layer"),
        ({"positions": "none"}, "positions='none' must be one of rope, learned"),
        ({"rotary_width": 3}, "rotary_width=3 must be even and at most head_width=6"),
        ({"rotary_width": 8}, "rotary_width=8 must be even and at most head_width=6"),
        ({"windows": (4,)}, r"windows=\(4,\) must be empty or hold layers=2 numbers"),
        ({"windows": (4, -1)}, r"windows=\(4, -1\) must be empty or hold layers=2 numbers, 0 or more"),
        ({"attention_cap": 0.0}, "attention_cap=0.0 must be positive"),
        ({"rope_scaling": "llama3", "rope_low": 4.0}, "rope_low=4.0 must be positive and below rope_high=4.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be one of none, linear, llama3"),
        ({"norm": "layer", "norm_plus_one": True}, "norm_plus_one=True goes with norm='rms' only"),
        ({"mlp": "relu"}, "mlp='relu' must be one of swiglu, gelu"),
        ({"dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16"),
    ],
)
def test_a_bad_config_is_refused_with_the_fix(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)
