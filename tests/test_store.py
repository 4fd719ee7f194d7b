"""The feedback store: nothing is lost, nothing is counted twice, nothing is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import sqlite3
import subprocess
import sys
import threading

import pytest
from labelling import derived_is_true

from jaxrlhf.feedback import schema, store


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


def test_programs_may_create_the_store_at_once(tmp_path):
    program = (
        "import multiprocessing, sys; from jaxrlhf.feedback import store; fork = multiprocessing.get_context('fork')\n"
        "def create(path, barrier): barrier.wait(); store.open_store(path).close()\n"
        "for number in range(40):\n"
        "    barrier = fork.Barrier(4)\n"
        "    creators = [fork.Process(target=create, args=(f'{sys.argv[1]}/{number}', barrier)) for _ in range(4)]\n"
        "    for creator in creators: creator.start()\n"
        "    for creator in creators: creator.join()\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    for number in range(40):
        with contextlib.closing(store.open_store(tmp_path / str(number))) as db:
            assert store.pairs(db) == []


def test_a_store_made_while_another_program_looks_is_no_foreign_file(tmp_path):
    path = tmp_path / "feedback.sqlite"
    creator = threading.Thread(target=lambda: store.open_store(path).close())

    def create(statement: str) -> None:
        if "sqlite_master" in statement:
            creator.start()
            creator.join(timeout=0.3)  # as long as it may: what is read must be of one moment

    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as db:
        db.set_trace_callback(create)
        schema.prepare(db, path)
        creator.join()
        assert store.pairs(db) == []


def test_a_store_that_another_program_holds_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.05)
    path = tmp_path / "feedback.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match=r"database is locked.*end the program that holds it"):
            store.open_store(path)


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


FIRST_VERSION = pathlib.Path(__file__).parent / "golden" / "feedback_v1.sqlite"  # written by the program of version 1


def _rows(path) -> tuple[list, list]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return (
            db.execute("SELECT * FROM pairs ORDER BY number").fetchall(),
            db.execute("SELECT sequence, pair, labeler, choice, left_response, time FROM events ORDER BY sequence").fetchall(),
        )


def test_a_store_of_version_1_keeps_every_row(tmp_path):
    path = tmp_path / "old.sqlite"
    shutil.copy(FIRST_VERSION, path)
    before = _rows(path)
    assert (len(before[0]), len(before[1])) == (12, 19)
    with contextlib.closing(store.open_store(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
        standing = store.choices(db)
        assert len(standing) == 15  # 10 + 6 choices, 2 taken back, 1 made again
        assert {choice.schema for choice in standing} == {1}
        assert {(choice.strength, choice.note, choice.seconds, choice.id) for choice in standing} == {(None, "", None, None)}
        assert derived_is_true(db)
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute("UPDATE events SET note = 'x'")
        new = store.record(db, [store.Choice(store.pairs(db)[11].id, "eve", "left", "a", id="eight or more")])[0]
        assert (new.sequence, new.schema) == (20, schema.VERSION)
        assert derived_is_true(db)
    after = _rows(path)
    assert after[0] == before[0]
    assert after[1][:19] == before[1]


def test_an_old_store_becomes_what_a_new_one_is(tmp_path):
    def tables(path):
        with contextlib.closing(store.open_store(path)) as db:
            return db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()

    shutil.copy(FIRST_VERSION, tmp_path / "old.sqlite")
    assert tables(tmp_path / "old.sqlite") == tables(tmp_path / "new.sqlite")


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "old.sqlite"
    shutil.copy(FIRST_VERSION, path)
    before = _rows(path)
    monkeypatch.setattr(schema, "STEPS", (schema.STEPS[0], schema.STEPS[1] + "SELECT * FROM no_such_table;\n"))
    with pytest.raises(ValueError, match="no_such_table"):
        store.open_store(path)
    assert _rows(path) == before
    monkeypatch.undo()
    with contextlib.closing(store.open_store(path)) as db:
        assert len(store.choices(db)) == 15


def test_what_a_page_adds_to_a_choice_is_kept(db):
    store.add_pairs(db, [_pair(0)])
    said = store.Choice(_pair(0).id, "ann", "left", "b", 5.0, strength=3, note="it's <b>true</b>", seconds=2.5, id="f" * 32)
    kept = store.record(db, [said])[0]
    assert kept == dataclasses.replace(said, sequence=1)
    assert store.choices(db) == [kept]
    (row,) = store.preferences(db)
    assert (row["strength"], row["note"], row["seconds"], row["left"], row["chosen_is"]) == (
        3,
        "it's <b>true</b>",
        2.5,
        "b",
        "b",
    )
    assert row["schema"] == schema.VERSION
    assert store.undo(db, "ann", "undo-0001") == kept
    assert db.execute("SELECT strength, note, seconds FROM events WHERE choice = 'undo'").fetchone() == (None, "", None)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"strength": 4}, "strength 4"),
        ({"choice": "tie", "strength": 1}, "only of left or right"),
        ({"note": "x" * 2001}, "2001 characters"),
        ({"seconds": -1.0}, "seconds=-1"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"id": "short"}, "8 to 64"),
        ({"choice": "undo"}, "one of"),
    ],
)
def test_what_cannot_be_is_refused(db, more, said):
    store.add_pairs(db, [_pair(0)])
    fields = {"pair": _pair(0).id, "labeler": "ann", "choice": "left", "left_response": "a"} | more
    with pytest.raises(ValueError, match=said):
        store.record(db, [store.Choice(**fields)])
    assert store.choices(db) == []


def test_an_id_belongs_to_one_event(db):
    store.add_pairs(db, [_pair(0), _pair(1)])
    store.record(db, [store.Choice(_pair(0).id, "ann", "left", "a", id="number one")])
    with pytest.raises(ValueError, match="another event"):
        store.record(db, [store.Choice(_pair(1).id, "ann", "left", "a", id="number one")])
    with pytest.raises(ValueError, match="another labeler"):
        store.record(db, [store.Choice(_pair(0).id, "bob", "left", "a", id="number one")])
    with pytest.raises(ValueError, match="that of a choice"):
        store.undo(db, "ann", "number one")
    assert len(store.choices(db)) == 1


def _both(db) -> None:
    store.add_pairs(db, [_pair(1)])
    store.add_pairs(db, [store.Pair("p", "same", "same")])


def test_a_part_that_fails_leaves_the_rest(db):
    with schema.transaction(db):
        store.add_pairs(db, [_pair(0)])
        with pytest.raises(ValueError, match="leave such a pair out"), schema.transaction(db):
            _both(db)
        _choose(db, 0, "left")
    assert store.pairs(db) == [_pair(0)]
    assert len(store.choices(db)) == 1


def test_a_copy_made_while_writing_is_whole(db, tmp_path):
    """SQLite's own backup: what a person may run beside the server."""
    store.add_pairs(db, [_pair(number) for number in range(20)])
    for number in range(10):
        _choose(db, number, "left")
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.sqlite")) as copy:
        db.backup(copy, pages=1, progress=lambda *_: None)
    for number in range(10, 20):
        _choose(db, number, "left")
    with contextlib.closing(store.open_store(tmp_path / "copy.sqlite")) as copy:
        assert store.choices(copy) == store.choices(db, upto=10)


def test_what_is_withdrawn_is_in_no_file_and_no_result(db, tmp_path):
    store.add_pairs(
        db, [_pair(number) for number in range(4)] + [store.Pair("my secret prompt " * 2000, " my secret one", " b")]
    )
    secret = store.pairs(db)[4]
    _choose(db, 0, "left")
    store.record(db, [store.Choice(secret.id, "ann", "left", "a", note="a secret note")])
    _choose(db, 1, "left", labeler="bob")
    assert b"my secret" in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing was withdrawn"):
        store.withdraw(db, [secret.id, "unknown"])
    assert len(store.pairs(db)) == 5
    assert store.withdraw(db, [secret.id]) == 1
    assert store.withdraw(db, [secret.id]) == 0
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret not in store.pairs(db)
    assert [choice.sequence for choice in store.choices(db)] == [1, 3], "numbers stay"
    assert [row["prompt"] for row in store.preferences(db)] == ["prompt 0", "prompt 1"]
    assert derived_is_true(db)
    assert store.add_pairs(db, [secret]) == 0
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir()), "nor does it come back"
    assert store.undo(db, "ann").pair == _pair(0).id, "an undo passes over it"
    for statement in (
        f"UPDATE pairs SET prompt = 'x' WHERE id = '{secret.id}'",
        f"UPDATE events SET choice = 'right' WHERE pair = '{secret.id}'",
        f"UPDATE pairs SET prompt = '', response_a = '', response_b = '' WHERE id = '{_pair(0).id}'",
        "UPDATE events SET note = ''",
        "DELETE FROM withdrawn",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
