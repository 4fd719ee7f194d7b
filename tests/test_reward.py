"""Learning a score from choices: pairs from ratings and from preferences, the loss, and what it learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxrlhf.algorithms import pairwise, reward
from jaxrlhf.core.types import Outputs, Preferences


def preferences(label, tie=None, weight=None, margin=None, responses=2):
    rows = len(label)
    zeros = jnp.zeros(rows)
    return Preferences(
        tokens=jnp.zeros((rows, responses, 5), jnp.int32),
        prompt_len=jnp.full((rows, responses), 2),
        response_len=jnp.full((rows, responses), 3),
        label=jnp.asarray(label, jnp.float32),
        tie=jnp.zeros(rows, bool) if tie is None else jnp.asarray(tie),
        weight=zeros + 1 if weight is None else jnp.asarray(weight, jnp.float32),
        margin=zeros if margin is None else jnp.asarray(margin, jnp.float32),
    )


def batch_of(preferred, margin=None):
    rows, texts = preferred.shape[:2]
    ones = jnp.ones((rows, texts), jnp.int32)
    return reward.Batch(
        jnp.zeros((rows, texts, 4), jnp.int32),
        ones,
        ones,
        jnp.asarray(preferred, jnp.float32),
        None if margin is None else jnp.asarray(margin, jnp.float32),
    )


CONFIG = reward.Config()


def terms(scores, batch, config=CONFIG):
    return reward.loss(Outputs(scores=jnp.asarray(scores, jnp.float32)), batch, config)


def total(scores, batch, config=CONFIG):
    """What the train step minimises."""
    return sum(term.coefficient * term.sum / term.count for term in terms(scores, batch, config)[0].values())


def random_batch(seed: int, rows=3, texts=5, margin=True):
    rng = np.random.default_rng(seed)
    preferred = np.where(rng.random((rows, texts, texts)) < 0.4, rng.random((rows, texts, texts)), 0.0)
    preferred[:, np.arange(texts), np.arange(texts)] = 0
    preferred[0, 2, :] = preferred[0, :, 2] = 0  # a text in no pair
    return batch_of(preferred, rng.normal(size=preferred.shape) if margin else None), rng.normal(size=(rows, texts))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [False, True])
def test_pair_loss_equals_the_reference(smoothing, margin):
    batch, scores = random_batch(0, rows=1, margin=margin)
    term = terms(scores, batch, reward.Config(smoothing=smoothing))[0]["loss/pairs"]
    expected = reference.pair_loss(
        scores[0], np.asarray(batch.preferred[0]), np.asarray(batch.margin[0]) if margin else np.zeros((5, 5)), smoothing
    )
    assert term.sum / term.count == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lead", [-1e4, -100.0, 0.0, 100.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bradley_terry_is_finite_far_out(lead, smoothing):
    value, slope = jax.value_and_grad(pairwise.bradley_terry)(jnp.float32(lead), smoothing)
    assert np.isfinite(value)
    assert np.isfinite(slope)
    assert value >= 0
    if lead == 0:
        assert value == pytest.approx(np.log(2))  # equal scores, identical pairs


def test_centring_is_the_mean_square_of_the_texts_compared():
    batch = batch_of(np.array([[[0, 1, 0], [0, 0, 0], [0, 0, 0]]]))
    term = terms([[3.0, -1.0, 50.0]], batch, reward.Config(centre_coef=0.01))[0]["loss/centre"]
    assert (term.sum, term.count, term.coefficient) == (10.0, 2.0, 0.01)


def test_metrics():
    # 0 over 1 (right, weight 1), 1 over 2 (equal scores: wrong, weight 2), 2 over 0 (wrong, weight 1).
    preferred = np.zeros((1, 3, 3))
    preferred[0, 0, 1], preferred[0, 1, 2], preferred[0, 2, 0] = 1, 2, 1
    metrics = terms([[2.0, 1.0, 1.0]], batch_of(preferred))[1]
    assert metrics["reward/accuracy"].sum / metrics["reward/accuracy"].count == 0.25
    assert metrics["reward/margin"].sum / metrics["reward/margin"].count == 0.0
    assert metrics["reward/score"].sum / metrics["reward/score"].count == pytest.approx(4 / 3)


def test_pairs_from_preferences():
    batch = reward.from_preferences(
        preferences(
            label=[1.0, 0.0, 0.75, 1.0, 1.0],
            tie=[False, False, False, True, False],
            weight=[1.0, 1.0, 2.0, 1.0, 0.0],
            margin=[0.0, 0.0, 0.0, 0.0, 0.0],
        )
    )
    np.testing.assert_array_equal(batch.preferred[:, 0, 1], [1.0, 0.0, 1.5, 0.5, 0.0])
    np.testing.assert_array_equal(batch.preferred[:, 1, 0], [0.0, 1.0, 0.5, 0.5, 0.0])
    assert not batch.preferred[:, [0, 1], [0, 1]].any()


def test_a_soft_label_with_margin_is_one_logistic_model():
    # P(0 over 1) = sigmoid(difference - margin), read from either side.
    batch = reward.from_preferences(preferences(label=[0.8], margin=[0.7]))
    term = terms([[1.5, 0.3]], batch)[0]["loss/pairs"]
    p = reference.sigmoid(1.5 - 0.3 - 0.7)
    assert term.sum / term.count == pytest.approx(-0.8 * np.log(p) - 0.2 * np.log(1 - p), rel=1e-5)


def test_larger_sets_need_their_pairs_spelled_out():
    with pytest.raises(ValueError, match="3 responses"):
        reward.from_preferences(preferences(label=[1.0], responses=3))


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf])
def test_texts_and_margins_in_no_pair_are_not_read(garbage):
    batch, scores = random_batch(1)
    pair = np.asarray(batch.preferred) > 0
    compared = pair.any(1) | pair.any(2)
    assert not compared.all()
    dirty_batch = dataclasses.replace(batch, margin=jnp.where(pair, batch.margin, garbage))
    clean, dirty = jnp.asarray(scores, jnp.float32), jnp.where(compared, jnp.asarray(scores, jnp.float32), garbage)
    for a, b in zip(jax.tree.leaves(terms(clean, batch)), jax.tree.leaves(terms(dirty, dirty_batch)), strict=True):
        np.testing.assert_array_equal(a, b)
    gradient = jax.grad(total)
    assert np.isfinite(gradient(dirty, dirty_batch)).all()
    np.testing.assert_array_equal(gradient(dirty, dirty_batch), gradient(clean, batch))


def test_a_split_adds_up():
    batch, scores = random_batch(2)
    scores = jnp.asarray(scores, jnp.float32)

    def summed(x, slices):
        parts = [terms(x[i], jax.tree.map(lambda leaf, i=i: leaf[i], batch))[0] for i in slices]
        return {
            name: (sum(p[name].sum for p in parts), sum(p[name].count for p in parts), parts[0][name].coefficient)
            for name in parts[0]
        }

    def value(x, slices):
        return sum(coefficient * s / n for s, n, coefficient in summed(x, slices).values())

    def gradient(slices):
        return jax.jit(jax.value_and_grad(lambda x: value(x, slices)))(scores)

    for a, b in zip(gradient([slice(None)]), gradient([slice(0, 1), slice(1, 3)]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_order_of_the_texts_changes_nothing():
    batch, scores = random_batch(3)
    order = np.array([3, 1, 4, 0, 2])
    shuffled = batch_of(np.asarray(batch.preferred)[:, order][:, :, order], np.asarray(batch.margin)[:, order][:, :, order])
    assert total(scores[:, order], shuffled) == pytest.approx(float(total(scores, batch)), rel=1e-5)


def test_learns_a_separable_set_exactly_and_centres_it():
    rng = np.random.default_rng(4)
    features = jnp.asarray(rng.normal(size=(1, 40, 3)) + 2.0, jnp.float32)
    true = features @ jnp.array([1.0, -2.0, 0.5])
    batch = batch_of(true[:, :, None] - true[:, None, :] > 0.1)
    config = reward.Config(centre_coef=0.01)

    def loss(params):
        return total(features @ params["weight"] + params["bias"], batch, config)

    params = {"weight": jnp.zeros(3), "bias": jnp.float32(1.0)}
    step = jax.jit(lambda p: jax.tree.map(lambda x, g: x - 0.3 * g, p, jax.grad(loss)(p)))
    for _ in range(1500):
        params = step(params)
    scores = np.asarray(features @ params["weight"] + params["bias"])
    assert (scores[0, :, None] > scores[0])[np.asarray(true[0, :, None] - true[0]) > 0.1].all()
    assert abs(scores.mean()) < 0.05 * scores.std()  # pairs leave the offset free; centring sets it


@pytest.mark.parametrize(("field", "value"), [("smoothing", 0.5), ("smoothing", -0.1), ("centre_coef", -1.0)])
def test_impossible_configurations(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        reward.Config(**{field: value})


def test_missing_outputs_are_named():
    with pytest.raises(ValueError, match=r"Outputs\.scores"):
        reward.loss(Outputs(), random_batch(4)[0], CONFIG)
