"""Choices beyond plain pairs: ties as outcomes of their own, the best of several, what length alone explains."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_reward

from jaxrlhf.algorithms import pairwise, reward
from jaxrlhf.core.types import Outputs, Preferences

TIES = ("half", "davidson", "rao_kupper")


def random_batch(seed: int, rows: int = 4, texts: int = 5, spread: float = 2.0) -> tuple[reward.Batch, np.ndarray]:
    """Sets with choices, ties, bests, margins and lengths; some texts empty and in no choice, some sets without any."""
    rng = np.random.default_rng(seed)
    shape = (rows, texts, texts)
    preferred = np.where(rng.random(shape) < 0.4, rng.random(shape), 0.0)
    tied = np.where(rng.random(shape) < 0.3, rng.random(shape), 0.0)
    for weights in (preferred, tied):
        weights[:, np.arange(texts), np.arange(texts)] = 0
        weights[:, texts - 1, :] = weights[:, :, texts - 1] = 0  # the last text of each set is in no pair
        weights[rows - 1] = 0
    response_len = rng.integers(1, 20, (rows, texts))
    response_len[:, texts - 1] = 0
    best = rng.integers(0, texts - 1, rows)
    best[1::2] = -1
    batch = reward.Batch(
        tokens=jnp.zeros((rows, texts, 4), jnp.int32),
        prompt_len=jnp.ones((rows, texts), jnp.int32),
        response_len=jnp.asarray(response_len, jnp.int32),
        preferred=jnp.asarray(preferred, jnp.float32),
        margin=jnp.asarray(rng.normal(size=shape), jnp.float32),
        tied=jnp.asarray(tied, jnp.float32),
        best=jnp.asarray(best, jnp.int32),
    )
    return batch, spread * rng.normal(size=(rows, texts))


def terms(scores, batch, config):
    return reward.loss(Outputs(scores=jnp.asarray(scores, jnp.float32)), batch, config)


def total(scores, batch, config):
    """What the train step minimises."""
    return sum(term.coefficient * term.sum / term.count for term in terms(scores, batch, config)[0].values())


def mean(term):
    return float(term.sum / term.count)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("length_coef", [0.0, 0.3])
def test_the_loss_equals_the_reference(ties, smoothing, length_coef):
    batch, scores = random_batch(0)
    config = reward.Config(ties=ties, tie_probability=0.2, smoothing=smoothing, length_coef=length_coef)
    found = terms(scores, batch, config)[0]
    logits = np.asarray(jnp.asarray(scores, jnp.float32), np.float64) + length_coef * np.asarray(batch.response_len)
    rest = (np.asarray(x, np.float64) for x in (batch.preferred, batch.tied, batch.margin))
    want = reference_reward.pair_loss(logits, *rest, ties, 0.2, smoothing)
    assert mean(found["loss/pairs"]) == pytest.approx(want, rel=2e-5)
    candidates = np.asarray(batch.response_len) > 0
    assert mean(found["loss/best"]) == pytest.approx(
        reference_reward.best_loss(logits, np.asarray(batch.best), candidates), rel=2e-5
    )
    assert found["loss/best"].count == 2


@pytest.mark.parametrize("ties", TIES[1:])
@pytest.mark.parametrize("p", [0.01, 1 / 3, 0.9])
def test_outcomes_are_a_distribution_and_equals_tie_as_told(ties, p):
    lead = jnp.linspace(-30, 30, 61)
    first, tie = pairwise.choice(lead, 0.0, ties, p)
    second = pairwise.choice(-lead, 0.0, ties, p)[0]
    np.testing.assert_allclose(np.exp(-first) + np.exp(-second) + np.exp(-tie), 1, rtol=1e-5)
    assert math.exp(-tie[30]) == pytest.approx(p, rel=1e-5)
    np.testing.assert_allclose(tie, tie[::-1], rtol=1e-5)


def test_without_ties_the_models_are_bradley_terry():
    lead = jnp.linspace(-20, 20, 41)
    for ties in TIES[1:]:
        np.testing.assert_allclose(pairwise.choice(lead, 0.1, ties, 1e-7)[0], pairwise.bradley_terry(lead, 0.1), atol=1e-5)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("lead", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_finite_far_out(ties, lead):
    for which in (0, 1):
        value, slope = jax.value_and_grad(lambda x, w=which: pairwise.choice(x, 0.1, ties, 0.3)[w])(jnp.float32(lead))
        assert np.isfinite(value)
        assert np.isfinite(slope)
        assert value >= 0


@pytest.mark.parametrize("ties", TIES)
def test_gradient_against_finite_differences(ties):
    batch, scores = random_batch(1)
    config = reward.Config(ties=ties, smoothing=0.05, length_coef=0.1, centre_coef=0.01)
    gradient = np.asarray(jax.grad(total)(jnp.asarray(scores, jnp.float32), batch, config), np.float64)
    value = jax.jit(total, static_argnums=2)
    for place in np.ndindex(scores.shape):
        shift = np.zeros(scores.shape)
        shift[place] = 0.05  # in float32 a smaller one drowns in rounding
        slope = (float(value(scores + shift, batch, config)) - float(value(scores - shift, batch, config))) / 0.1
        assert gradient[place] == pytest.approx(slope, abs=3e-4)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_what_is_in_no_choice_is_not_read(ties, garbage):
    batch, scores = random_batch(2)
    config = reward.Config(ties=ties, length_coef=0.1)
    pair = (np.asarray(batch.preferred) > 0) | (np.asarray(batch.tied) > 0)
    read = pair.any(1) | pair.any(2) | ((np.asarray(batch.response_len) > 0) & (np.asarray(batch.best) >= 0)[:, None])
    assert not read.all()
    clean = jnp.asarray(scores, jnp.float32)
    dirty = jnp.where(read, clean, garbage)
    dirty_batch = dataclasses.replace(batch, margin=jnp.where(pair, batch.margin, garbage))
    run = jax.jit(lambda x, b: (terms(x, b, config), jax.grad(total)(x, b, config)))
    for a, b in zip(jax.tree.leaves(run(clean, batch)), jax.tree.leaves(run(dirty, dirty_batch)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()


def test_a_tie_in_a_batch_counts_half_each_way_by_default():
    """As a tie in `tied`, and as half a preference in both directions."""
    batch, scores = random_batch(3)
    batch = dataclasses.replace(batch, margin=None, best=None)
    both = batch.preferred + 0.5 * batch.tied + 0.5 * batch.tied.swapaxes(1, 2)
    split = dataclasses.replace(batch, preferred=both, tied=None)
    config = reward.Config()
    assert total(scores, batch, config) == pytest.approx(float(total(scores, split, config)), rel=1e-6)


def preferences():
    return Preferences(
        tokens=jnp.zeros((3, 2, 5), jnp.int32),
        prompt_len=jnp.full((3, 2), 2),
        response_len=jnp.full((3, 2), 3),
        label=jnp.array([1.0, 0.5, 0.25]),
        tie=jnp.array([False, True, False]),
        weight=jnp.array([1.0, 2.0, 4.0]),
        margin=jnp.array([0.5, 0.25, 0.0]),
    )


def test_ties_of_preferences():
    batch = reward.from_preferences(preferences(), ties="davidson")
    np.testing.assert_array_equal(batch.preferred[:, 0, 1], [1.0, 0.0, 1.0])
    np.testing.assert_array_equal(batch.preferred[:, 1, 0], [0.0, 0.0, 3.0])
    np.testing.assert_array_equal(batch.tied.sum((1, 2)), [0.0, 2.0, 0.0])
    assert reward.from_preferences(preferences()).tied is None
    term = terms(
        [[9.0, 9.0], [1.0, 0.4], [9.0, 9.0]],
        dataclasses.replace(batch, preferred=jnp.zeros((3, 2, 2))),
        reward.Config(ties="davidson"),
    )
    want = reference_reward.davidson(1.0 - 0.25, 0.4, 1.0)[2]
    assert mean(term[0]["loss/pairs"]) == pytest.approx(-math.log(want), rel=1e-5)


def test_two_candidates_are_a_pair():
    """The softmax over two is Bradley-Terry."""
    scores = jnp.array([[1.5, -0.5], [0.2, 0.9]])
    lengths = jnp.ones((2, 2), jnp.int32)
    rows = (jnp.zeros((2, 2, 4), jnp.int32), lengths, lengths)
    best = reward.Batch(*rows, jnp.zeros((2, 2, 2)), best=jnp.array([0, 0], jnp.int32))
    pairs = reward.Batch(*rows, jnp.zeros((2, 2, 2)).at[:, 0, 1].set(1.0))
    found = terms(scores, best, reward.Config())[0]["loss/best"]
    assert mean(found) == pytest.approx(mean(terms(scores, pairs, reward.Config())[0]["loss/pairs"]), rel=1e-6)


def choices_by_length(coefficient: float, texts: int = 120, noise: float = 1.0):
    rng = np.random.default_rng(5)
    length = rng.integers(1, 40, texts)
    quality = noise * rng.normal(size=texts)
    logit = quality[:, None] - quality[None] + coefficient * (length[:, None] - length[None])
    preferred = np.triu(rng.random((texts, texts)) < 1 / (1 + np.exp(-logit)), 1)
    preferred = (preferred | np.triu(~preferred, 1).T).astype(np.float32)
    return preferred, length, quality


@pytest.mark.parametrize("coefficient", [-0.1, 0.0, 0.15])
def test_the_length_coefficient_is_recovered(coefficient):
    preferred, length, _ = choices_by_length(coefficient, noise=0.0)
    found = pairwise.fit_length(preferred, length)
    assert found == pytest.approx(coefficient, abs=0.01)  # 7,140 choices
    losses = [reference_reward.length_loss(found + shift, preferred, length) for shift in (-1e-3, 0.0, 1e-3)]
    assert losses[1] < min(losses[0], losses[2])  # the reference's minimum too


def test_a_fixed_length_coefficient_takes_length_out_of_the_score():
    preferred, length, quality = choices_by_length(0.15)
    features = jnp.asarray(np.stack([quality, length / 10], 1), jnp.float32)
    texts = len(length)
    batch = reward.Batch(
        jnp.zeros((1, texts, 4), jnp.int32),
        jnp.zeros((1, texts), jnp.int32),
        jnp.asarray(length, jnp.int32)[None],
        jnp.asarray(preferred)[None],
    )

    def learned(coefficient: float) -> np.ndarray:
        config = reward.Config(length_coef=coefficient, centre_coef=0.0)
        slope = jax.jit(jax.grad(lambda w: total((features @ w)[None], batch, config)))
        weight = jnp.zeros(2)
        for _ in range(400):
            weight = weight - 0.5 * slope(weight)
        return np.asarray(weight)

    plain, debiased = learned(0.0), learned(0.15)
    assert plain == pytest.approx([1.0, 1.5], abs=0.15)
    assert debiased == pytest.approx([1.0, 0.0], abs=0.15)


def test_choices_that_length_cannot_explain_are_refused():
    with pytest.raises(ValueError, match="no choice between texts of different length"):
        pairwise.fit_length(np.ones((2, 2), np.float32), np.array([3, 3]))
    with pytest.raises(ValueError, match="length decides all 1 choices"):
        pairwise.fit_length(np.array([[0, 1], [0, 0]], np.float32), np.array([3, 2]))


@pytest.mark.parametrize(("field", "value"), [("tie_probability", 0.0), ("tie_probability", 1.0), ("ties", "luce")])
def test_impossible_configurations(field, value):
    with pytest.raises(ValueError, match=f"{field}=.?{value}"):
        reward.Config(**{field: value})
