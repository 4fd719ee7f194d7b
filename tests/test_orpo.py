"""ORPO: the likelihood of the chosen and the odds against the rejected, and which pairs count."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import preference_cases as cases
import pytest
import reference_preferences

from jaxrlhf.algorithms import orpo
from jaxrlhf.core.types import Outputs

CONFIG = orpo.Config(odds_coef=0.4)


def prepared(seed: int, holes: bool = False) -> tuple[orpo.Batch, Outputs]:
    """A batch, and what a policy says of it."""
    batch, _, _ = orpo.prepare(cases.preferences(seed), (), CONFIG)
    if holes:
        holed = cases.with_holes(batch, seed)
        # A hole may not empty a response: such a pair has no odds.
        batch = dataclasses.replace(holed, mask=jnp.where(holed.mask.any(-1, keepdims=True), holed.mask, batch.mask))
    return batch, Outputs(logprobs=cases.logprobs(seed + 2000, batch.mask.shape[-1]))


def reference_total(logprobs: np.ndarray, batch: orpo.Batch) -> float:
    """The whole batch's loss, pair by pair."""
    mask = np.asarray(batch.mask)
    rows = range(len(mask))
    pairs = [[reference_preferences.tokens_of(logprobs[row, side], mask[row, side]) for side in (0, 1)] for row in rows]
    return reference_preferences.orpo(
        pairs, np.asarray(batch.label, np.float64), np.asarray(batch.weight, np.float64), CONFIG.odds_coef
    )


@pytest.mark.parametrize("holes", [False, True])
def test_loss_equals_the_reference(holes):
    batch, outputs = prepared(0, holes)
    expected = reference_total(np.asarray(outputs.logprobs, np.float64), batch)
    assert cases.total(orpo.loss, outputs, batch, CONFIG) == pytest.approx(expected, rel=1e-5)  # float32 sums


def test_gradient_is_that_of_the_reference():
    batch, outputs = prepared(1, holes=True)
    gradient = jax.grad(lambda x: cases.total(orpo.loss, Outputs(logprobs=x), batch, CONFIG))(outputs.logprobs)
    slope = cases.finite_differences(lambda x: reference_total(x, batch), np.asarray(outputs.logprobs, np.float64))
    assert np.abs(slope).max() > 1e-3
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logprob", [-1e-5, -1e-3, -0.1, -math.log(2), -1.0, -5.0, -50.0, -1e4])
def test_log_odds(logprob):
    expected = logprob - math.log(-math.expm1(logprob))
    assert orpo.log_odds(jnp.float32(logprob)) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert jax.grad(orpo.log_odds)(jnp.float32(logprob)) == pytest.approx(-1 / math.expm1(logprob), rel=1e-3)


@pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e30])
def test_odds_of_a_certain_and_of_an_impossible_response_are_finite(logprob):
    value, slope = jax.value_and_grad(orpo.log_odds)(jnp.float32(logprob))
    assert np.isfinite(value)
    assert np.isfinite(slope)


def test_which_pairs_count():
    given = cases.preferences(2)
    batch, _, metrics = orpo.prepare(given, (), CONFIG)
    out = [cases.EMPTY, cases.EXCLUDED, cases.IDENTICAL]
    expected = np.asarray(given.weight).copy()
    expected[out] = 0
    np.testing.assert_array_equal(batch.weight, expected)
    assert not batch.mask[jnp.asarray(out)].any()
    assert {name: float(value) for name, value in metrics.items()} == {
        "preferences/pairs": cases.ROWS - 3,
        "preferences/ties": 1,
        "preferences/identical": 1,
        "preferences/empty": 1,
    }


def test_the_chosen_one_becomes_more_probable_and_the_rejected_one_less_so():
    given = cases.preferences(3, soft=False)
    batch, _, _ = orpo.prepare(given.replace(tie=given.tie & False), (), CONFIG)
    gradient = jax.grad(lambda x: cases.total(orpo.loss, Outputs(logprobs=x), batch, CONFIG))(
        cases.logprobs(3, batch.mask.shape[-1])
    )
    for row in range(cases.ROWS):
        chosen = 1 if row == cases.REVERSED else 0
        assert (np.asarray(gradient[row, chosen])[np.asarray(batch.mask[row, chosen])] < 0).all()
        assert (np.asarray(gradient[row, 1 - chosen])[np.asarray(batch.mask[row, 1 - chosen])] > 0).all()


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_masked_places_are_not_read(garbage):
    given = cases.preferences(4)
    out = given.weight == 0
    dirty = given.replace(label=jnp.where(out, garbage, given.label), ref_logprobs=jnp.full_like(given.ref_logprobs, garbage))
    cases.assert_bit_equal(orpo.prepare(given, (), CONFIG)[::2], orpo.prepare(dirty, (), CONFIG)[::2])

    batch, outputs = prepared(4, holes=True)
    dirty_batch = dataclasses.replace(batch, label=jnp.where(batch.weight == 0, garbage, batch.label))

    def everything(outputs, batch):
        gradient = jax.grad(lambda o: cases.total(orpo.loss, o, batch, CONFIG))(outputs)
        return orpo.loss(outputs, batch, CONFIG), gradient

    dirty_outputs = cases.spoiled(outputs, batch, garbage)
    cases.assert_bit_equal(everything(outputs, batch), everything(dirty_outputs, dirty_batch))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"odds_coef=-0\.1"):
        orpo.Config(odds_coef=-0.1)
    with pytest.raises(ValueError, match=r"Outputs\.logprobs"):
        orpo.loss(Outputs(), prepared(7)[0], CONFIG)
    three = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], axis=1) if x.ndim > 1 else x, cases.preferences(7))
    with pytest.raises(ValueError, match="sets of 3 responses"):
        orpo.prepare(three, (), CONFIG)
