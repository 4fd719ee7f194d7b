"""Outside judges: known verdicts, speed of loading, and what an absent extra says."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from jaxrlhf.evaluation import judges

GOOD, BAD, FLAT = "a wonderful, moving and beautiful film.", "a terrible, boring and ugly film.", "the film of the man."


@pytest.mark.parametrize("judge", [judges.vader, judges.textblob])
def test_lexicon_orders_plain_texts(judge):
    good, bad, flat = judge([GOOD, BAD, FLAT])
    assert bad < flat == 0 < good
    assert bad >= -1
    assert good <= 1


@pytest.mark.parametrize("judge", [judges.vader, judges.textblob])
def test_no_text_gives_no_score(judge):
    assert judge([]).shape == (0,)
    assert judge([""]).tolist() == [0.0]


def test_published_vader_scores():
    # The examples of VADER's own README.
    scores = judges.vader(
        ["VADER is smart, handsome, and funny.", "VADER is VERY SMART, handsome, and FUNNY!!!", "Not bad at all"]
    )
    np.testing.assert_allclose(scores, [0.8316, 0.9342, 0.4310], atol=1e-4)


def test_textblob_matches_its_public_class():
    import textblob

    expected = [textblob.TextBlob(text).sentiment.polarity for text in (GOOD, BAD, FLAT)]
    np.testing.assert_array_equal(judges.textblob([GOOD, BAD, FLAT]), expected)


def test_vader_loads_its_lexicon_once():
    judges.vader([GOOD])
    loaded = judges._vader_analyzer.cache_info().misses
    judges.vader([GOOD] * 3)
    assert judges._vader_analyzer.cache_info().misses == loaded == 1


def test_ridge_learns_words_and_word_pairs():
    texts = ["good film", "bad film", "not good film", "not bad film"] * 6
    ridge = judges.fit_ridge(texts, [2.0, -2.0, -1.0, 1.0] * 6, alpha=0.01)
    np.testing.assert_allclose(ridge.predict(texts[:4]), [2, -2, -1, 1], atol=0.1)
    assert ridge.predict([]).shape == (0,)
    assert ridge.predict(["GOOD Film"]) == ridge.predict(["good film"])


def test_ridge_refuses_unequal_or_empty_input():
    with pytest.raises(ValueError, match="2 texts and 1 mean"):
        judges.fit_ridge(["a b", "b c"], [1.0])
    with pytest.raises(ValueError, match="0 texts"):
        judges.fit_ridge([], [])


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("vaderSentiment.vaderSentiment", lambda: judges._vader_analyzer.__wrapped__()),
        ("textblob.en", lambda: judges.textblob(["a"])),
        ("sklearn.linear_model", lambda: judges.fit_ridge(["a b"], [0.0])),
    ],
)
def test_an_absent_package_names_the_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"jaxrlhf\[loop\]"):
        call()
