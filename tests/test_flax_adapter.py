"""flax.linen and flax.nnx modules as the policy, through the same functions as our own transformer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxrlhf.algorithms import lm
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import flax_adapter, heads
from jaxrlhf.sampling import generate
from jaxrlhf.training import objective, step

VOCAB, WIDTH, CONTEXT = 13, 16, 24


class LinenPolicy(linen.Module):
    """A one-layer decoder."""

    def setup(self):
        self.embed = linen.Embed(VOCAB, WIDTH)
        self.place = linen.Embed(CONTEXT, WIDTH)
        self.attention = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=WIDTH)
        self.norm = linen.LayerNorm()

    def __call__(self, tokens):
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[1]))
        return self.norm(x + self.attention(x, mask=linen.make_causal_mask(tokens)))

    def logits(self, states):
        return self.embed.attend(states)


class NnxPolicy(nnx.Module):
    """A causal convolution: no attention, and a head of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mix = nnx.Conv(WIDTH, WIDTH, kernel_size=(5,), padding="CAUSAL", rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return x + nnx.gelu(self.mix(x))


@functools.cache
def linen_model():
    module = LinenPolicy()
    return flax_adapter.from_flax(
        hidden=lambda params, tokens: module.apply({"params": params}, tokens),
        logits=lambda params, states: module.apply({"params": params}, states, method="logits"),
        init=lambda key: module.init(key, jnp.zeros((1, CONTEXT), jnp.int32))["params"],
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=CONTEXT,
    )


@functools.cache
def nnx_model():
    graph, _ = nnx.split(nnx.eval_shape(lambda: NnxPolicy(nnx.Rngs(0))))
    return flax_adapter.from_flax(
        hidden=lambda params, tokens: nnx.merge(graph, params)(tokens),
        logits=lambda params, states: nnx.merge(graph, params).head(states),
        init=lambda key: nnx.split(NnxPolicy(nnx.Rngs(key)))[1],
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=CONTEXT,
    )


KINDS = pytest.mark.parametrize("make", [linen_model, nnx_model], ids=["linen", "nnx"])
SPEC = SamplingSpec(temperature=0.8, max_tokens=7, stop=(2,), min_tokens=2, forbidden=(0, 1))


def prompts(count: int = 6) -> Prompts:
    random = np.random.default_rng(0)
    return Prompts(
        tokens=jnp.asarray(random.integers(3, VOCAB, (count, 5), dtype=np.int32)),
        length=jnp.asarray([1, 5, 3, 2, 4, 5][:count]),
        uid=jnp.arange(count),
        row=jnp.arange(count),
    )


@KINDS
def test_sampled_logprobs_equal_teacher_forced_ones(make):
    model = make()
    params = model.init(jax.random.key(0))
    rollout = generate.generate(model, params, prompts(), SPEC, jax.random.key(1), n=2)
    states = heads.response_hidden(model.hidden(params, rollout.tokens), rollout.prompt_len, SPEC.max_tokens)
    place = np.minimum(rollout.prompt_len[:, None] + np.arange(SPEC.max_tokens), rollout.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(rollout.tokens, jnp.asarray(place), axis=1)
    logprobs, _ = heads.token_logprobs(model, params, states, tokens, SPEC)
    mask = np.arange(SPEC.max_tokens) < np.asarray(rollout.response_len)[:, None]
    np.testing.assert_allclose(np.where(mask, logprobs, 0), rollout.logprobs, atol=2e-5)
    assert (rollout.response_len >= 3).all()  # no end before two tokens were written
    assert not np.isin(np.asarray(tokens)[mask], SPEC.forbidden).any()


@KINDS
def test_prompts_padding_is_not_read(make):
    model, given = make(), prompts()
    params = model.init(jax.random.key(0))
    garbage = jnp.where(jnp.arange(5) < given.length[:, None], given.tokens, 12)
    a, b = (
        generate.generate(model, params, given.replace(tokens=tokens), SPEC, jax.random.key(1))
        for tokens in (given.tokens, garbage)
    )
    np.testing.assert_array_equal(a.tokens, b.tokens)


@KINDS
def test_the_train_step_learns(make):
    """Fine-tuning on one response to each prompt until it is the likely one."""
    model = make()
    random = np.random.default_rng(1)
    tokens = random.integers(3, VOCAB, (8, 10), dtype=np.int32)
    batch = lm.responses(jnp.asarray(tokens), jnp.full(8, 3), jnp.full(8, 7), 7)
    train = step.make_train_step(objective.make_outputs(model), lm.loss, lm.Config(), optax.adam(0.02))
    state = step.init_state(model.init(jax.random.key(0)), optax.adam(0.02), jax.random.key(1))
    losses = []
    for _ in range(60):
        state, metrics = train(state, (), batch)
        losses.append(float(metrics["loss/lm"]))
    assert losses[0] > 2.0
    assert losses[-1] < 0.5 * losses[0]
    assert train.programs() == 1


def test_packed_rows_and_long_ones_are_refused():
    model = linen_model()
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="one text a row, without segments"):
        model.hidden(params, jnp.zeros((1, 4), int), jnp.ones((1, 4), int))
    with pytest.raises(ValueError, match="25 tokens exceed max_length=24"):
        model.hidden(params, jnp.zeros((1, 25), int))
