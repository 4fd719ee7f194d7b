"""Who gets which pair: exactly k different people each, leases that run out, undo, gold; accounts and tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest
from labelling import derived_is_true, labels_of_pairs

from jaxrlhf.feedback import accounts, assignments, store


@pytest.fixture
def db(tmp_path):
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as connection:
        yield connection


@pytest.fixture
def clock(monkeypatch):
    """Time that a test moves."""
    moment = [1_700_000_000.0]
    monkeypatch.setattr(assignments, "now", lambda: moment[0])
    return moment


def _fill(db, pairs: int) -> list[store.Pair]:
    made = [store.Pair(f"prompt {i}", f" first {i}", f" second {i}") for i in range(pairs)]
    store.add_pairs(db, made)
    return made


def _choose(db, pair: str, labeler: str, rules, word="left", **more) -> store.Choice:
    return assignments.answer(db, store.Choice(pair, labeler, word, "a", **more), rules)


def _ids(given) -> list[str]:
    return [each.pair.id for each in given]


@pytest.mark.parametrize("k", [1, 3])
def test_each_pair_gets_k_labels_of_k_people(db, k):
    """People come and go in a random order, skip now and then, and take back: never more than k, and k in the end."""
    made, rules, draw = _fill(db, 25), assignments.Rules(k=k, gold_share=0.0), random.Random(k)
    people = [f"person {i}" for i in range(k + 3)]
    idle = set()
    while len(idle) < len(people):
        who = draw.choice(people)
        given = assignments.give(db, who, rules, draw.randint(1, 3))
        assert len(set(_ids(given))) == len(given)
        idle = idle - {who} if given else idle | {who}
        if given:
            _choose(db, given[0].pair.id, who, rules, draw.choice(["left", "right", "tie", "both_bad"]))
        if draw.random() < 0.1 and assignments.take_back(db, who, rules) is not None:
            idle = set()
        assert max(labels_of_pairs(db)) <= k
    assert labels_of_pairs(db) == [k] * len(made)
    assert derived_is_true(db)
    labels = [(choice.pair, choice.labeler) for choice in store.choices(db)]
    assert len(labels) == len(set(labels)) == k * len(made)
    done = assignments.progress(db, people[0], rules)
    assert (done.labels, done.wanted, done.waiting) == (k * len(made), k * len(made), 0)


def test_a_place_is_held_while_its_lease_runs_and_free_after(db, clock):
    made, rules = _fill(db, 1), assignments.Rules(k=1, lease_seconds=60, gold_share=0.0)
    assert _ids(assignments.give(db, "ann", rules, 1)) == [made[0].id]
    clock[0] += 59
    assert assignments.give(db, "bob", rules, 1) == []
    assert _ids(assignments.give(db, "ann", rules, 1)) == [made[0].id], "asking again prolongs"
    clock[0] += 59
    assert assignments.give(db, "bob", rules, 1) == []
    clock[0] += 2
    assert _ids(assignments.give(db, "bob", rules, 1)) == [made[0].id], "an abandoned pair is given again"


def test_a_late_answer_counts_while_a_place_is_free(db, clock):
    made, rules = _fill(db, 2), assignments.Rules(k=1, lease_seconds=60, gold_share=0.0)
    assignments.give(db, "ann", rules, 2)
    clock[0] += 100
    assert _choose(db, made[0].id, "ann", rules).sequence == 1
    assert _ids(assignments.give(db, "bob", rules, 2)) == [made[1].id]
    _choose(db, made[1].id, "bob", rules)
    with pytest.raises(assignments.Full, match="1 labels from others"):
        _choose(db, made[1].id, "ann", rules)
    assert _choose(db, made[1].id, "ann", rules, "skip").choice == "skip", "a skip takes no place"
    assert labels_of_pairs(db) == [1, 1]


def test_a_skip_leaves_the_place_to_others(db):
    made, rules = _fill(db, 1), assignments.Rules(k=1, gold_share=0.0)
    assignments.give(db, "ann", rules, 1)
    _choose(db, made[0].id, "ann", rules, "skip")
    assert assignments.give(db, "ann", rules, 1) == []
    assert _ids(assignments.give(db, "bob", rules, 1)) == [made[0].id]
    assert assignments.progress(db, "ann", rules)[:2] == (1, 0)
    assert assignments.progress(db, "bob", rules)[:2] == (0, 1)
    _choose(db, made[0].id, "bob", rules)
    assert assignments.take_back(db, "ann", rules) is not None
    assert labels_of_pairs(db) == [1], "a skip taken back is no label less"
    assert derived_is_true(db)


def test_nobody_chooses_on_a_pair_that_they_were_not_given(db):
    made, rules = _fill(db, 2), assignments.Rules(gold_share=0.0)
    assignments.give(db, "ann", rules, 1)
    for pair, who in ((made[0].id, "bob"), (made[1].id, "ann"), ("unknown", "ann")):
        with pytest.raises(assignments.NotGiven, match="was not given"):
            _choose(db, pair, who, rules)
    assert store.choices(db) == []


def test_the_side_is_the_one_that_was_shown(db):
    made, rules = _fill(db, 30), assignments.Rules(gold_share=0.0)
    for given in assignments.give(db, "ann", rules, 30):
        assert given.left == store.left_response(given.pair.id, "ann")
        _choose(db, given.pair.id, "ann", rules)  # whose Choice says that a stood at the left
    kept = store.choices(db)
    assert {choice.left_response for choice in kept} == {"a", "b"}
    assert all(choice.left_response == store.left_response(choice.pair, "ann") for choice in kept)
    assert len(kept) == len(made)


def test_a_choice_sent_again_is_one_choice(db):
    made, rules = _fill(db, 1), assignments.Rules(gold_share=0.0)
    assignments.give(db, "ann", rules, 1)
    first = _choose(db, made[0].id, "ann", rules, id="click-number-1")
    assert _choose(db, made[0].id, "ann", rules, id="click-number-1") == first
    assert _choose(db, made[0].id, "ann", rules, "right", id="click-number-2") == first, "another tab"
    assignments.take_back(db, "ann", rules, "undo-number-1")
    assert _choose(db, made[0].id, "ann", rules, id="click-number-1") == first, "a retry that comes after the undo"
    assert store.choices(db) == []
    assert _choose(db, made[0].id, "ann", rules, "right", id="click-number-3").sequence == 3
    assert db.execute("SELECT COUNT(*) FROM events").fetchone() == (3,)


def test_an_undo_keeps_the_place_and_shows_the_pair_first(db):
    made, rules = _fill(db, 3), assignments.Rules(k=1, gold_share=0.0)
    for given in assignments.give(db, "ann", rules, 2):
        _choose(db, given.pair.id, "ann", rules)
    again = assignments.take_back(db, "ann", rules, "undo-number-1")
    assert again is not None
    assert again.pair.id == made[1].id
    assert assignments.take_back(db, "ann", rules, "undo-number-1") == again, "the same click twice"
    assert len(store.choices(db)) == 1
    assert made[1].id not in _ids(assignments.give(db, "bob", rules, 3))
    assert _ids(assignments.give(db, "ann", rules, 2))[0] == made[1].id
    assert assignments.take_back(db, "nobody", rules) is None


def test_the_pairs_with_the_fewest_labels_go_first(db):
    made, rules = _fill(db, 3), assignments.Rules(k=2, gold_share=0.0)
    for given in assignments.give(db, "ann", rules, 2):
        _choose(db, given.pair.id, "ann", rules)
    assert _ids(assignments.give(db, "bob", rules, 3)) == [made[2].id, made[0].id, made[1].id]


def test_gold_is_mixed_in_for_everyone_and_counts_for_no_pair(db):
    _fill(db, 200)
    gold = [(store.Pair(f"known {i}", " right", " wrong"), "a") for i in range(40)]
    assert assignments.add_gold(db, gold) == 40
    assert assignments.add_gold(db, gold) == 0
    rules = assignments.Rules(k=1, gold_share=0.2)
    known = store.gold(db)
    met = {}
    for who in ("ann", "bob"):
        given = assignments.give(db, who, rules, 100)
        met[who] = [pair for pair in _ids(given) if pair in known]
        for each in given:
            _choose(db, each.pair.id, who, rules)
    assert all(10 <= len(pairs) <= 32 for pairs in met.values())  # 100 draws of 0.2, three standard deviations
    assert met["ann"] != met["bob"]
    assert not {row["pair"] for row in store.preferences(db)} & known.keys()
    done = assignments.progress(db, "ann", rules)
    assert done.wanted == 200
    assert done.labels == 200 - sum(map(len, met.values()))
    assert derived_is_true(db)


def test_an_abandoned_gold_pair_is_given_again(db, clock):
    assignments.add_gold(db, [(store.Pair("known", " right", " wrong"), "a")])
    rules = assignments.Rules(gold_share=0.99, lease_seconds=60)
    assert len(assignments.give(db, "ann", rules, 1)) == 1
    clock[0] += 61
    assert len(assignments.give(db, "ann", rules, 1)) == 1


def test_gold_that_contradicts_itself_is_refused_whole(db):
    pair = store.Pair("p", " x", " y")
    assignments.add_gold(db, [(pair, "a")])
    for answers, said in (([(pair, "b")], "'a' already"), ([(dataclasses.replace(pair, prompt="q"), "left")], "a, b, tie")):
        with pytest.raises(ValueError, match=said):
            assignments.add_gold(db, answers)
    assert store.gold(db) == {pair.id: "a"}
    assert store.pairs(db) == [pair]


def test_impossible_rules_are_refused():
    for wrong in ({"k": 0}, {"lease_seconds": 0.0}, {"gold_share": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            assignments.Rules(**wrong)


def test_a_token_is_seen_once_and_kept_as_its_hash(db, tmp_path):
    token = accounts.create(db, "ann")
    assert token is not None
    assert len(token) >= 43  # 256 bits
    assert accounts.find(db, token) == ("ann", "labeler")
    assert accounts.create(db, "ann") is None
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert token.encode() not in (tmp_path / "feedback.sqlite").read_bytes()
    for wrong in ("", token[:-1], token + "x", token.swapcase(), "\udcff"):
        assert accounts.find(db, wrong) is None


def test_a_new_token_ends_the_old_one(db):
    old = accounts.create(db, "ann")
    with pytest.raises(ValueError, match="there as labeler, not as admin"):
        accounts.create(db, "ann", "admin")
    new = accounts.create(db, "ann", "admin", renew=True)
    assert old is not None
    assert new is not None
    assert accounts.find(db, old) is None
    assert accounts.find(db, new) == ("ann", "admin")
    assert accounts.every(db) == [("ann", "admin")]


@pytest.mark.parametrize("name", ["", " ann", "a" * 65, "a\nb", "a\u202eb"])
def test_names_are_visible(db, name):
    with pytest.raises(ValueError, match="visible characters"):
        accounts.create(db, name)


def test_a_pair_that_was_withdrawn_is_shown_to_nobody(db):
    made, rules = _fill(db, 2), assignments.Rules(k=1, gold_share=0.5)
    gold = store.Pair("known", " right", " wrong")
    assignments.add_gold(db, [(gold, "a")])
    assert len(assignments.give(db, "ann", rules, 3)) >= 2
    store.withdraw(db, [made[0].id, gold.id])
    assert _ids(assignments.give(db, "ann", rules, 3)) == [made[1].id]
    with pytest.raises(assignments.NotGiven):
        _choose(db, made[0].id, "ann", rules)
    assert store.gold(db) == {}
    assert assignments.progress(db, "ann", rules).wanted == 1
