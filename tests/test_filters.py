"""Filters against a sort in float64, and the law of the draw."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models.heads import IMPOSSIBLE
from jaxrlhf.sampling import filters, nucleus

SORTS = re.compile(r"\b(sort|top_?k)\b", re.IGNORECASE)  # operations of StableHLO and HLO, not `indices_are_sorted`
LIMIT = 1e-5  # masses nearer to top_p than this are decided by the rounding of float32 sums


def spec(**changes) -> SamplingSpec:
    return SamplingSpec(**{"temperature": 1.0, "max_tokens": 4, "stop": (), **changes})


def kept(logits, **changes) -> np.ndarray:
    return np.asarray(jax.jit(filters.apply, static_argnums=1)(jnp.asarray(logits, jnp.float32), spec(**changes))) > IMPOSSIBLE


def reference(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Kept tokens of one row, by sorting in float64, ties at the border kept; and the places that rounding may decide."""
    logits = logits.astype(np.float64)
    if top_k:
        logits = np.where(logits >= np.sort(logits)[::-1][min(top_k, len(logits)) - 1], logits, -np.inf)
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    above = np.array([probability[probability > p].sum() for p in probability])  # mass of all strictly more probable tokens
    keep = np.isfinite(logits)
    unsure = np.zeros(len(logits), bool)
    if top_p < 1:
        keep &= above < top_p
        unsure |= np.abs(above - top_p) < LIMIT
    if min_p:
        keep &= probability >= min_p * probability.max()
        unsure |= np.abs(probability / probability.max() - min_p) < LIMIT
    return keep, unsure


grid = st.integers(-60, 60).map(lambda i: i / 4)  # equal logits are common and unequal ones are apart


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    logits=st.lists(grid, min_size=11, max_size=11),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_filters_equal_a_sort(logits, top_k, top_p, min_p):
    row = np.array(logits)
    want, unsure = reference(row, top_k, top_p, min_p)
    got = kept(row[None], top_k=top_k, top_p=top_p, min_p=min_p)[0]
    np.testing.assert_array_equal(got | unsure, want | unsure)
    assert got[row.argmax()]


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 30.0], ids=["flat", "usual", "peaked", "almost certain"])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.99])
def test_top_p_equals_a_sort_on_a_vocabulary(scale, top_p):
    rows = np.random.default_rng(0).normal(size=(6, 3000)).astype(np.float32) * scale
    got = kept(rows, top_p=top_p)
    for i, row in enumerate(rows):
        want, unsure = reference(row, top_p=top_p)
        np.testing.assert_array_equal(got[i] | unsure, want | unsure)
        assert unsure.sum() <= 3


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all"])
def test_filters_equal_transformers_without_ties(name):
    """What transformers' warpers do to a row, restated: they need torch, which is not here.

    Source: transformers 5.17 logits_process.py: top-k removes `scores < topk[-1]`; top-p removes the ascending cumulative
    softmax <= 1 - p but for the last; min-p removes `p < min_p * max p`; each on what the one before left.
    """
    row = np.random.default_rng(1).permutation(np.linspace(-9, 3, 500)).astype(np.float32)
    settings = {"top_k": 70, "top_p": 0.8, "min_p": 0.3}
    settings = settings if name == "all" else {name: settings[name]}
    scores = row.astype(np.float64)
    if "top_k" in settings:
        scores[scores < np.sort(scores)[-70]] = -np.inf
    if "top_p" in settings:
        order = np.argsort(scores)
        remove = np.cumsum(np.exp(scores[order]) / np.exp(scores).sum()) <= 1 - 0.8
        remove[-1] = False
        scores[order[remove]] = -np.inf
    if "min_p" in settings:
        scores[np.exp(scores) < 0.3 * np.exp(scores.max())] = -np.inf
    got = kept(row[None], **settings)[0]
    np.testing.assert_array_equal(got, np.isfinite(scores))
    assert 1 < got.sum() < 500


def test_ties_at_the_border_are_all_kept():
    row = np.array([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept(row, top_k=2)[0].tolist() == [True, False, True, True, True, False]
    assert kept(row, top_p=0.5)[0].tolist() == [True, False, True, True, True, False]  # 3.0 alone holds .47
    assert kept(np.zeros((1, 6)), top_p=0.1).all()  # a quite flat row is one tie
    assert kept(np.array([[0.0, -0.0, -1.0]]), top_k=1)[0].tolist() == [True, True, False]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_top_k_orders_logits_of_any_sign_and_size(sign):
    row = sign * np.float32([1e-38, 1e20, 2.5, 0.1, 7.0, 1e-3, 3e29])[None]
    for k in range(1, 8):
        assert kept(row, top_k=k)[0].tolist() == reference(row[0], top_k=k)[0].tolist()


def test_forbidden_tokens_stay_impossible_and_do_not_count():
    row = np.array([[IMPOSSIBLE, 5.0, 4.0, IMPOSSIBLE, -20.0]], np.float32)
    for changes in ({"top_k": 4}, {"top_p": 0.9999}, {"min_p": 1e-12}, {"top_k": 5, "top_p": 0.99999}):
        assert not kept(row, **changes)[0][[0, 3]].any()
    assert kept(row, top_p=0.7)[0].tolist() == [False, True, False, False, False]  # .731 of what is possible


def test_no_filter_changes_nothing():
    row = jnp.linspace(-5.0, 5.0, 7)[None]
    assert filters.apply(row, spec()) is row
    assert filters.apply(row, spec(top_k=7)) is row


def test_the_vocabulary_is_never_sorted():
    shape = jax.ShapeDtypeStruct((4, 4096), jnp.float32)
    full = spec(top_k=50, top_p=0.9, min_p=0.01)
    lowered = jax.jit(lambda z, u: nucleus.draw(filters.apply(z, full), u)).lower(
        shape, jax.ShapeDtypeStruct((4,), jnp.float32)
    )
    for text in (lowered.as_text(), lowered.compile().as_text()):
        assert not SORTS.search(text)
    assert SORTS.search(jax.jit(jnp.sort).lower(shape).as_text())
    assert SORTS.search(jax.jit(lambda z: jax.lax.top_k(z, 50)).lower(shape).as_text())


# ------------------------------------------------------------------------------------------------ the draw


def draws(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token and log-prob at `count` evenly spread uniforms, so that counts are their expectations up to rounding."""
    uniform = (jnp.arange(count) + 0.5) / count
    token, logprob = jax.jit(nucleus.draw)(jnp.broadcast_to(jnp.float32(logits), (count, len(logits))), uniform)
    return np.asarray(token), np.asarray(logprob)


@pytest.mark.parametrize("vocab", [3, 50, 64, 1000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 12.0], ids=["flat", "usual", "peaked"])
def test_tokens_are_drawn_with_their_probabilities(vocab, scale):
    logits = np.random.default_rng(vocab).normal(size=vocab) * scale
    logits[::7] = IMPOSSIBLE
    count = 20_000
    token, logprob = draws(logits, count)
    exact = np.exp(logits - logits.max())
    exact /= exact.sum()
    frequency = np.bincount(token, minlength=vocab) / count
    # Evenly spread numbers hit an interval of length p at most once more or less than count * p times; 1e-6 is rounding.
    assert np.abs(frequency - exact).max() <= 1 / count + 2e-6
    assert 0.5 * np.abs(frequency - exact).sum() <= 0.5 * vocab / count
    assert frequency[exact == 0].sum() == 0
    np.testing.assert_allclose(logprob, np.log(exact[token]), atol=2e-5)  # rounding of logits of size 12


def test_a_filtered_draw_follows_the_renormalised_law():
    logits = np.random.default_rng(5).normal(size=400) * 2
    filtered = filters.apply(jnp.float32(logits)[None], spec(top_p=0.8))[0]
    keep = reference(logits, top_p=0.8)[0]
    count = 20_000
    token, logprob = draws(np.asarray(filtered), count)
    exact = np.where(keep, np.exp(logits), 0)
    exact /= exact.sum()
    assert np.abs(np.bincount(token, minlength=400) / count - exact).max() <= 1 / count + 2e-6
    np.testing.assert_allclose(logprob, np.log(exact[token]), atol=5e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-23, float(np.nextafter(np.float32(1), 0)), 1.0])
def test_an_impossible_token_is_never_drawn(uniform):
    """At either end of the vocabulary, of a block, alone, whatever the number."""
    jitted = jax.jit(nucleus.draw)
    for place in (0, 1, 63, 64, 65, 2047, 4094, 4095):
        row = jnp.full(4096, IMPOSSIBLE).at[place].set(-3.0)
        token, logprob = jitted(row[None], jnp.float32([uniform]))
        assert token.tolist() == [place]
        assert logprob.tolist() == [0.0]
    possible = np.random.default_rng(0).random(4096) < 0.01
    row = jnp.where(possible, 0.0, IMPOSSIBLE)
    numbers = jnp.concatenate([jnp.linspace(0, 1, 500, endpoint=False), jnp.float32([uniform])])
    token, _ = jitted(jnp.broadcast_to(row, (501, 4096)), numbers)
    assert possible[np.asarray(token)].all()


def test_a_larger_number_never_gives_an_earlier_token():
    logits = np.random.default_rng(2).normal(size=300)
    token, _ = draws(logits, 5000)
    assert (np.diff(token) >= 0).all()


def test_greedy_takes_the_first_of_equals():
    rows = jnp.float32([[0, 3, 1, 3], [IMPOSSIBLE, -5, -5, -9], [2, 2, 2, 2]])
    assert jax.jit(nucleus.greedy)(rows).tolist() == [1, 1, 0]
