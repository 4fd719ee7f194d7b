"""KL estimators against their definitions, their gradients against the exact KL's, and the adaptive coefficient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jaxrlhf.algorithms import kl

ESTIMATORS = ["k1", "k2", "k3"]


def arrays(seed: int, shape=(5, 7)):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.7
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32), mask


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_equal_the_reference(estimator):
    logprobs, ref, mask = arrays(0)
    got = kl.estimate(jnp.asarray(logprobs), jnp.asarray(ref), jnp.asarray(mask), estimator)
    np.testing.assert_allclose(got, reference.kl_estimates(logprobs, ref, mask, estimator), rtol=1e-5, atol=1e-6)


def test_sequence_kl_sums_k1_over_each_response():
    logprobs, ref, mask = arrays(1)
    got = kl.sequence_kl(jnp.asarray(logprobs), jnp.asarray(ref), jnp.asarray(mask))
    np.testing.assert_allclose(got, reference.kl_estimates(logprobs, ref, mask, "k1").sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_masked_places_are_not_read(estimator, garbage):
    logprobs, ref, mask = arrays(2)

    def run(logprobs, ref):
        def total(x, y):
            return kl.estimate(x, y, jnp.asarray(mask), estimator).sum()

        return kl.estimate(logprobs, ref, jnp.asarray(mask), estimator), jax.grad(total)(logprobs, ref)

    clean = run(jnp.asarray(logprobs), jnp.asarray(ref))
    dirty = run(jnp.where(mask, logprobs, garbage), jnp.where(mask, ref, -garbage))
    for a, b in zip(clean, dirty, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("far", [-1e4, -100.0, 100.0, 1e4])
def test_k3_stays_finite_when_policies_part(far):
    value, gradient = jax.value_and_grad(lambda x: kl.estimate(x, jnp.zeros((1, 1)), jnp.ones((1, 1), bool), "k3").sum())(
        jnp.full((1, 1), far)
    )
    assert 0 <= value < 1e9
    assert np.isfinite(gradient).all()


def test_k3_is_exact_for_tiny_differences():
    # exp(-d) - 1 + d computed naively loses every digit of d^2 / 2 below d = 1e-4 in float32.
    d = 1e-4
    got = kl.estimate(jnp.full((1, 1), d), jnp.zeros((1, 1)), jnp.ones((1, 1), bool), "k3")
    assert 0 <= float(got[0, 0]) < 1e-7


@pytest.fixture(scope="module")
def sampled():
    """1e5 draws of a 6-way policy, its log-probs and the reference's."""
    rng = np.random.default_rng(3)
    theta, ref = rng.normal(size=6), rng.normal(size=6)
    logp, logq = reference.log_softmax(theta), reference.log_softmax(ref)
    draws = rng.choice(6, size=100_000, p=np.exp(logp))
    return logp, logq, draws


def sample_gradients(sampled, estimator):
    """d estimate / d theta of each draw, [draws, 6]: the outer derivative from our code, d log p / d theta by hand."""
    logp, logq, draws = sampled
    drawn, ref = (jnp.asarray(x[draws], jnp.float32)[:, None] for x in (logp, logq))
    mask = jnp.ones(drawn.shape, bool)
    outer = jax.grad(lambda x: kl.estimate(x, ref, mask, estimator).sum())(drawn)
    return np.asarray(outer, np.float64) * (np.eye(6)[draws] - np.exp(logp))


def assert_mean(samples, expected):
    """Within 3 standard errors in each of the 6 coordinates (the draws are seeded: no flicker)."""
    error = samples.std(0) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) < 3 * error).all(), (samples.mean(0), expected, error)


def test_gradient_of_k2_is_the_gradient_of_the_kl(sampled):
    logp, logq, _ = sampled
    p, d = np.exp(logp), logp - logq
    exact = p * (d - (p * d).sum())  # d KL(p || q) / d theta
    assert np.abs(exact).max() > 0.05
    assert_mean(sample_gradients(sampled, "k2"), exact)


def test_gradients_of_k1_and_k3_are_not(sampled):
    logp, logq, _ = sampled
    assert_mean(sample_gradients(sampled, "k1"), np.zeros(6))
    assert_mean(sample_gradients(sampled, "k3"), np.exp(logp) - np.exp(logq))  # of KL(q || p)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(sampled, estimator):
    logp, logq, draws = sampled
    values = kl.estimate(
        jnp.asarray(logp[draws], jnp.float32)[:, None],
        jnp.asarray(logq[draws], jnp.float32)[:, None],
        jnp.ones((len(draws), 1), bool),
        estimator,
    )
    assert_mean(np.asarray(values, np.float64), (np.exp(logp) * (logp - logq)).sum())


@pytest.mark.parametrize(
    ("observed", "sequences", "expected"),
    [
        (6.0, 1000, 0.1),  # on target: unchanged
        (6.6, 1000, 0.101),  # 10 % above: 10 % of a tenth of the horizon
        (5.4, 1000, 0.099),
        (60.0, 1000, 0.102),  # far above: limited to 20 %
        (-3.0, 1000, 0.098),  # far below, even negative: limited to -20 %
        (60.0, 10_000, 0.12),  # a whole horizon
        (60.0, 0, 0.1),  # an empty batch teaches nothing
    ],
)
def test_adaptive_coefficient(observed, sequences, expected):
    got = kl.adapt(jnp.float32(0.1), jnp.float32(observed), jnp.float32(sequences), target=6.0, horizon=10_000.0)
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(reference.adaptive_kl(0.1, observed, sequences, 6.0, 10_000.0), rel=1e-12)
