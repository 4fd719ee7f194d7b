"""Comparison sets: the right pairs with the right weights, in few shapes, as a function of the step."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from jaxrlhf.data import comparisons, human_sentiment, pipeline, tokenizer
from jaxrlhf.data.tokenizer import BOS, EOS, PAD


@pytest.fixture(scope="module")
def ratings():
    return human_sentiment.load("test")


@pytest.fixture(scope="module")
def trained(ratings):
    return tokenizer.train([pipeline.clean(rating.text) for rating in ratings], 1000)


@pytest.fixture(scope="module")
def rows(ratings, trained):
    return comparisons.rated_rows(ratings, trained)


FIELDS = {"tokens", "prompt_len", "response_len", "preferred"}


def test_rated_rows(rows, ratings, trained):
    assert rows["tokens"].shape == (2775, 64)
    assert {name: str(array.dtype) for name, array in rows.items()} == {
        "tokens": "int32",
        "length": "int32",
        "rating": "float32",
        "domain": "int32",
    }
    for i in (0, 1000, 2774):
        ids = [BOS, *trained.encode(pipeline.clean(ratings[i].text)), EOS]
        length = rows["length"][i]
        assert rows["tokens"][i].tolist() == (ids + [PAD] * 64)[:64]
        assert length == min(len(ids), 64)
        assert rows["rating"][i] == pytest.approx(ratings[i].mean)
        assert human_sentiment.DOMAINS[rows["domain"][i]] == ratings[i].domain
    cut = rows["length"] == 64
    assert cut.any()
    assert (rows["tokens"][~cut].max(axis=1) > 0).all()


def test_an_unknown_domain_is_refused(ratings, trained):
    wine = dataclasses.replace(ratings[0], domain="wine")
    with pytest.raises(ValueError, match="domain 'wine' is none of movie, product, tweet"):
        comparisons.rated_rows([wine], trained)
    assert comparisons.rated_rows([wine], trained, domains=["beer", "wine"])["domain"].tolist() == [1]


def test_preferred_by_rating():
    rating = np.array([[1.0, 0.5, 0.6, 1.0, 3.0]], np.float32)
    domain = np.array([[0, 0, 0, 0, 1]], np.int32)
    preferred = comparisons.preferred_by_rating(rating, domain, 0.5)
    assert np.argwhere(preferred[0]).tolist() == [[0, 1], [3, 1]]  # .4 is too little, the last is of another domain
    every = comparisons.preferred_by_rating(rating, domain, 0.0)
    assert np.argwhere(every[0]).tolist() == [[0, 1], [0, 2], [2, 1], [3, 1], [3, 2]]  # equal ratings are no choice
    thirds = np.array([[2 / 3, 1 / 6]], np.float32)  # a gap of .49999997 in float32
    assert comparisons.preferred_by_rating(thirds, np.zeros((1, 2), np.int32), 0.5).sum() == 1


def test_widths_are_few_and_hold_every_text(rows):
    widths = comparisons.choose_widths(rows["length"], 64)
    assert len(widths) == 4
    assert widths == tuple(sorted(widths))
    assert widths[-1] == 64
    assert all(width % 4 == 0 for width in widths)
    assert comparisons.choose_widths(rows["length"], 64, count=1) == (64,)
    assert comparisons.choose_widths(rows["length"][:100], 64) == (64,)  # fewer than a window: no bucket to measure
    padded = [comparisons.real_share(comparisons.rated_sets(rows, 64, 1, w), 36) for w in ((64,), (16, 32, 48, 64), widths)]
    assert padded[0] < padded[1] < padded[2]
    assert padded[2] > 0.74


def test_sets_hold_the_rows_they_say(rows):
    named = {**rows, "tokens": rows["tokens"].copy()}
    named["tokens"][:, 0] = np.arange(len(named["tokens"]))  # the first token names the row
    widths = comparisons.choose_widths(rows["length"], 32)
    sets = comparisons.rated_sets(named, 32, seed=1, widths=widths)
    seen, shapes = [], set()
    for step in range(24):
        batch = sets[step]
        assert set(batch) == FIELDS
        assert not batch["prompt_len"].any()
        width = batch["tokens"].shape[2]
        shapes.add(width)
        index = batch["tokens"][0, :, 0]
        assert (batch["tokens"][0] == named["tokens"][index, :width]).all()
        assert (batch["response_len"][0] == rows["length"][index]).all()
        rating, domain = rows["rating"][index], rows["domain"][index]
        for i, j in itertools.product(range(32), range(32)):
            assert batch["preferred"][0, i, j] == (domain[i] == domain[j] and rating[i] - rating[j] >= 0.5 - 1e-5)
        narrower = [w for w in widths if w < width]
        assert not narrower or batch["response_len"].max() > max(narrower)
        seen += index.tolist()
    assert shapes <= set(widths)
    assert len(shapes) > 1
    assert len(set(seen)) == len(seen)


def test_every_text_comes_once_an_epoch(rows):
    some = {name: array[:240] for name, array in rows.items()}
    some["rating"] = np.arange(240, dtype=np.float32)
    some["tokens"] = np.arange(240, dtype=np.int32)[:, None] + np.zeros((1, 64), np.int32)
    sets = comparisons.rated_sets(some, 20, seed=1, widths=(64,), window=4)
    seen = np.concatenate([sets[step]["tokens"][0, :, 0] for step in range(24)])
    assert (np.bincount(seen) == 2).all()
    assert sorted(seen[:240]) == list(range(240))


def test_batches_are_a_function_of_seed_and_step(rows):
    def make(seed):
        return comparisons.rated_sets(rows, 16, seed, (64,), window=3)

    unbroken = [make(1)[step] for step in range(12)]
    again = make(1)
    for step in (11, 0, 7, 3):
        assert all(np.array_equal(again[step][name], unbroken[step][name]) for name in FIELDS)
    assert not np.array_equal(make(2)[0]["tokens"], unbroken[0]["tokens"])


def test_several_sets_are_compared_within_themselves_and_equally_long(rows):
    sets = comparisons.rated_sets(rows, 16, seed=1, widths=(64,), sets=4)
    batches = [sets[step] for step in range(12)]
    assert batches[0]["tokens"].shape == (4, 16, 64)
    assert batches[0]["preferred"].shape == (4, 16, 16)
    means = np.mean([batch["response_len"].mean(axis=1) for batch in batches], axis=0)
    assert np.ptp(means) < 2


def test_bad_sets(rows):
    few = {name: array[:10] for name, array in rows.items()}
    with pytest.raises(ValueError, match="10 rated texts are fewer than one batch of 32"):
        comparisons.rated_sets(few, 16, 1, (64,), sets=2)
    with pytest.raises(ValueError, match="a row has 64 tokens, more than the largest width 48"):
        comparisons.rated_sets(rows, 16, 1, (32, 48))


# --- pairs ---

PAIRS = [
    {"prompt": "the film is", "chosen": " great, fun.", "rejected": ", well, bad"},
    {"prompt": "a subtle", "chosen": " one", "rejected": " none", "tie": True, "weight": 3.0, "margin": 1.5},
    {"prompt": "<eos>", "chosen": "", "rejected": " <pad>", "weight": 0.5},
]


def test_preference_rows(trained):
    pairs = comparisons.preference_rows(PAIRS, trained, 24)
    assert pairs.tokens.shape == (3, 2, 24)
    for i, row in enumerate(PAIRS):
        for side, name in enumerate(("chosen", "rejected")):
            tokens, start = pairs.tokens[i, side], pairs.prompt_len[i, side]
            end = start + pairs.response_len[i, side]
            assert tokens[0] == BOS
            assert trained.decode(tokens[:start]) == row["prompt"]
            assert tokens[end - 1] == EOS
            assert trained.decode(tokens[start:end], continuation=True) == row[name]
            assert not tokens[end:].any()
            assert (tokens[1 : end - 1] > EOS).all()  # a text cannot forge a special token
    assert pairs.label.tolist() == [1.0, 0.5, 1.0]
    assert pairs.tie.tolist() == [False, True, False]
    assert pairs.weight.tolist() == [1.0, 3.0, 0.5]
    assert pairs.margin.tolist() == [0.0, 1.5, 0.0]


def test_pairs_that_do_not_fit(trained):
    long = {"prompt": "a", "chosen": " b" * 30, "rejected": ""}
    with pytest.raises(ValueError, match="pair 1 has 33 tokens, more than the width 24"):
        comparisons.preference_rows([PAIRS[0], long], trained, 24)
    assert comparisons.fitting([PAIRS[0], long, PAIRS[2]], trained, 24) == [PAIRS[0], PAIRS[2]]
    with pytest.raises(ValueError, match="there are no preference pairs"):
        comparisons.preference_rows([], trained, 24)


def test_ratings_and_chosen_pairs_weigh_the_same(rows, trained):
    pairs = comparisons.preference_rows(PAIRS, trained, 24)
    sets = comparisons.compared_sets(rows, pairs, (12, 3), seed=1, widths=(32, 64))
    alone = comparisons.rated_sets(rows, 12, 1, (32, 64))
    for step in range(5):
        batch = sets[step]
        assert set(batch) == FIELDS
        width = batch["tokens"].shape[2]
        assert batch["tokens"].shape == (1, 18, width)
        preferred, ratings = batch["preferred"][0], alone[step]["preferred"][0]
        of_ratings, of_pairs = preferred[:12, :12], preferred[12:, 12:]
        assert of_pairs.sum() == pytest.approx(4.5)  # 1 + 3 + .5
        assert of_ratings.sum() == pytest.approx(4.5)
        assert np.allclose(of_ratings, ratings * 4.5 / ratings.sum())
        assert not preferred[:12, 12:].any()
        assert not preferred[12:, :12].any()
        assert (batch["response_len"][0, :12] == alone[step]["response_len"][0]).all()
        for k in range(3):
            first, second = 12 + 2 * k, 13 + 2 * k
            prompt_len, response_len = batch["prompt_len"][0], batch["response_len"][0]
            tokens = batch["tokens"][0, first]
            which = next(i for i in range(3) if (pairs.tokens[i, 0] == np.resize(tokens[:24], 24)).all())
            forward, backward = [(1.0, 0.0), (1.5, 1.5), (0.5, 0.0)][which]
            assert (preferred[first, second], preferred[second, first]) == (forward, backward)
            assert prompt_len[first] == pairs.prompt_len[which, 0]
            assert response_len[second] == pairs.response_len[which, 1]
            assert tokens[prompt_len[first] + response_len[first] - 1] == EOS


def test_ties_may_stand_as_themselves(rows, trained):
    pairs = comparisons.preference_rows(PAIRS, trained, 24)
    half = comparisons.compared_sets(rows, pairs, (12, 3), seed=1, widths=(32, 64))[0]
    batch = comparisons.compared_sets(rows, pairs, (12, 3), seed=1, widths=(32, 64), ties=True)[0]
    assert set(batch) == FIELDS | {"tied"}
    (place,) = np.argwhere(batch["tied"][0])  # once, in one of its two directions
    tie = batch["tied"][0][tuple(place)]
    assert tie == 3  # its weight
    assert not batch["preferred"][0][tuple(place)]
    assert half["preferred"][0][tuple(place)] == half["preferred"][0][tuple(place[::-1])] == tie / 2
    apart = batch["tied"][0] + batch["tied"][0].T
    assert np.allclose(batch["preferred"][0] + apart / 2, half["preferred"][0])  # texts and pairs weigh the same still


def test_compared_sets_are_a_function_of_the_step(rows, trained):
    pairs = comparisons.preference_rows(PAIRS, trained, 24)
    first, again = (comparisons.compared_sets(rows, pairs, (12, 2), seed=1, widths=(64,)) for _ in range(2))
    assert all(np.array_equal(first[9][name], again[9][name]) for name in FIELDS)


def test_a_set_without_a_rated_pair_still_has_its_chosen_pairs(rows, trained):
    same = {**rows, "rating": np.zeros_like(rows["rating"])}
    pairs = comparisons.preference_rows(PAIRS[:1], trained, 24)
    batch = comparisons.compared_sets(same, pairs, (12, 1), seed=1, widths=(64,))[0]
    assert batch["preferred"].sum() == 1
    assert np.isfinite(batch["preferred"]).all()


def test_only_pairs_are_mixed(rows, trained):
    pairs = comparisons.preference_rows(PAIRS, trained, 24)
    three = pairs.replace(tokens=np.concatenate([pairs.tokens, pairs.tokens[:, :1]], axis=1))
    with pytest.raises(ValueError, match="sets of 3 responses: only pairs"):
        comparisons.compared_sets(rows, three, (12, 1), 1, (64,))


def test_the_reward_loss_takes_both_forms(rows, trained):
    """The batches are `algorithms.reward.Batch`."""
    from jaxrlhf.algorithms import reward

    pairs = comparisons.preference_rows(PAIRS, trained, 24)
    for dataset in (
        comparisons.rated_sets(rows, 12, 1, (64,)),
        comparisons.compared_sets(rows, pairs, (12, 2), seed=1, widths=(64,)),
    ):
        batch = reward.Batch(**dataset[0])
        assert batch.preferred.shape == (*batch.prompt_len.shape, batch.prompt_len.shape[1])
