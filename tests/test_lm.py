"""The language-model loss: which tokens it learns, over packed rows and over responses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxrlhf.algorithms import lm
from jaxrlhf.core.types import Outputs


def test_packed_learns_all_but_first_tokens_and_padding():
    segments = np.array([[1, 1, 1, 2, 2, 3], [1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
    batch = lm.packed(np.arange(24, dtype=np.int32).reshape(4, 6), segments)
    expected = [[1, 1, 0, 1, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]  # entry t is row token t + 1
    np.testing.assert_array_equal(batch.mask, np.array(expected, bool))
    np.testing.assert_array_equal(batch.prompt_len, [1, 1, 1, 1])
    np.testing.assert_array_equal(batch.response_len, [5, 3, 5, 0])


def test_packed_without_segments_learns_every_token_but_the_first():
    batch = lm.packed(np.zeros((2, 4), np.int32))
    assert batch.mask.shape == (2, 3)
    assert batch.mask.all()
    np.testing.assert_array_equal(batch.response_len, [3, 3])


def test_responses_learn_eos_though_pad_is_eos():
    eos = pad = 9
    tokens = np.array([[5, 6, 7, eos, pad, pad], [5, 7, 7, 7, 7, eos]], np.int32)
    batch = lm.responses(tokens, np.array([2, 1], np.int32), np.array([2, 5], np.int32), 5)
    learned = np.asarray(batch.tokens)[[0, 0, 1, 1, 1, 1, 1], [2, 3, 1, 2, 3, 4, 5]]  # prompt_len + t where the mask holds
    assert batch.mask.sum() == len(learned) == 7
    np.testing.assert_array_equal(batch.mask, [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert (learned == eos).sum() == 2


def batches(seed: int, rows=6, width=7):
    rng = np.random.default_rng(seed)
    length = rng.integers(0, width + 1, rows).astype(np.int32)
    batch = lm.responses(np.zeros((rows, width + 3), np.int32), np.full(rows, 3, np.int32), length, width)
    return batch, jnp.asarray(-rng.exponential(size=(rows, width)), jnp.float32)


def value(logprobs, batch):
    return lm.loss(Outputs(logprobs=logprobs), batch, lm.Config())[0]["loss/lm"]


def test_loss_is_the_mean_of_learned_tokens():
    batch, logprobs = batches(0)
    term = value(logprobs, batch)
    assert term.coefficient == 1
    assert term.sum / term.count == pytest.approx(-reference.mean(np.asarray(logprobs), np.asarray(batch.mask)), rel=1e-6)


def test_a_split_adds_up():
    batch, logprobs = batches(1)
    whole = value(logprobs, batch)
    parts = [value(logprobs[i], jax.tree.map(lambda x, i=i: x[i], batch)) for i in (slice(0, 1), slice(1, 6))]
    assert sum(part.sum for part in parts) == pytest.approx(float(whole.sum), rel=1e-6)
    assert sum(part.count for part in parts) == whole.count


@pytest.mark.parametrize("garbage", [1e6, np.nan, -np.inf])
def test_masked_places_are_not_read(garbage):
    batch, logprobs = batches(2)
    dirty = jnp.where(batch.mask, logprobs, garbage)
    assert value(dirty, batch).sum == value(logprobs, batch).sum
    gradient = jax.grad(lambda x: value(x, batch).sum)
    np.testing.assert_array_equal(gradient(dirty), gradient(logprobs))
    assert np.isfinite(gradient(dirty)).all()


def test_a_batch_without_learned_tokens_is_finite():
    batch = lm.packed(np.zeros((2, 4), np.int32), np.zeros((2, 4), np.int32))
    term = value(jnp.full((2, 3), jnp.nan), batch)
    assert (term.sum, term.count) == (0, 0)


def test_missing_outputs_are_named():
    with pytest.raises(ValueError, match=r"Outputs\.logprobs"):
        lm.loss(Outputs(), batches(3)[0], lm.Config())
