"""Agreement: published kappas, ties as a word of their own, sides."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxrlhf.feedback import agreement, ratings, store


def _said(words: str) -> dict[str, str]:
    return {f"pair {i}": word for i, word in enumerate(words)}


def test_cohens_kappa_of_a_known_table():
    # 50 grants read by two: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed .7, by chance .5, kappa .4.
    result = agreement.agreement(_said("a" * 25 + "b" * 25), _said("a" * 20 + "b" * 5 + "a" * 10 + "b" * 15))
    assert (result.raw, result.kappa, result.pairs) == (pytest.approx(0.7), pytest.approx(0.4), 50)
    assert result.low < 0.7 < result.high


def test_the_ends_of_kappa():
    assert agreement.agreement(_said("abab"), _said("abab")).kappa == 1
    assert agreement.agreement(_said("abab"), _said("baba")).kappa == -1
    assert agreement.agreement(_said("aaaa"), _said("aaaa")).kappa == 1
    assert agreement.agreement(_said("aabb"), _said("abab")).kappa == 0


def test_only_common_pairs_count():
    assert agreement.agreement({"x": "a", "y": "b"}, {"y": "b", "z": "a"}).pairs == 1
    with pytest.raises(ValueError, match="no pair in common"):
        agreement.agreement({"x": "a"}, {"y": "a"})


CHOICES = [
    store.Choice("x", "ann", "left", "a"),
    store.Choice("y", "ann", "right", "a"),
    store.Choice("z", "ann", "tie", "a"),
    store.Choice("x", "bob", "right", "b"),  # shown the other way round: the same verdict as ann's
    store.Choice("y", "bob", "left", "a"),
    store.Choice("z", "bob", "skip", "a"),
    store.Choice("w", "eve", "both_bad", "a"),
]


def test_verdicts_are_freed_of_the_side():
    assert agreement.verdicts(CHOICES, "ann") == {"x": "a", "y": "b", "z": "tie"}
    assert agreement.verdicts(CHOICES, "bob") == {"x": "a", "y": "a"}


def test_every_two_labelers_with_common_pairs():
    table = agreement.between_labelers(CHOICES)
    assert list(table) == [("ann", "bob")]
    assert table["ann", "bob"].raw == 0.5


def test_share_of_the_left_side():
    assert agreement.left_share(CHOICES).rate == 0.5
    assert agreement.left_share(CHOICES[2:3]) is None
    rate, low, _ = agreement.left_share([store.Choice(str(i), "ann", "left", "a") for i in range(20)])
    assert (rate, low > 0.5) == (1.0, True)


# Fleiss's kappa as it is usually shown: 10 subjects, 14 raters, 5 words (the table of its Wikipedia article): 0.210.
FOURTEEN = [
    *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
    *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
]


def test_fleiss_kappa_of_a_known_table():
    counts = np.array(FOURTEEN, np.float64)
    assert agreement.raw(counts) == pytest.approx(0.378, abs=5e-4)
    assert agreement.fleiss(counts) == pytest.approx(0.210, abs=5e-4)


@pytest.mark.parametrize("seed", range(4))
def test_krippendorffs_alpha_is_that_of_the_package(seed):
    import krippendorff

    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, 60)
    said = np.where(rng.random((5, 60)) < 0.6, truth, rng.integers(0, 4, (5, 60))).astype(float)
    said[rng.random((5, 60)) < 0.3] = np.nan  # not everybody judged every pair
    labels = [[agreement.VERDICTS[int(word)] for word in column if not np.isnan(word)] for column in said.T]
    choices = [
        store.Choice(str(pair), str(who), {"a": "left", "b": "right"}.get(word, word), "a")
        for pair, words in enumerate(labels)
        for who, word in enumerate(words)
    ]
    expected = krippendorff.alpha(said, level_of_measurement="nominal")
    assert agreement.krippendorff(agreement.verdict_counts(choices)) == pytest.approx(expected, abs=1e-12)


def test_two_labelers_by_every_measure():
    """With two labelers, raw agreement is Cohen's, and all agree on what is perfect and what is none."""
    same = np.array([[2, 0], [0, 2], [2, 0]], np.float64)
    assert [measure(same) for measure in (agreement.raw, agreement.fleiss, agreement.krippendorff)] == [1, 1, 1]
    opposed = np.array([[1, 1]] * 4, np.float64)
    assert [measure(opposed) for measure in (agreement.raw, agreement.fleiss)] == [0, -1]
    assert agreement.krippendorff(opposed) == pytest.approx(1 - 4 * 2 / ((64 - 32) / 7))
    one_word = np.array([[3, 0], [2, 0]], np.float64)
    assert [measure(one_word) for measure in (agreement.raw, agreement.fleiss, agreement.krippendorff)] == [1, 1, 1]
    for measure in (agreement.raw, agreement.fleiss, agreement.krippendorff):
        with pytest.raises(ValueError, match="two or more"):
            measure(np.zeros((0, 4)))


def test_verdicts_are_counted_by_pair_without_skips_and_sides():
    assert agreement.verdict_counts(CHOICES).tolist() == [[2, 0, 0, 0], [1, 1, 0, 0]]


def test_share_of_the_longer_answer():
    pairs = {"x": store.Pair("p", "long answer", "short"), "y": store.Pair("p", "same", "four")}
    said = [store.Choice("x", "ann", "left", "a"), store.Choice("x", "bob", "left", "b"), store.Choice("y", "ann", "left", "a")]
    rate, low, high = agreement.longer_share(said, pairs)
    assert (rate, low < 0.5 < high) == (0.5, True)
    assert agreement.longer_share([said[0]], pairs).rate == 1
    assert agreement.longer_share(said[2:], pairs) is None


def test_two_checkpoints_are_as_far_apart_as_their_odds():
    strengths = ratings.strengths(np.array([[0.0, 30.0], [10.0, 0.0]]), prior=0.0)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3), abs=1e-8)
    assert strengths.sum() == pytest.approx(0, abs=1e-12)
    always = ratings.strengths(np.array([[0.0, 30.0], [0.0, 0.0]]))
    assert np.isfinite(always).all()
    assert always[0] > always[1]
    with pytest.raises(ValueError, match="give a prior"):
        ratings.strengths(np.array([[0.0, 30.0], [0.0, 0.0]]), prior=0.0)


@pytest.mark.parametrize("prior", [0.0, 0.5])
def test_strengths_are_where_the_likelihood_has_no_slope(prior):
    """The log-likelihood's gradient, written out in float64, is zero at the result."""
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 20, (5, 5)).astype(np.float64) * (1 - np.eye(5))
    found = ratings.strengths(wins, prior)
    if prior:  # the mean was taken off; an average opponent stands where the whole slope is zero
        low, high = -2.0, 2.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _slope(wins, found + middle, prior).sum() > 0 else (low, middle)
        found = found + low
    assert np.abs(_slope(wins, found, prior)).max() < 1e-7


def _slope(wins, strength, prior):
    chance = 1 / (1 + np.exp(strength[None] - strength[:, None]))
    return (wins - (wins + wins.T) * chance).sum(axis=1) + prior - 2 * prior / (1 + np.exp(-strength))


def test_ratings_find_the_better_checkpoint_and_say_how_surely():
    rng = np.random.default_rng(1)
    names, truth = ("sft", "ppo", "old"), {"sft": 0.0, "ppo": 1.0, "old": -0.5}
    pairs, choices = {}, []
    for number in range(600):
        first, second = rng.choice(names, 2, replace=False)
        pair = store.Pair(f"p{number}", "x", "y", str(first), str(second))
        pairs[pair.id] = pair
        for who in range(2):
            prefers = rng.random() < 1 / (1 + math.exp(truth[second] - truth[first]))
            choices.append(store.Choice(pair.id, f"{who}", "left" if prefers else "right", "a"))
    found = ratings.ratings(choices, pairs)
    assert [rating.checkpoint for rating in found] == ["ppo", "sft", "old"]
    centre = sum(truth.values()) / 3
    for rating in found:
        assert rating.low < ratings.ELO * (truth[rating.checkpoint] - centre) < rating.high
        assert 20 < rating.high - rating.low < 120  # 800 choices each: about 13 points of standard error, doubled by the pairs
    assert sum(rating.comparisons for rating in found) == 2 * len(choices)
    assert ratings.ratings(choices, pairs) == found, "the bootstrap is seeded"


def test_ties_are_half_and_a_checkpoint_against_itself_is_nothing():
    pairs = {"x": store.Pair("p", "1", "2", "ppo", "sft"), "y": store.Pair("q", "1", "2", "ppo", "ppo")}
    tied = [
        store.Choice("x", "ann", "tie", "a"),
        store.Choice("x", "bob", "both_bad", "b"),
        store.Choice("y", "ann", "left", "a"),
    ]
    found = ratings.ratings(tied, pairs)
    assert [(rating.checkpoint, rating.comparisons) for rating in found] == [("ppo", 2), ("sft", 2)]
    assert all(abs(rating.rating) < 1e-6 for rating in found)
    assert ratings.ratings(tied[2:], pairs) == []
    with pytest.raises(ValueError, match="counts are >= 0"):
        ratings.strengths(np.full((2, 2), -1.0))
