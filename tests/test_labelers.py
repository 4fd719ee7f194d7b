"""Simulated people: their taste, their errors, their sides; a person at a terminal."""

from __future__ import annotations

import contextlib
import io
import sys

import numpy as np
import pytest

from jaxrlhf.feedback import labelers, store
from jaxrlhf.feedback.labelers import Person


def judge(texts):
    """Taste for large numbers."""
    return np.array([float(text.split()[-1]) for text in texts])


def _pairs(n: int) -> list[store.Pair]:
    numbers = np.random.default_rng(0).integers(0, 1000, (n, 2)).tolist()
    return [store.Pair(f"p{i}", f" {a}", f" {b}") for i, (a, b) in enumerate(numbers) if a != b]


def _errors(choices, pairs):
    better = {pair.id: "a" if int(pair.response_a) > int(pair.response_b) else "b" for pair in pairs}
    return np.mean([choice.preferred != better[choice.pair] for choice in choices])


@pytest.fixture
def db(tmp_path):
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as connection:
        yield connection


def test_without_noise_the_judge_is_followed():
    pairs = _pairs(300)
    choices = labelers.simulated(pairs, judge, "sim", Person(noise=0.0))
    assert _errors(choices, pairs) == 0
    assert 0.4 < np.mean([choice.left_response == "a" for choice in choices]) < 0.6
    assert 0.4 < np.mean([choice.choice == "left" for choice in choices]) < 0.6


def test_the_share_of_errors_is_the_noise():
    pairs = _pairs(4000)
    assert _errors(labelers.simulated(pairs, judge, "sim"), pairs) == pytest.approx(0.1, abs=0.02)  # 4 standard errors


def test_an_answer_depends_on_the_pair_alone():
    pairs = _pairs(200)
    forward = labelers.simulated(pairs, judge, "sim", Person(noise=0.3), 1)
    backward = labelers.simulated(pairs[::-1], judge, "sim", Person(noise=0.3), 1)
    assert forward == backward[::-1]
    assert forward[50:60] == labelers.simulated(pairs[50:60], judge, "sim", Person(noise=0.3), 1)
    assert forward != labelers.simulated(pairs, judge, "sim", Person(noise=0.3), 2)


def test_near_equal_judgements_are_ties():
    pairs = [store.Pair("p", " 10", " 12"), store.Pair("p", " 10", " 14")]
    assert [c.choice == "tie" for c in labelers.simulated(pairs, judge, "sim", Person(tie_gap=2.0))] == [True, False]
    assert labelers.simulated([], judge, "sim") == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"noise": 0.6}, r"noise=0\.6"),
        ({"tie_gap": -1.0}, "tie_gap=-1"),
        ({"lazy": 1.5}, r"lazy=1\.5"),
        ({"unread": "right"}, "unread='right'"),
        ({"taste_drift": -0.1}, "taste_drift=-0"),
        ({"noise_drift": float("nan")}, "must be finite"),
    ],
)
def test_impossible_settings_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        Person(**given)


def _share(choices, of) -> float:
    return float(np.mean([of(choice) for choice in choices]))


def test_the_lazy_take_the_left_one_unread():
    """Of those who read none, all; of those who do not read a third, half of the rest is at the left as well."""
    pairs = _pairs(2500)
    assert _share(labelers.simulated(pairs, judge, "sim", Person(lazy=1.0)), lambda c: c.choice == "left") == 1
    some = labelers.simulated(pairs, judge, "sim", Person(noise=0.0, lazy=0.3))
    assert _share(some, lambda c: c.choice == "left") == pytest.approx(0.3 + 0.7 / 2, abs=0.04)  # 4 standard errors
    assert _errors(some, pairs) == pytest.approx(0.15, abs=0.03)


def test_the_lazy_may_take_the_shorter_one():
    pairs = [store.Pair(f"p{i}", " 7" + " 1" * (1 + i % 3), " 7" + " 1" * (1 + i % 2)) for i in range(2000)]
    lengths = {pair.id: (len(pair.response_a), len(pair.response_b)) for pair in pairs}
    unread = labelers.simulated(pairs, judge, "sim", Person(lazy=1.0, unread="shorter"))
    for choice in unread:
        a, b = lengths[choice.pair]
        assert choice.choice == "left" if a == b else choice.preferred == ("a" if a < b else "b")
    some = labelers.simulated(pairs, judge, "sim", Person(tie_gap=0.0, lazy=0.25, unread="shorter"))
    assert _share(some, lambda c: c.choice != "tie") == pytest.approx(0.25, abs=0.04)  # whoever reads finds all alike: ties


def test_position_bias_turns_what_is_nearer_than_it():
    pairs, bias = _pairs(3000), 100.0
    said = labelers.simulated(pairs, judge, "sim", Person(noise=0.0, left=bias))
    turned = 0
    for pair, choice in zip(pairs, said, strict=True):
        lead = int(pair.response_a) - int(pair.response_b)
        lead = lead if choice.left_response == "a" else -lead  # of the left one
        expected = "tie" if lead == -bias else "left" if lead > -bias else "right"
        assert choice.choice == expected
        turned += -bias < lead < 0
    assert turned > 200  # of two numbers below 1,000 a tenth is so near, and behind at the left


def test_errors_grow_with_the_choices_made():
    pairs, person = _pairs(1000), Person(noise=0.05, noise_drift=0.1)
    for made in (0, 2000, 4000):  # 0.05 at first, then 0.1 more every 1,000 choices, until chance
        mean = np.clip(0.05 + 0.1 * np.arange(made, made + len(pairs)) / 1000, 0, 0.5).mean()
        said = labelers.simulated(pairs, judge, "sim", person, made=made)
        assert _errors(said, pairs) == pytest.approx(mean, abs=4 * np.sqrt(mean * (1 - mean) / len(pairs)))
    tired = labelers.simulated(pairs, judge, "sim", person, made=100_000)
    assert _errors(tired, pairs) == pytest.approx(0.5, abs=0.065)
    learning = labelers.simulated(pairs, judge, "sim", Person(noise=0.4, noise_drift=-0.1), made=4000)
    assert _errors(learning, pairs) == 0


def test_taste_turns_to_the_longer_answer():
    pairs, person = [store.Pair(f"p{i}", " 9", " words 1") for i in range(1000)], Person(noise=0.0, taste_drift=0.2)
    for made in (0, 2000, 4000):
        mean = 0.2 * (made + 500) / 1000
        longer = _share(labelers.simulated(pairs, judge, "sim", person, made=made), lambda c: c.preferred == "b")
        assert longer == pytest.approx(mean, abs=4 * np.sqrt(mean * (1 - mean) / 1000))
    assert _share(labelers.simulated(pairs, judge, "sim", person, made=5000), lambda c: c.preferred == "b") == 1


def test_drift_counts_the_choices_in_the_store(db):
    """Labelling in two sittings says what one says, and no fault that is off touches another's draw."""
    pairs, person = _pairs(600), Person(noise=0.1, noise_drift=0.4, taste_drift=0.3, lazy=0.1)
    store.add_pairs(db, pairs)
    assert labelers.label_simulated(db, judge, "sim", person, limit=200) == 200
    labelers.label_simulated(db, judge, "other", limit=50)
    assert labelers.label_simulated(db, judge, "sim", person) == 400 - (600 - len(pairs))
    said = [(choice.pair, choice.choice) for choice in store.choices(db) if choice.labeler == "sim"]
    assert said == [(choice.pair, choice.choice) for choice in labelers.simulated(pairs, judge, "sim", person)]


def test_simulated_labelling_goes_on_where_it_stopped(db):
    pairs = _pairs(40)
    store.add_pairs(db, pairs[:15])
    assert labelers.label_simulated(db, judge, "sim") == 15
    store.add_pairs(db, pairs)
    assert labelers.label_simulated(db, judge, "sim") == len(pairs) - 15
    assert labelers.label_simulated(db, judge, "sim") == 0
    stored = [(choice.pair, choice.choice) for choice in store.choices(db)]
    assert stored == [(choice.pair, choice.choice) for choice in labelers.simulated(pairs, judge, "sim")]


def _sit(db, keys: str, **options):
    shown, waiting = [], iter(keys)
    done = labelers.label_at_terminal(db, "ann", read=lambda: next(waiting, ""), write=shown.append, **options)
    return done, "\n".join(shown)


def test_a_person_chooses_takes_back_and_comes_again(db):
    pairs = _pairs(5)
    store.add_pairs(db, pairs)
    done, shown = _sit(db, "1x2uTq")  # one, a key that means nothing, two, taken back, tie, stop
    assert done == 2
    assert "Taken back." in shown
    assert [choice.choice for choice in store.choices(db)] == ["left", "tie"]
    assert [choice.left_response for choice in store.choices(db)] == [store.left_response(p.id, "ann") for p in pairs[:2]]
    done, shown = _sit(db, "usb")
    assert "Nothing to take back" in shown
    assert done == 2
    assert _sit(db, "11", limit=1)[0] == 1
    done, shown = _sit(db, "1")
    assert (done, "No pair is left." in shown) == (0, True)


def test_a_person_may_be_asked_about_one_pair_alone(db):
    pairs = _pairs(4)
    store.add_pairs(db, pairs)
    assert _sit(db, "11", pair=pairs[2])[0] == 1
    assert [choice.pair for choice in store.choices(db)] == [pairs[2].id]


def test_left_key_takes_the_response_shown_first(db):
    store.add_pairs(db, _pairs(12))
    for pair in store.pairs(db):
        left = store.left_response(pair.id, "ann")
        first = pair.response_a if left == "a" else pair.response_b
        assert f"1)  ...{first}\n" in labelers.show(pair, left, 1, 12)
    _sit(db, "1" * 12)
    assert all(choice.preferred == choice.left_response for choice in store.choices(db))


def test_the_terminal_obeys_no_response():
    hostile = "\x1b[2Jchoose me\x07\u202e\u200b\nsecond line"
    assert labelers.visible(hostile) == "\\u{1b}[2Jchoose me\\u{7}\\u{202e}\\u{200b} second line"
    assert labelers.visible("plain é 🙂") == "plain é 🙂"


def test_keys_from_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 because\n\n"))
    assert [labelers.read_key(), labelers.read_key(), labelers.read_key()] == ["2", "\n", ""]


def test_one_key_from_a_terminal(monkeypatch):
    import os
    import pty

    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(ours, b"1")
        assert labelers.read_key() == "1"
    os.close(ours)
