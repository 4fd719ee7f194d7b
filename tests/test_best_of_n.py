"""Best-of-n: the unbiased estimate against every subset written out, its KL, and its table."""

from __future__ import annotations

import numpy as np
import pytest
import reference_reward

from jaxrlhf.algorithms import best_of_n
from jaxrlhf.evaluation import win_rate


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_weights_are_the_mean_over_all_subsets(n):
    random = np.random.default_rng(2)
    scores, values = random.normal(size=(3, 7)), random.normal(size=(3, 7))
    weights = best_of_n.weights(scores, n)
    want = [reference_reward.best_of_n(scores[p], values[p], n) for p in range(3)]
    np.testing.assert_allclose((weights * values).sum(1), want, atol=1e-12)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)


def test_equal_scores_share_nothing_but_lose_nothing():
    weights = best_of_n.weights(np.zeros((1, 4)), 2)
    np.testing.assert_allclose(weights.sum(), 1)
    assert weights.max() == 0.5  # the last in order is in half of the pairs


def test_the_estimate_is_unbiased():
    # Best of 2 of a fair coin is 3/4, whatever is drawn besides.
    draws = np.random.default_rng(0).random((20_000, 5)) < 0.5
    mean = best_of_n.table(draws.astype(float), {"value": draws.astype(float)}, (2,))[0]["value"]
    assert mean == pytest.approx(0.75, abs=3 * 0.35 / 20_000**0.5)  # 3 sigma of the mean


def test_kl():
    assert best_of_n.kl(1) == 0
    assert best_of_n.kl(16) == pytest.approx(1.8351, abs=1e-4)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_kl_is_a_bound_that_many_outcomes_reach(n):
    random = np.random.default_rng(n)
    few = reference_reward.kl_best_of_n(np.full(4, 0.25), random.permutation(4), n)
    many = reference_reward.kl_best_of_n(np.full(20_000, 1 / 20_000), random.permutation(20_000), n)
    assert few < best_of_n.kl(n) - 0.01
    assert best_of_n.kl(n) == pytest.approx(many, abs=1e-3)


def test_rows():
    scores = np.random.default_rng(3).normal(size=(50, 8))
    wins = win_rate.outcomes(scores, scores[:, :1])
    rows = best_of_n.table(scores, {"win": wins}, sizes=(1, 2, 8))
    assert [row["n"] for row in rows] == [1, 2, 8]
    assert rows[0]["proxy"] < rows[1]["proxy"] < rows[2]["proxy"] == pytest.approx(scores.max(1).mean())
    assert rows[2]["win"] >= 0.5
    with pytest.raises(ValueError, match="between 1 and the 8 samples"):
        best_of_n.weights(scores, 9)
