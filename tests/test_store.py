"""The feedback store: nothing is lost, nothing is counted twice, nothing is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import subprocess
import sys

import pytest

from jaxrlhf.feedback import store


@pytest.fixture
def db(tmp_path):
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as connection:
        yield connection


def _pair(number: int) -> store.Pair:
    return store.Pair(f"prompt {number}", f"first {number}", f"second {number}", "ppo", "sft", '{"top_p": 0.9}')


def _choose(db, number: int, word: str, labeler: str = "ann", left: str = "a") -> store.Choice:
    return store.record(db, [store.Choice(_pair(number).id, labeler, word, left)])[0]


def test_pairs_keep_their_order_and_are_added_once(db):
    assert store.add_pairs(db, [_pair(3), _pair(1)]) == 2
    assert store.add_pairs(db, [_pair(1), _pair(2)]) == 1
    assert store.pairs(db) == [_pair(3), _pair(1), _pair(2)]


def test_a_pair_is_known_by_its_texts_alone():
    elsewhere = dataclasses.replace(_pair(1), checkpoint_a="/another/folder", checkpoint_b="", sampling="{}")
    assert elsewhere.id == _pair(1).id
    ids = {
        store.Pair(*texts).id for texts in [("a", "b", "c"), ("a", "c", "b"), ("ab", "", "c"), ("", "ab", "c"), ("a", "bc", "")]
    }
    assert len(ids) == 5


def test_a_pair_of_equal_texts_is_refused(db):
    with pytest.raises(ValueError, match="leave such a pair out"):
        store.add_pairs(db, [_pair(0), store.Pair("p", "same", "same")])
    assert store.pairs(db) == []


@pytest.mark.parametrize(
    ("word", "left", "preferred"),
    [("left", "a", "a"), ("left", "b", "b"), ("right", "a", "b"), ("right", "b", "a"), ("tie", "a", None), ("skip", "b", None)],
)
def test_the_order_shown_decides_what_was_preferred(word, left, preferred):
    assert store.Choice("x", "ann", word, left).preferred == preferred


def test_a_repeated_choice_is_the_first_one(db):
    store.add_pairs(db, [_pair(0)])
    first = _choose(db, 0, "left")
    assert _choose(db, 0, "right") == first
    assert first.sequence == store.last_sequence(db) == 1
    assert _choose(db, 0, "right", labeler="bob").sequence == 2


def test_undo_is_a_new_event(db):
    store.add_pairs(db, [_pair(0), _pair(1)])
    _choose(db, 0, "left")
    _choose(db, 1, "right")
    _choose(db, 1, "tie", labeler="bob")
    assert store.undo(db, "ann").pair == _pair(1).id
    assert [choice.labeler for choice in store.choices(db)] == ["ann", "bob"]
    assert store.unlabelled(db, "ann") == [_pair(1)]
    assert _choose(db, 1, "left").sequence == 5
    assert db.execute("SELECT COUNT(*) FROM events").fetchone() == (5,)
    assert store.undo(db, "nobody") is None


def test_a_snapshot_never_changes(db):
    store.add_pairs(db, [_pair(0), _pair(1)])
    _choose(db, 0, "left")
    number, before = store.last_sequence(db), store.choices(db)
    _choose(db, 1, "left")
    store.undo(db, "ann")
    store.undo(db, "ann")
    assert store.choices(db) == []
    assert store.choices(db, upto=number) == before
    assert len(store.preferences(db, upto=number)) == 1


def test_rows_cannot_be_changed_or_removed(db):
    store.add_pairs(db, [_pair(0)])
    _choose(db, 0, "left")
    for statement in (
        "UPDATE events SET choice = 'right'",
        "DELETE FROM events",
        "UPDATE pairs SET prompt = ''",
        "DELETE FROM pairs",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)


def test_a_batch_is_recorded_whole_or_not_at_all(db):
    store.add_pairs(db, [_pair(0)])
    good = store.Choice(_pair(0).id, "ann", "left", "a")
    for bad in (store.Choice("unknown", "ann", "left", "a"), store.Choice(_pair(0).id, "bob", "undo", "a")):
        with pytest.raises(ValueError, match=r"not in the store|one of"):
            store.record(db, [good, bad])
    assert store.choices(db) == []


def test_preferences_put_the_chosen_first(db):
    store.add_pairs(db, [_pair(number) for number in range(6)])
    for number, (word, left) in enumerate(
        [("left", "a"), ("left", "b"), ("right", "a"), ("tie", "b"), ("skip", "a"), ("both_bad", "a")]
    ):
        _choose(db, number, word, left=left)
    rows = store.preferences(db)
    assert [row["chosen"] for row in rows] == ["first 0", "second 1", "second 2"]
    assert [row["checkpoint_chosen"] for row in rows] == ["ppo", "sft", "sft"]
    assert [row["rejected"] for row in rows] == ["second 0", "first 1", "first 2"]
    assert not any(row["tie"] for row in rows)
    assert [row["tie"] for row in store.preferences(db, ties=True)] == [False, False, False, True]


def test_strange_texts_come_back_unchanged(db):
    strange = store.Pair("\x1b[31m'; DROP TABLE pairs; --", "zero\u200bwidth \u202e rtl", "nul \x00 and 🙂")
    store.add_pairs(db, [strange])
    assert store.pairs(db) == [strange]


def test_settings_that_durability_rests_on(tmp_path):
    path = tmp_path / "feedback.sqlite"
    with contextlib.closing(store.open_store(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        store.add_pairs(db, [_pair(0)])
        with contextlib.closing(store.open_store(path)) as second:
            _choose(second, 0, "left")
        assert len(store.choices(db)) == 1


def test_a_choice_survives_a_killed_program(tmp_path):
    path = tmp_path / "feedback.sqlite"
    program = (
        "import os, sys; from jaxrlhf.feedback import store; db = store.open_store(sys.argv[1]);"
        "pair = store.Pair('p', 'a', 'b'); store.add_pairs(db, [pair]);"
        "store.record(db, [store.Choice(pair.id, 'ann', 'left', 'a')]); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -9
    with contextlib.closing(store.open_store(path)) as db:
        assert [choice.choice for choice in store.choices(db)] == ["left"]


def test_two_programs_may_create_the_store_at_once(tmp_path):
    path = tmp_path / "feedback.sqlite"
    program = "import sys; from jaxrlhf.feedback import store; store.open_store(sys.argv[1]).close()"
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(path)], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [(process.communicate()[1], process.returncode) for process in running] == [("", 0)] * 3


def test_files_that_are_no_store_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        store.open_store(tmp_path / "absent" / "feedback.sqlite")
    text = tmp_path / "text"
    text.write_text("not a data base" * 100)
    with pytest.raises(ValueError, match="not a readable feedback store"):
        store.open_store(text)
    assert text.read_text() == "not a data base" * 100
    foreign = tmp_path / "foreign"
    with contextlib.closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(ValueError, match="of another program"):
        store.open_store(foreign)
    newer = tmp_path / "newer"
    with contextlib.closing(store.open_store(newer)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="99 is newer"):
        store.open_store(newer)


def test_a_damaged_store_is_refused(tmp_path):
    path = tmp_path / "feedback.sqlite"
    with contextlib.closing(store.open_store(path)) as db:
        store.add_pairs(db, [_pair(number) for number in range(300)])
    content = bytearray(path.read_bytes())
    for at in range(4096, len(content), 4096):  # the head of every page but the first
        content[at : at + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged|not a readable"):
        store.open_store(path)
