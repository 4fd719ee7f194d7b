"""Agreement: published kappas, ties as a word of their own, sides."""

from __future__ import annotations

import pytest

from jaxrlhf.feedback import agreement, store


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
