"""The packaged ratings: complete, licensed, strict about another file, and installed with the wheel."""

from __future__ import annotations

import collections
import hashlib
import json
from importlib import resources

import pytest

from jaxrlhf.data import human_sentiment


@pytest.fixture(scope="module")
def splits():
    return {split: human_sentiment.load(split) for split in human_sentiment.ROWS}


def test_counts_of_each_domain(splits):
    counts = {split: dict(collections.Counter(r.domain for r in ratings)) for split, ratings in splits.items()}
    assert counts == {
        "train": {"movie": 9041, "product": 3143, "tweet": 3541},
        "test": {"movie": 1562, "product": 554, "tweet": 659},
    }


def test_every_rater_is_kept_and_the_mean_is_theirs(splits):
    for rating in splits["train"] + splits["test"]:
        assert 15 <= len(rating.ratings) <= 99
        assert all(type(score) is int and -4 <= score <= 4 for score in rating.ratings)
        assert rating.mean == pytest.approx(sum(rating.ratings) / len(rating.ratings))


def test_no_text_is_in_both_splits(splits):
    assert not {r.text for r in splits["train"]} & {r.text for r in splits["test"]}
    everything = splits["train"] + splits["test"]
    assert len({(r.domain, r.id) for r in everything}) == len(everything)


def test_a_known_row(splits):
    rating = splits["train"][2]
    assert (rating.domain, rating.id, rating.text) == ("movie", "3", "Effective but too tepid biopic")
    assert rating.ratings == (-1, 0, -1, 0, -1, -1, -1, -1, 0, -2, 1, 1, -1, -1, -1)


def test_reviews_hold_no_tweets():
    assert {rating.domain for rating in human_sentiment.reviews("test")} == {"movie", "product"}


def test_licence_and_citation_travel_with_the_data():
    folder = resources.files("jaxrlhf.data") / "human_sentiment"
    licence, citation = (folder / "LICENSE.txt").read_text(), (folder / "CITATION").read_text()
    assert "MIT License" in licence
    assert "C.J. Hutto" in licence
    assert "hutto2014vader" in citation
    digests = {split: hashlib.sha256((folder / f"{split}.jsonl.gz").read_bytes()).hexdigest() for split in ("train", "test")}
    assert digests == DIGESTS


DIGESTS = {
    "train": "065d32e8f0d39313abab0d22b90b160766e9064f02e451c7f2e42161e99cf7dc",
    "test": "2670e3949c5b389d5d304a3cf4e564711eb5a960a55d669734062c2951bbac95",
}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split 'dev': choose one of train, test"):
        human_sentiment.load("dev")


def test_a_damaged_installation_is_noticed(monkeypatch):
    monkeypatch.setattr(human_sentiment, "read", lambda path: [])
    human_sentiment._load.cache_clear()
    with pytest.raises(ValueError, match=r"test\.jsonl\.gz has 0 rows, not 2775: install jaxrlhf again"):
        human_sentiment.load("test")
    human_sentiment._load.cache_clear()


def test_a_loaded_list_is_the_callers_own():
    human_sentiment.load("test").clear()
    assert len(human_sentiment.load("test")) == 2775


GOOD = {"domain": "wine", "id": "1", "text": "fine", "ratings": [1, 0.5]}


def test_another_file_may_have_its_own_domains_and_scale(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    assert human_sentiment.read(path) == [human_sentiment.Rating("wine", "1", "fine", (1, 0.5), 0.75)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ratings": []}, "ratings: must be a list of one or more numbers"),
        ({"ratings": [1, True]}, "ratings: must be a list of one or more numbers"),
        ({"ratings": 3}, "ratings: must be a list, not an integer"),
        ({"text": " "}, "text: is empty"),
        ({"domain": None}, "domain: must be text, not null"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, problem):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(ValueError, match=f"mine.jsonl:2: {problem}"):
        human_sentiment.read(path)
