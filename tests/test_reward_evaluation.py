"""Pair accuracy, by margin too, calibration, length, drift, and the over-optimisation figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jaxrlhf.evaluation import overoptimization, reward_model


def test_pair_accuracy_by_hand():
    ratings = np.array([2.0, 1.0, 0.0, -1.0, 3.0])
    domains = ["movie", "movie", "movie", "tweet", "tweet"]
    scores = np.array([0.3, 0.9, 0.3, 1.0, 5.0])  # movie pairs: 0>1 wrong, 0>2 tie, 1>2 right
    result = reward_model.pair_accuracy(scores, ratings, domains)
    assert result == {"movie": (0.5, 3), "tweet": (1.0, 1)}
    wide = reward_model.pair_accuracy(scores, ratings, domains, min_gap=1.5)
    assert wide["movie"] == (0.5, 1)


def test_pair_accuracy_counts_like_two_loops():
    random = np.random.default_rng(1)
    n = 40
    ratings, scores = random.integers(-4, 5, n) / 4, random.integers(0, 6, n).astype(float)
    domains = random.choice(["a", "b"], n).tolist()
    result = reward_model.pair_accuracy(scores, ratings, domains)
    for domain in "ab":
        outcomes = [
            1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
            for i, j in itertools.product(range(n), repeat=2)
            if domains[i] == domains[j] == domain and ratings[i] - ratings[j] >= 0.5
        ]
        assert result[domain] == (pytest.approx(np.mean(outcomes)), len(outcomes))


def test_a_domain_without_pairs_has_no_accuracy():
    result = reward_model.pair_accuracy(np.zeros(2), np.array([1.0, 1.2]), ["m", "m"])
    assert math.isnan(result["m"].accuracy)
    assert result["m"].pairs == 0


def test_pair_accuracy_refuses_bad_input():
    with pytest.raises(ValueError, match="need one of each"):
        reward_model.pair_accuracy(np.zeros(2), np.zeros(2), ["m"])
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        reward_model.pair_accuracy(np.array([np.nan, 0.0]), np.zeros(2), ["m", "m"])


def test_a_calibrated_model_has_no_calibration_error():
    # Ratings drawn so that sigmoid(score gap) IS the probability that one is above the other: Gumbel noise on the scores.
    random = np.random.default_rng(0)
    scores = random.normal(0, 1.5, 1500)
    ratings = scores + random.gumbel(size=1500)
    error, table = reward_model.calibration(scores, ratings, ["m"] * 1500)
    assert error < 0.01
    assert sum(row["pairs"] for row in table) == 1500 * 1499 // 2
    sure, _ = reward_model.calibration(scores * 5, ratings, ["m"] * 1500)
    assert sure > 0.1


def test_peak_and_drop():
    rows = [{"kl": k, "proxy": p, "textblob": t} for k, p, t in [(0, 0, 0.14), (7, 1, 0.4), (24, 2, 0.6), (88, 3.6, 0.33)]]
    curve = overoptimization.curve(rows)
    assert [row["sqrt_kl"] for row in curve] == pytest.approx([0, math.sqrt(7), math.sqrt(24), math.sqrt(88)])
    peak = overoptimization.peak_and_drop(curve, "textblob")
    assert (peak.peak, peak.index, peak.final) == (0.6, 2, 0.33)
    assert peak.drop == pytest.approx(0.45)
    assert peak.proxy_rise == pytest.approx(1.6)
    assert overoptimization.peak_and_drop(curve, "proxy").drop == 0
    again = [{"kl": k, "proxy": float(k), "textblob": v} for k, v in enumerate([0.1, 0.5, 0.4, 0.2, 0.6, 0.55])]
    peak = overoptimization.peak_and_drop(again, "textblob")  # the largest fall, though the curve rises again beyond its peak
    assert (peak.index, peak.low_index, peak.final, peak.proxy_rise) == (1, 3, 0.55, 2.0)
    assert peak.drop == pytest.approx(0.6)
    assert overoptimization.curve([{"kl": -0.01}])[0]["sqrt_kl"] == 0
    with pytest.raises(ValueError, match="no row"):
        overoptimization.peak_and_drop([], "textblob")


@pytest.mark.parametrize("best_of_n", [False, True])
def test_the_fit_recovers_its_own_curve(best_of_n):
    d = np.linspace(0, 9, 12)
    gain = np.array([x * (0.3 - 0.02 * x) if best_of_n else (x * (0.3 - 0.1 * math.log(x)) if x else 0.0) for x in d])
    a, b, r2 = overoptimization.fit(d, gain, best_of_n)
    assert (a, b) == pytest.approx((0.3, 0.02 if best_of_n else 0.1))
    assert r2 == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 3"):
        overoptimization.fit(d[:3], gain[:3])


def test_curves_are_fitted_together_each_from_its_own_start():
    d = np.linspace(0, 6, 7)
    curves = [
        [{"sqrt_kl": x, "gold": start + x * (0.5 - 0.04 * x)} for x in d[use]]
        for start, use in ((3.0, slice(None, 4)), (-1.0, [0, 4, 5, 6]))
    ]
    a, b, r2 = overoptimization.fit_curves(curves, best_of_n=True)
    assert (a, b, r2) == pytest.approx((0.5, 0.04, 1.0))
    assert overoptimization.fit_curves([curves[0][:3]]) is None
    assert overoptimization.fit_curves([curves[0][:1]]) is None


def test_accuracy_by_margin_counts_like_two_loops():
    random = np.random.default_rng(4)
    n, edges = 40, (0.0, 0.5, 1.5, 9.0)
    ratings, scores = random.integers(-8, 9, n) / 4, random.integers(0, 6, n).astype(float)
    domains = random.choice(["a", "b"], n).tolist()
    rows = reward_model.accuracy_by_margin(scores, ratings, domains, edges)
    assert [row["margin"] for row in rows] == [0.0, 0.5, 1.5]  # no pair lies 9 apart
    for row, low, high in zip(rows, edges, edges[1:], strict=False):
        outcomes = [
            1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
            for i, j in itertools.product(range(n), repeat=2)
            if domains[i] == domains[j] and low < ratings[i] - ratings[j] <= high
        ]
        assert (row["accuracy"], row["pairs"]) == (pytest.approx(np.mean(outcomes)), len(outcomes))


def test_correlation():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert reward_model.correlation(x, np.array([3, 1, 2, 0])) == pytest.approx(np.corrcoef(x, [3, 1, 2, 0])[0, 1])
    assert reward_model.correlation(x, -2 * x + 1) == pytest.approx(-1)
    assert math.isnan(reward_model.correlation(x, np.ones(4)))


def test_agreement_is_within_rows_and_where_the_judge_decides():
    scores = np.array([[1.0, 2.0, 2.0], [9.0, 8.0, 7.0]])
    judged = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 6.0]])  # 1>0 right, 2>0 right, 2>1 tied; 2>0 wrong, 2>1 wrong
    assert reward_model.agreement(scores, judged) == pytest.approx(2.5 / 5)
    assert math.isnan(reward_model.agreement(scores, np.zeros((2, 3))))


def test_drift_on_samples():
    scores, length = np.array([0.0, 1.0, 2.0, 5.0]), np.array([3, 4, 5, 8])
    seen = reward_model.on_samples(scores, length, {"judge": np.array([0.0, 1.0, 3.0, 2.0]), "mute": np.zeros(4)})
    assert seen["mean"] == 2
    assert seen["std"] == pytest.approx(np.std(scores))
    assert seen["length"] == pytest.approx(1)
    assert seen["accuracy"]["judge"] == pytest.approx(5 / 6)
    assert math.isnan(seen["accuracy"]["mute"])
