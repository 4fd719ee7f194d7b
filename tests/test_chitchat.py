"""Chat text: what is kept, what is left out, and what is said when the package is absent."""

from __future__ import annotations

import importlib.util
import json

import pytest

from jaxrlhf.data import chitchat


def test_keep():
    assert chitchat.keep("hi there")
    assert chitchat.keep("I was born in 1987, room 123-4567")
    refused = ["hi", "x" * 251, "café time", "me@example.com", "call 555 123 4567", "call (555) 123-4567", "5551234567"]
    assert not any(map(chitchat.keep, refused))


DATA = [
    [["hello", "how are you"], ["x@y.zz", "fine"], ["good", "so"]],
    [["one turn only"]],
    [["first here"], [], ["reply here"]],
    [["question?"], ["answer!", "more"]],
]


def test_messages_are_all_that_is_kept_in_order():
    expected = ["hello", "how are you", "fine", "good", "one turn only", "first here", "reply here", "question?"]
    assert chitchat.messages(DATA) == [*expected, "answer!", "more"]


def test_pairs_join_the_end_of_a_turn_to_the_start_of_the_next():
    assert chitchat.pairs(DATA) == [("fine", "good"), ("question?", "answer!")]


def _install(monkeypatch, tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    spec = importlib.util.spec_from_loader("chitchat_dataset", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_the_file_of_the_package_is_read(monkeypatch, tmp_path):
    chat = {"messages": [[{"text": "hello", "sender": "a"}], [{"text": "hi you", "sender": "b"}]], "prompt": "?"}
    _install(monkeypatch, tmp_path, json.dumps({"id": chat}))
    assert chitchat.chats() == [[["hello"], ["hi you"]]]
    assert chitchat.messages() == ["hello", "hi you"]
    assert chitchat.pairs() == [("hello", "hi you")]


@pytest.mark.parametrize("text", ["{", "[1]", '{"id": {}}', '{"id": {"messages": [[1]]}}', ""])
def test_a_damaged_file_is_named(monkeypatch, tmp_path, text):
    _install(monkeypatch, tmp_path, text)
    with pytest.raises(ValueError, match=r"dataset\.json: not the chitchat data \(.*\); reinstall chitchat-dataset"):
        chitchat.chats()


def test_an_absent_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxrlhf\[loop\]'"):
        chitchat.chats()


def test_the_real_data():
    pytest.importorskip("chitchat_dataset")
    data = chitchat.chats()
    assert len(data) == 7168
    messages = chitchat.messages(data)
    assert len(messages) == 254_028
    assert sum(map(len, messages)) == 12_464_089
    assert (
        sum(chitchat.SHORTEST <= len(t) <= chitchat.LONGEST and t.isascii() for c in data for turn in c for t in turn) > 254_028
    )
