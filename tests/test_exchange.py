"""Choices out and in again: JSON lines, parquet, TFDS; files of strangers; gold answers."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest

from jaxrlhf.data import sources, tfds_preferences
from jaxrlhf.feedback import assignments, exchange, store


def _open(path):
    return contextlib.closing(store.open_store(path))


def _without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.fixture
def rows(tmp_path):
    """What a store with every kind of choice exports."""
    with _open(tmp_path / "first.sqlite") as db:
        writers = ("runs/a", "runs/b", '{"top_p": 0.9}'), ("runs/a", "", "{}")
        made = [store.Pair(f"prompt {i} é🙂", f" first {i}\n\u2028", f" second {i}", *writers[i % 2]) for i in range(12)]
        store.add_pairs(db, made)
        words = ("left", "right", "tie", "skip", "both_bad", "left")
        for i, pair in enumerate(made):
            for who in ("ann", "bob") if i % 3 else ("ann",):
                word, left = words[(i + len(who)) % 6], store.left_response(pair.id, who)
                said = store.Choice(pair.id, who, word, left, 1_700_000_000.25 + i)
                if said.preferred and i % 2:
                    said = dataclasses.replace(said, strength=1 + i % 3, note=f"why {i}", seconds=i / 7)
                store.record(db, [said])
        store.undo(db, "ann")
        return store.preferences(db, ties=True)


@pytest.mark.parametrize("name", ["choices.jsonl", "choices.parquet", "choices"])
def test_a_store_made_of_what_another_exported_exports_the_same(rows, tmp_path, name):
    place = exchange.write(tmp_path / name, rows)
    read = exchange.read(place)
    added = {"margin", "weight"}  # defaults that reading fills in
    absent = [{k for k, v in row.items() if v is None} for row in rows]
    assert [{k: v for k, v in row.items() if k not in added and v is not None} for row in read] == [
        {k: v for k, v in row.items() if k not in gone} for row, gone in zip(rows, absent, strict=True)
    ]
    with _open(tmp_path / "second.sqlite") as db:
        assert exchange.add_rows(db, read) == len(rows)
        assert exchange.add_rows(db, read) == 0, "the same file again adds nothing"
        assert _without(store.preferences(db, ties=True), "sequence") == _without(rows, "sequence")


def test_the_columns_are_those_of_hugging_face(rows, tmp_path):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(exchange.write(tmp_path / "choices.parquet", rows))
    kinds = {name: str(table.schema.field(name).type) for name in ("prompt", "chosen", "rejected", "tie")}
    assert kinds == {"prompt": "string", "chosen": "string", "rejected": "string", "tie": "bool"}
    first = json.loads((exchange.write(tmp_path / "choices.jsonl", rows)).read_text().split("\n")[0])
    assert first == rows[0]
    assert exchange.jsonl(rows) == (tmp_path / "choices.jsonl").read_text()


def test_rows_of_strangers_need_no_more_than_three_fields(tmp_path):
    plain = [{"prompt": f"p{i}", "chosen": f" good {i * 7919 % 1000}", "rejected": f" bad {i}"} for i in range(60)]
    plain += [{"prompt": f"q{i}", "chosen": f" a {i}", "rejected": f" b {i}"} for i in range(60)]
    sources.write_jsonl(tmp_path / "theirs.jsonl", plain)
    with _open(tmp_path / "feedback.sqlite") as db:
        assert exchange.add_rows(db, exchange.read(tmp_path / "theirs.jsonl"), labeler="theirs") == 120
        found = store.preferences(db)
        assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [tuple(row.values()) for row in plain]
        assert {row["labeler"] for row in found} == {"theirs"}
        # Neither the letter nor the side gives the chosen one away.
        assert {pair.response_a.split()[0] for pair in store.pairs(db) if pair.prompt[0] == "p"} == {"bad"}
        assert {choice.choice for choice in store.choices(db)} == {"left", "right"}


def test_a_bad_row_adds_nothing(rows, tmp_path):
    with _open(tmp_path / "second.sqlite") as db:
        for wrong in ({"strength": 9}, {"left": "c"}, {"chosen_is": "x"}, {"seconds": "long"}, {"schema": "x"}):
            with pytest.raises(ValueError, match="row 3"):
                exchange.add_rows(db, [*rows[:2], rows[2] | wrong])
        assert store.pairs(db) == []


def test_files_that_hold_no_choices_are_named(rows, tmp_path):
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "choices.csv").write_text("prompt,chosen,rejected\n")
    for name, said in (("text.parquet", "not a readable parquet"), ("choices.csv", "are read from")):
        with pytest.raises(ValueError, match=said):
            exchange.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.parquet"):
        exchange.read(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        exchange.write(tmp_path / "choices.csv", rows)
    with pytest.raises(ValueError, match="no choices to write"):
        exchange.write(tmp_path / "choices.jsonl", [])


def test_conversations_in_parquet_are_refused_by_row_and_field(tmp_path):
    import pyarrow
    import pyarrow.parquet

    turns = [[{"role": "user", "content": "hi"}]]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": turns, "chosen": ["a"], "rejected": ["b"]}), tmp_path / "chat.parquet")
    with pytest.raises(ValueError, match=r"chat\.parquet:1: prompt: must be text, not a list"):
        exchange.read(tmp_path / "chat.parquet")


def test_gold_answers_come_from_rows_too(tmp_path):
    lines = [{"prompt": "p", "chosen": " right", "rejected": " a wrong one"}]
    lines.append({"prompt": "q", "chosen": " x", "rejected": " y", "tie": True})
    sources.write_jsonl(tmp_path / "gold.jsonl", lines)
    with _open(tmp_path / "feedback.sqlite") as db:
        assert assignments.add_gold(db, exchange.as_gold(tfds_preferences.read_jsonl(tmp_path / "gold.jsonl"))) == 2
        known = store.gold(db)
        first, second = store.pairs(db)
        assert (first.response_a, known[first.id]) == (" a wrong one", "b")
        assert known[second.id] == "tie"


def test_the_script_reads_writes_and_marks_gold(rows, tmp_path):
    from experiments import choices

    exchange.write(tmp_path / "all.parquet", rows)
    sources.write_jsonl(tmp_path / "gold.jsonl", [{"prompt": "p", "chosen": " right", "rejected": " wrong"}])
    place = tmp_path / "new.sqlite"
    done = choices.run(choices.Config(store=place, read=tmp_path / "all.parquet", gold=tmp_path / "gold.jsonl"))
    assert done == {"read": len(rows), "gold": 1}
    done = choices.run(choices.Config(store=place, write=tmp_path / "again.jsonl", upto=3))
    assert (done["written"], done["upto"]) == (3, len(rows))
    assert [row["sequence"] for row in exchange.read(tmp_path / "again.jsonl")] == [1, 2, 3]
    with _open(place) as db:
        broken = store.Pair("p", " a\0", " b", "", "", "{}")
        store.add_pairs(db, [broken])
        store.record(db, [store.Choice(broken.id, "ann", "left", "a")])
    done = choices.run(choices.Config(store=place, write=tmp_path / "all.jsonl"))
    assert (done["written"], done["unreadable"]) == (len(rows), 1)  # NUL, which a reader would refuse
    assert len(exchange.read(tmp_path / "all.jsonl")) == len(rows)
    with pytest.raises(ValueError, match="nothing to do"):
        choices.run(choices.Config(store=place))
    with pytest.raises(FileNotFoundError, match="no feedback store"):
        choices.run(choices.Config(store=tmp_path / "none.sqlite", write=tmp_path / "x.jsonl"))
