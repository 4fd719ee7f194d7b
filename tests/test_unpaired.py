"""Judgements of single answers and consent: events, what stands, what is withdrawn, and what KTO reads."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3

import pytest
from test_store import FIRST_VERSION

from jaxrlhf.feedback import schema, store, unpaired
from jaxrlhf.feedback.unpaired import Rating


@pytest.fixture
def db(tmp_path):
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as made:
        yield made


def test_the_latest_judgement_stands_and_the_same_twice_is_one(db):
    good, bad = (Rating("p", " one", "ann", value, "v1", '{"seed": 1}') for value in (True, False))
    other = Rating("p", " two", "ann", True)
    assert unpaired.add(db, [good, good, other]) == 2
    assert unpaired.add(db, [good]) == 0
    assert unpaired.ratings(db) == [good, other]
    assert unpaired.add(db, [bad, Rating("p", " one", "bob", True)]) == 2
    assert unpaired.ratings(db) == [other, bad, Rating("p", " one", "bob", True)]
    assert unpaired.ratings(db, upto=2) == [good, other], "the same rows for ever"
    assert unpaired.rows(db)[1] == {"prompt": "p", "completion": " one", "label": False}


def test_consent_is_given_and_taken_back(db):
    assert not unpaired.consented(db, "ann")
    for given in (True, True, False, True):
        unpaired.consent(db, "ann", given, "may we?")
        assert unpaired.consented(db, "ann") == given
    assert not unpaired.consented(db, "bob")
    assert db.execute("SELECT given FROM consents ORDER BY sequence").fetchall() == [(1,), (0,), (1,)]


def test_what_is_withdrawn_leaves_its_event_without_texts(db):
    mine, other = Rating("secret", " answer", "ann", True), Rating("p", " two", "bob", False)
    unpaired.add(db, [mine, other])
    unpaired.withdraw(db, mine.answer)
    unpaired.withdraw(db, mine.answer)
    assert unpaired.ratings(db) == [other]
    assert db.execute("SELECT prompt, response, person FROM ratings WHERE sequence = 1").fetchone() == ("", "", "ann")
    with pytest.raises(ValueError, match="no judgement of an answer"):
        unpaired.withdraw(db, "0" * 24)


@pytest.mark.parametrize("table", ["consents", "ratings", "withdrawn_answers"])
def test_nothing_is_changed_or_removed(db, table):
    mine = Rating("p", " one", "ann", True)
    unpaired.consent(db, "ann", True, "may we?")
    unpaired.add(db, [mine])
    unpaired.withdraw(db, mine.answer)
    column = {"consents": "given = 0", "ratings": "good = 0", "withdrawn_answers": "time = 0"}[table]
    for statement in (f"UPDATE {table} SET {column}", f"DELETE FROM {table}"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)


def test_a_store_of_version_2_gets_the_tables(tmp_path, monkeypatch):
    """Made by the steps up to 2, filled, then opened by this program: every choice is there, and judgements can be kept."""
    path = tmp_path / "old.sqlite"
    shutil.copy(FIRST_VERSION, path)
    with monkeypatch.context() as before:
        before.setattr(schema, "STEPS", schema.STEPS[:2])
        before.setattr(schema, "VERSION", 2)
        with contextlib.closing(store.open_store(path)) as db:
            choices = store.choices(db)
            assert db.execute("PRAGMA user_version").fetchone() == (2,)
            assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'ratings'").fetchall()
    with contextlib.closing(store.open_store(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (3,)
        assert store.choices(db) == choices
        assert unpaired.ratings(db) == []
        assert unpaired.add(db, [Rating("p", " one", "ann", True)]) == 1
