"""Policy logits, log-probs, entropies, values and scores against NumPy in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core import sharding
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig

SPEC = SamplingSpec(temperature=0.7, max_tokens=6, stop=(2, 5), min_tokens=3, forbidden=(0, 1))
MODEL = transformer.build(TransformerConfig(11, 8, 1, 2, 2, 4, 8, 16))


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def ids(shape: tuple[int, ...], top: int = 11) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).integers(0, top, shape, dtype=np.int32))


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def constrained(z: np.ndarray) -> np.ndarray:
    """[B,R,V] logits of the policy SPEC, from its definition: one place at a time, -inf where impossible."""
    z = np.array(z, np.float64) / 0.7
    z[..., [0, 1]] = -np.inf
    z[:, :3, [2, 5]] = -np.inf
    return z


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------------------ policy logits


def test_policy_logits_by_definition():
    z = normal((2, 6, 11))
    out = heads.policy_logits(z, jnp.broadcast_to(jnp.arange(6), (2, 6)), SPEC)
    expected = constrained(z)
    possible = np.isfinite(expected)
    close(np.asarray(out)[possible], expected[possible])
    assert (np.asarray(out)[~possible] == heads.IMPOSSIBLE).all()
    assert (jax.nn.softmax(out)[~possible] == 0).all()


def test_the_constraint_reads_the_position_of_each_row():
    out = heads.policy_logits(jnp.zeros((3, 11)), jnp.array([0, 2, 3]), SPEC)
    np.testing.assert_array_equal(out[:, 2] == heads.IMPOSSIBLE, [True, True, False])


def test_without_constraints_only_the_temperature_acts():
    spec = SamplingSpec(temperature=2.0, max_tokens=6, stop=(2,))
    z = normal((2, 6, 11))
    close(heads.policy_logits(z, jnp.zeros((2, 6), int), spec), z / 2)


@pytest.mark.parametrize(("field", "bad"), [("forbidden", (0, 11)), ("stop", (-1,))])
def test_ids_outside_the_vocabulary_are_refused(field, bad):
    spec = SamplingSpec(**{"temperature": 1.0, "max_tokens": 6, "stop": (2,), "min_tokens": 1, field: bad})
    with pytest.raises(ValueError, match=rf"SamplingSpec.{field}=.* outside the vocabulary 0 .. 10"):
        heads.policy_logits(jnp.zeros((1, 11)), jnp.zeros(1, int), spec)


# -------------------------------------------------------------------------------------------------- log-probs and entropy


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_logprobs_and_entropy_equal_numpy(scale):
    z, tokens = scale * normal((3, 5, 11)), ids((3, 5))
    logprobs, entropy = heads.logprobs_and_entropy(z, tokens, True)
    expected = log_softmax(np.float64(z))
    close(logprobs, np.take_along_axis(expected, np.asarray(tokens)[..., None], -1)[..., 0], 1e-5 * scale)
    close(entropy, -(np.exp(expected) * expected).sum(-1), 2e-5 * scale)
    assert heads.logprobs_and_entropy(z, tokens, False)[1] is None


def test_their_gradients_equal_those_of_the_definition():
    z, tokens, a, b = normal((3, 5, 11)), ids((3, 5)), normal((3, 5), 1), normal((3, 5), 2)

    def ours(z):
        logprobs, entropy = heads.logprobs_and_entropy(z, tokens, True)
        return (a * logprobs + b * entropy).sum()

    def definition(z):
        logprobs = jax.nn.log_softmax(z)
        entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
        return (a * jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0] + b * entropy).sum()

    close(jax.jit(jax.grad(ours))(z), jax.jit(jax.grad(definition))(z))


def test_impossible_tokens_leave_no_trace():
    """The policy over 11 tokens of which 4 are impossible is the policy over the other 7: values and gradients, no NaN."""
    z, tokens = normal((2, 3, 11)), 6 + ids((2, 3), 5)
    possible = jnp.array([3, 4, 6, 7, 8, 9, 10])

    def loss(z, tokens):
        logprobs, entropy = heads.logprobs_and_entropy(z, tokens, True)
        return (logprobs + 0.3 * entropy).sum(), (logprobs, entropy)

    def whole(z):
        return loss(heads.policy_logits(z, jnp.zeros((2, 3), int), SPEC), tokens)

    def small(z):
        return loss(z[..., possible] / SPEC.temperature, tokens - 4)

    (value, slope), (value2, slope2) = (jax.jit(jax.value_and_grad(f, has_aux=True))(z) for f in (whole, small))
    jax.tree.map(close, value, value2)
    close(slope, slope2)
    assert (slope[..., [0, 1, 2, 5]] == 0).all()


def test_the_logprob_of_an_impossible_token_is_finite():
    z = heads.policy_logits(jnp.zeros((1, 11)), jnp.zeros(1, int), SPEC)
    logprob, _ = heads.logprobs_and_entropy(z, jnp.array([0]), False)
    assert np.isfinite(logprob).all()
    assert (logprob < -1e29).all()


def test_any_integer_may_stand_where_no_loss_reads():
    z = normal((1, 4, 11))
    good = jnp.array([[3, 4, 0, 0]])
    bad = jnp.array([[3, 4, -7, 2**31 - 1]])
    mask = jnp.array([[1.0, 1.0, 0.0, 0.0]])

    def loss(z, tokens):
        return (mask * heads.logprobs_and_entropy(z, tokens, False)[0]).sum()

    for f in (loss, jax.grad(loss)):
        np.testing.assert_array_equal(f(z, good), f(z, bad))


@pytest.mark.parametrize("block", [0, 1, 3, 4, 7, 99])
def test_blocks_change_nothing(block):
    """Whole logits at once and a block of positions at a time give the same values and the same gradients."""
    params, hidden, tokens = MODEL.init(jax.random.key(0)), normal((2, 7, 8)), ids((2, 7))
    weights = normal((2, 7), 1), normal((2, 7), 2)

    def loss(params, hidden, run):
        logprobs, entropy = run(params, hidden)
        return (weights[0] * logprobs + weights[1] * entropy).sum(), (logprobs, entropy)

    def whole(params, hidden):
        position = jnp.broadcast_to(jnp.arange(7), (2, 7))
        return heads.logprobs_and_entropy(heads.policy_logits(MODEL.logits(params, hidden), position, SPEC), tokens, True)

    def blocks(params, hidden):
        return heads.token_logprobs(MODEL, params, hidden, tokens, SPEC, True, block)

    slope = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    jax.tree.map(functools.partial(close, tolerance=1e-5), slope(params, hidden, whole), slope(params, hidden, blocks))


def test_large_batches_are_split_by_themselves_and_never_hold_all_logits():
    config = TransformerConfig(4096, 8, 1, 2, 2, 4, 8, 64)
    model = transformer.build(config)
    params, hidden, tokens = jax.eval_shape(model.init, jax.random.key(0)), normal((32, 63, 8)), ids((32, 63))

    def loss(params):
        return heads.token_logprobs(model, params, hidden, tokens)[0].sum()

    memory = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 32 * 63 * 4096 * 4


def test_without_a_spec_it_is_the_plain_softmax():
    params, hidden, tokens = MODEL.init(jax.random.key(0)), normal((2, 7, 8)), ids((2, 7))
    logprobs, entropy = heads.token_logprobs(MODEL, params, hidden, tokens)
    assert entropy is None
    close(logprobs, heads.logprobs_and_entropy(MODEL.logits(params, hidden), tokens)[0])


# -------------------------------------------------------------------------------------------------- states, values, scores


def test_the_state_before_each_response_token():
    hidden = jnp.asarray(np.arange(2 * 6 * 1, dtype=np.float32).reshape(2, 6, 1))
    out = heads.response_hidden(hidden, jnp.array([2, 4]), 3)
    np.testing.assert_array_equal(out[..., 0], [[1, 2, 3], [9, 10, 11]])
    # Past the row's end: its last state. Before its beginning (no prompt): the first.
    np.testing.assert_array_equal(heads.response_hidden(hidden, jnp.array([5, 0]), 3)[..., 0], [[4, 5, 5], [6, 6, 7]])


def test_values_are_a_linear_function_of_each_state():
    head, hidden = {"weight": normal((8,)), "bias": jnp.float32(0.5)}, normal((2, 3, 8), 1)
    close(heads.values(head, hidden), np.asarray(hidden) @ np.asarray(head["weight"]) + 0.5)


def test_score_reads_real_tokens_only():
    head, hidden = {"weight": normal((8,)), "bias": jnp.float32(0.5)}, np.array(normal((2, 5, 8), 1))
    length = jnp.array([3, 5])
    line = hidden @ np.asarray(head["weight"]) + 0.5
    hidden[0, 3:] = np.nan
    close(heads.score(head, jnp.asarray(hidden), length, "last"), [line[0, 2], line[1, 4]])
    close(heads.score(head, jnp.asarray(hidden), length, "mean"), [line[0, :3].mean(), line[1].mean()])
    for pooling in ("last", "mean"):
        slope = jax.grad(lambda h, pooling=pooling: heads.score(head, h, length, pooling).sum())(jnp.asarray(hidden))
        assert (slope[0, 3:] == 0).all()
    with pytest.raises(ValueError, match="pooling='max' must be last or mean"):
        heads.score(head, jnp.asarray(hidden), length, "max")


def test_how_heads_start():
    value = sharding.init_params(heads.value_specs(400), jax.random.key(0))
    score = sharding.init_params(heads.score_specs(400), jax.random.key(0))
    assert not value["weight"].any()
    assert value["bias"] == score["bias"] == 0
    assert value["weight"].shape == score["weight"].shape == (400,)
    np.testing.assert_allclose(score["weight"].std() * np.sqrt(401), 1.0, atol=0.1)  # 400 draws: 3.5 % at one sigma
