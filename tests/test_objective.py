"""What the objective asks of a model, against the model called by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from jaxrlhf.algorithms import lm
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import objective

CONFIG = TransformerConfig(23, 8, 2, 2, 1, 4, 16, 16, dropout=0.5)
MODEL = transformer.build(CONFIG)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0))
hidden_states = jax.jit(MODEL.hidden)
SPEC = SamplingSpec(0.7, 5, (2,), min_tokens=2, forbidden=(0, 1))


def make(*args, **options):
    return jax.jit(objective.make_outputs(MODEL, *args, **options))


@struct.dataclass
class Rows:
    tokens: jax.Array
    prompt_len: jax.Array
    response_len: jax.Array
    mask: jax.Array  # its width is R


def rows(shape: tuple[int, ...] = (4,), width: int = 12) -> Rows:
    rng = np.random.default_rng(0)
    return Rows(
        jnp.asarray(rng.integers(3, 23, (*shape, width)), jnp.int32),
        jnp.asarray(rng.integers(1, 8, shape), jnp.int32),
        jnp.asarray(rng.integers(1, 6, shape), jnp.int32),
        jnp.ones((*shape, SPEC.max_tokens), bool),
    )


def by_hand(batch: Rows, spec: SamplingSpec) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs and entropies, one token at a time in float64."""
    logits = np.asarray(jax.jit(MODEL.logits)(PARAMS, hidden_states(PARAMS, batch.tokens)), np.float64)
    logp, entropy = np.zeros((4, spec.max_tokens)), np.zeros((4, spec.max_tokens))
    for b in range(4):
        for t in range(spec.max_tokens):
            at = min(int(batch.prompt_len[b]) + t, batch.tokens.shape[1] - 1)
            z = logits[b, at - 1] / spec.temperature
            z[list(spec.forbidden)] = -np.inf
            if t < spec.min_tokens:
                z[list(spec.stop)] = -np.inf
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            logp[b, t] = np.log(p[batch.tokens[b, at]])
            entropy[b, t] = -np.sum(p[p > 0] * np.log(p[p > 0]))
    return logp, entropy


def test_policy_outputs_are_those_of_the_sampling_distribution():
    batch = rows()
    params = {"policy": PARAMS, "value": {"weight": jnp.arange(8.0), "bias": jnp.float32(0.5)}}
    fn = make(SPEC, entropy=True, values=True, trunk="policy")
    outputs = fn(params, (), batch, None)
    logp, entropy = by_hand(batch, SPEC)
    hidden = np.asarray(hidden_states(PARAMS, batch.tokens), np.float64)
    np.testing.assert_allclose(outputs.logprobs, logp, atol=2e-5)  # float32 log-softmax
    np.testing.assert_allclose(outputs.entropy, entropy, atol=2e-5)
    assert outputs.scores is None
    for b in range(4):
        start = int(batch.prompt_len[b]) - 1  # the value before response token t is read from the state before it
        want = hidden[b, start : start + 5] @ np.arange(8.0) + 0.5
        np.testing.assert_allclose(outputs.values[b], want, atol=1e-4)


def test_without_a_spec_it_is_the_plain_softmax():
    batch = rows()
    sft = lm.responses(batch.tokens, batch.prompt_len, batch.response_len, 5)
    found = make()(PARAMS, (), sft, None).logprobs
    plain = SamplingSpec(1.0, 5, ())
    np.testing.assert_allclose(found, by_hand(batch, plain)[0], atol=2e-5)


def test_packed_rows_need_no_gather_and_give_the_same():
    tokens = rows().tokens
    segments = jnp.asarray(np.repeat([1, 2, 0], (5, 4, 3))[None].repeat(4, 0), jnp.int32)
    batch = lm.packed(tokens, segments)
    shifted = make(packed=True)
    gathered = make()
    np.testing.assert_array_equal(shifted(PARAMS, (), batch, None).logprobs, gathered(PARAMS, (), batch, None).logprobs)
    # the second text's tokens are scored as if it stood alone
    alone = lm.packed(tokens[:, 5:9])
    found = shifted(PARAMS, (), batch, None).logprobs[:, 5:8]
    np.testing.assert_allclose(found, shifted(PARAMS, (), alone, None).logprobs, atol=1e-5)
    with pytest.raises(ValueError, match=r"lm\.packed"):
        shifted(PARAMS, (), lm.responses(tokens, jnp.ones(4, int), jnp.ones(4, int), 3), None)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_of_sets_of_rows(pooling):
    batch = rows((2, 3))
    head = {"weight": jnp.arange(8.0), "bias": jnp.float32(0.25)}
    fn = make(logprobs=False, scores=pooling, trunk="trunk")
    found = fn({"trunk": PARAMS, "head": head}, (), batch, None).scores
    assert found.shape == (2, 3)
    hidden_of = np.asarray(hidden_states(PARAMS, batch.tokens.reshape(6, 12)), np.float64).reshape(2, 3, 12, 8)
    for b in range(2):
        for n in range(3):
            hidden = hidden_of[b, n, : int(batch.prompt_len[b, n] + batch.response_len[b, n])]
            state = hidden[-1] if pooling == "last" else hidden.mean(0)
            np.testing.assert_allclose(found[b, n], state @ np.arange(8.0) + 0.25, rtol=1e-4, atol=1e-4)


def test_dropout_only_where_asked_for():
    batch, key = rows(), jax.random.key(1)
    still, noisy = make(SPEC), make(SPEC, dropout=True)
    clean = still(PARAMS, (), batch, None).logprobs
    np.testing.assert_array_equal(still(PARAMS, (), batch, key).logprobs, clean)
    np.testing.assert_array_equal(noisy(PARAMS, (), batch, None).logprobs, clean)
    assert np.abs(noisy(PARAMS, (), batch, key).logprobs - clean).max() > 1e-3


def test_what_lies_past_the_rows_end_changes_nothing():
    batch = rows()
    end = batch.prompt_len + batch.response_len
    garbage = jnp.where(jnp.arange(12) < end[:, None], batch.tokens, 10**6)
    fn = make(SPEC)
    a, b = fn(PARAMS, (), batch, None).logprobs, fn(PARAMS, (), dataclasses.replace(batch, tokens=garbage), None).logprobs
    real = np.arange(5) < np.asarray(batch.response_len)[:, None]
    np.testing.assert_array_equal(np.asarray(a)[real], np.asarray(b)[real])
    assert np.isfinite(b).all()


def test_contradictory_options_are_refused():
    with pytest.raises(ValueError, match="scores is computed alone"):
        make(scores="last", trunk="trunk")
    with pytest.raises(ValueError, match="nothing asked for"):
        make(logprobs=False)
    with pytest.raises(ValueError, match="needs trunk"):
        make(values=True)
