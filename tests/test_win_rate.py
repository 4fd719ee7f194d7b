"""Win rates, intervals, diversity and the row of a policy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.evaluation import policy, win_rate


def test_ties_count_half():
    rate = win_rate.win_rate(np.array([2.0, 1.0, 0.0, 5.0]), np.array([1.0, 1.0, 3.0, 4.0])).rate
    assert rate == 2.5 / 4


def test_a_policy_against_itself_is_one_half():
    scores = np.arange(50.0)
    rate, low, high = win_rate.win_rate(scores, scores)
    assert rate == 0.5
    assert low < 0.5 < high


def test_wilson_published_figures():
    # Newcombe 1998, table I, method 3: 81/263 and 15/148 and 0/20.
    assert [round(x, 4) for x in win_rate.wilson(81 / 263, 263)[1:]] == [0.2553, 0.3662]
    assert [round(x, 4) for x in win_rate.wilson(15 / 148, 148)[1:]] == [0.0624, 0.1605]
    assert [round(x, 4) for x in win_rate.wilson(0.0, 20)[1:]] == [0.0, 0.1611]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=40))
def test_swapping_the_sides_mirrors_the_interval(rows):
    a, b = (np.array(side, float) for side in zip(*rows, strict=True))
    there, back = win_rate.win_rate(a, b), win_rate.win_rate(b, a)
    np.testing.assert_allclose([there.rate, there.low, there.high], [1 - back.rate, 1 - back.high, 1 - back.low], atol=1e-12)
    assert 0 <= there.low <= there.rate <= there.high <= 1


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = [
        low <= 0.8 <= high for _, low, high in (win_rate.wilson(random.binomial(384, 0.8) / 384, 384) for _ in range(2000))
    ]
    assert 0.935 < np.mean(covered) < 0.965  # 2,000 draws: standard error .005


def test_bad_comparisons_are_refused():
    with pytest.raises(ValueError, match="prompt by prompt"):
        win_rate.win_rate(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        win_rate.win_rate(np.array([np.nan]), np.zeros(1))
    with pytest.raises(ValueError, match="0 trials"):
        win_rate.win_rate(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="n=0"):
        win_rate.distinct_n(["a"], 0)


def test_distinct_n_by_hand():
    texts = ["a b a b", "b a"]  # pairs: ab ba ab | ba
    assert win_rate.distinct_n(texts, 1) == 2 / 6
    assert win_rate.distinct_n(texts, 2) == 2 / 4  # a pair across the border would be "b b"
    assert win_rate.distinct_n(["a"], 2) == 0
    assert win_rate.distinct_texts(["x", "x", "y"]) == 2 / 3
    assert win_rate.distinct_texts([]) == 0


def _samples(responses, **changes):
    n = len(responses)
    arrays = {"length": np.full(n, 3), "finished": np.array([True] * (n - 1) + [False]), "entropy": np.full(n, 2.0)}
    return policy.Samples(
        ["the film is"] * n, responses, **{**arrays, "kl": np.arange(n) / 1.0, "proxy": np.zeros(n), **changes}
    )


def test_row_of_a_policy():
    before, after = _samples([" bad one", " so bad", " dull"]), _samples([" good one", " so good", ", dull"])
    judges = {"good words": lambda texts: np.array([text.count("good") for text in texts], float)}
    old, new = policy.judge(before, judges), policy.judge(after, judges)
    row = policy.evaluate_policy(after, new, baseline=old)
    assert policy.texts(after)[::2] == ["the film is good one", "the film is, dull"]
    assert row["win_rate"]["good words"][0] == pytest.approx(2.5 / 3)
    assert row["judges"] == {"good words": pytest.approx(2 / 3)}
    assert (row["prompts"], row["kl"], row["length"], row["eos_rate"]) == (3, 1.0, 3.0, pytest.approx(2 / 3))
    assert row["distinct_texts"] == 1
    assert "win_rate" not in policy.evaluate_policy(before, old)
    assert "gold" not in row
    told = _samples(["a", "b"], gold=np.array([1.0, 4.0]), proxy=np.array([0.0, 1.0]))
    assert policy.evaluate_policy(told, {})["gold"] == 2.5
    assert json.loads(json.dumps(row)) == row
    assert not any(isinstance(value, float) and math.isnan(value) for value in row.values())


def test_samples_shown_are_the_first():
    rows = policy.side_by_side(_samples(["a", "b", "c"]), _samples(["d", "e", "f"]), count=2)
    assert rows == [
        {"prompt": "the film is", "before": "a", "after": "d"},
        {"prompt": "the film is", "before": "b", "after": "e"},
    ]


def test_samples_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="2 kl for 1 prompts"):
        _samples(["a"], kl=np.zeros(2))
    with pytest.raises(ValueError, match="2 gold for 1 prompts"):
        _samples(["a"], gold=np.zeros(2))
    with pytest.raises(ValueError, match="no held-out prompt"):
        policy.evaluate_policy(_samples([], finished=np.zeros(0, bool)), {})
