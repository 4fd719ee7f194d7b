"""The learned reward: where a score is read, its scale."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core.types import Rollout
from jaxrlhf.models.model import Model
from jaxrlhf.rewards import model

VOCABULARY, WIDTH = 11, 4


def embedding_model() -> Model:
    """A "trunk" whose state at a token is that token's embedding, so that a score tells which token it was read at."""

    def absent(*arguments):
        raise AssertionError("the reward reads hidden states only")

    return Model(
        vocab_size=VOCABULARY,
        width=WIDTH,
        max_length=32,
        init=lambda key: {"embed": jax.random.normal(key, (VOCABULARY, WIDTH))},
        hidden=lambda params, tokens, segments=None: params["embed"][tokens],
        logits=absent,
        decode_params=absent,
        prefill=absent,
        decode=absent,
        resume=absent,
        take=absent,
        put=absent,
        grow=absent,
    )


TRUNK = embedding_model()


def parameters():
    head = {"weight": jnp.array([1.0, -2.0, 0.5, 3.0]), "bias": jnp.float32(0.25)}
    return model.with_scale({"trunk": TRUNK.init(jax.random.key(0)), "head": head})


def rollout(tokens, prompt_len, response_len) -> Rollout:
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = len(tokens)
    zeros = jnp.zeros(rows, jnp.int32)
    nothing = jnp.zeros((rows, 3))
    lengths = (jnp.asarray(x, jnp.int32) for x in (prompt_len, response_len))
    return Rollout(tokens, *lengths, zeros == 0, zeros, zeros, zeros, nothing, nothing)


def expected(params, ids, pooling):
    states = np.asarray(params["trunk"]["embed"], np.float64)[list(ids)]
    state = states[-1] if pooling == "last" else states.mean(0)
    return state @ np.asarray(params["head"]["weight"], np.float64) + float(params["head"]["bias"])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("pad", [0, 2])  # 2 is the EOS too
def test_the_score_is_read_at_the_real_tokens(pooling, pad):
    rows = [[5, 6, 7, 2, pad, pad], [2, 3, 4, 5, 6, 7], [9, pad, pad, pad, pad, pad], [5, 2, 7, 8, pad, pad]]
    lengths = [(2, 2), (3, 3), (1, 0), (2, 2)]
    params = parameters()
    got = model.reward(TRUNK, pooling)(params, rollout(rows, *zip(*lengths, strict=True)))
    want = [expected(params, row[: p + r], pooling) for row, (p, r) in zip(rows, lengths, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_is_not_read(pooling):
    params, score = parameters(), model.reward(TRUNK, pooling)
    clean = rollout([[5, 6, 7, 0, 0], [3, 4, 0, 0, 0]], [2, 1], [1, 1])
    dirty = clean.replace(tokens=jnp.array([[5, 6, 7, 9, 10], [3, 4, 10, 9, 1]]))
    wider = clean.replace(tokens=jnp.pad(clean.tokens, ((0, 0), (0, 4))))
    np.testing.assert_array_equal(score(params, clean), score(params, dirty))
    np.testing.assert_allclose(score(params, clean), score(params, wider), rtol=1e-6)  # a mean may add in another order


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_normalise_sets_mean_and_deviation_and_keeps_the_order(pooling):
    tokens = jax.random.randint(jax.random.key(1), (64, 6), 0, VOCABULARY)
    sampled = rollout(tokens, np.full(64, 2), np.full(64, 4))
    score = model.reward(TRUNK, pooling)
    params = parameters()
    raw = score(params, sampled)
    for _ in range(2):  # a second time changes nothing
        params = model.normalise(params, score(params, sampled))
        scores = score(params, sampled)
        assert scores.mean() == pytest.approx(0.0, abs=1e-5)
        assert scores.std() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(scores, (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scores", [[1.0], [2.0, 2.0, 2.0], [1.0, math.nan], [1.0, math.inf]])
def test_scores_without_a_scale_are_refused(scores):
    with pytest.raises(ValueError, match="cannot normalise the reward"):
        model.normalise(parameters(), jnp.array(scores))
