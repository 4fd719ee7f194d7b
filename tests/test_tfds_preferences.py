"""Preference rows: checked, written as JSON lines and as TFDS, and read back exactly, without tensorflow."""

from __future__ import annotations

import json
import sys

import pytest

from jaxrlhf.data import sources, tfds_preferences

ROWS = [
    {"prompt": "the film is", "chosen": " great", "rejected": ", bad"},
    {"prompt": "é\u2028界", "chosen": "", "rejected": " x\ny", "margin": 0.25, "weight": 2, "labeler": "ann", "pair": "7"},
    {"prompt": "a", "chosen": " b", "rejected": " b", "tie": True, "checkpoint_chosen": "ppo", "sampling": {"top_p": 0.9}},
]
FULL = [{**tfds_preferences.DEFAULTS, **row} for row in ROWS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    many = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(1100)]
    return tfds_preferences.write_tfds(tmp_path_factory.mktemp("tfds"), {"train": many, "test": ROWS})


def test_tfds_reads_back_what_was_written(folder):
    assert folder.parts[-2:] == ("human_preferences", "1.0.0")
    assert tfds_preferences.read_tfds(folder, "test") == FULL
    train = tfds_preferences.read_tfds(folder, "train")
    assert [row["prompt"] for row in train] == [str(i) for i in range(1100)]  # all of them, in order
    assert "tensorflow" not in sys.modules


def test_a_tfds_source_has_random_access(folder):
    source = sources.open_tfds(folder, "train")
    assert len(source) == 1100
    assert source[700]["prompt"] == "700"
    assert source[-1]["prompt"] == "1099"
    assert type(source[0]["margin"]) is float
    assert type(source[0]["tie"]) is bool
    with pytest.raises(IndexError):
        source[1100]


def test_the_source_feeds_grain(folder):
    import grain

    data = grain.MapDataset.source(sources.open_tfds(folder, "train")).seed(0).shuffle().map(lambda row: int(row["prompt"]))
    assert sorted(data[i] for i in range(1100)) == list(range(1100))


def test_tfds_itself_reads_the_folder(folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    assert builder.info.splits["test"].num_examples == 3
    assert builder.as_data_source(split="test")[0]["prompt"] == b"the film is"


def test_nothing_is_overwritten(folder):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    with pytest.raises(ValueError, match=r"human_preferences/1\.0\.0: already there"):
        tfds_preferences.write_tfds(folder.parent.parent, {"train": ROWS})
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())


def test_a_bad_row_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="train:1: chosen: missing field"):
        tfds_preferences.write_tfds(tmp_path, {"train": [ROWS[0], {"prompt": "a"}]})
    with pytest.raises(ValueError, match="split 'test' has no rows"):
        tfds_preferences.write_tfds(tmp_path, {"train": ROWS, "test": []})
    assert not list(tmp_path.iterdir())


def test_writing_says_nothing(tmp_path, capfd):
    tfds_preferences.write_tfds(tmp_path, {"train": ROWS})
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


def test_wrong_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a TFDS folder \(no dataset_info\.json\)"):
        sources.open_tfds(tmp_path, "train")
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
        sources.open_tfds(folder, "dev")


def test_a_folder_that_lost_rows_is_noticed(tmp_path):
    folder = tfds_preferences.write_tfds(tmp_path, {"train": ROWS})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["5"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="split 'train'"):
        sources.open_tfds(folder, "train")
    for file in folder.glob("*.array_record*"):
        file.unlink()
    with pytest.raises(ValueError, match="split 'train'"):
        sources.open_tfds(folder, "train")


@pytest.mark.parametrize("damage", ["half", "empty", "flipped"])
def test_a_damaged_record_file_is_named(tmp_path, damage):
    folder = tfds_preferences.write_tfds(tmp_path, {"train": ROWS})
    (file,) = folder.glob("*.array_record*")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[100] ^= 255
    file.write_bytes({"half": content[: len(content) // 2], "empty": b"", "flipped": content}[damage])
    with pytest.raises(ValueError, match=r"human_preferences/1\.0\.0.*train.*(is damaged|cannot be read) \("):
        tfds_preferences.read_tfds(folder, "train")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x", "version": "1"}'])
def test_a_damaged_description_is_named(tmp_path, content):
    folder = tfds_preferences.write_tfds(tmp_path, {"train": ROWS})
    (folder / "dataset_info.json").write_text(content)
    with pytest.raises(ValueError, match=r"human_preferences/1\.0\.0: damaged TFDS folder \(.*\); prepare it again"):
        sources.open_tfds(folder, "train")


def test_a_format_that_loses_rows_is_refused(tmp_path):
    folder = tfds_preferences.write_tfds(tmp_path, {"train": ROWS})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "parquet"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="file format 'parquet'; prepare the set with file_format='array_record'"):
        sources.open_tfds(folder, "train")


def test_rows_lost_while_writing_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_preferences.sources, "open_tfds", lambda path, split: ROWS[:2])
    with pytest.raises(ValueError, match=r"split 'train' holds 2 of 3 rows written"):
        tfds_preferences.write_tfds(tmp_path, {"train": ROWS})


def test_a_set_of_somebody_else_is_checked(tmp_path, monkeypatch):
    folder = tfds_preferences.write_tfds(tmp_path, {"train": ROWS})
    schema = sources.Schema({"prompt": str, "answer": str})
    monkeypatch.setattr(tfds_preferences, "SCHEMA", schema)
    with pytest.raises(ValueError, match=r"1\.0\.0:train:0: answer: missing field"):
        tfds_preferences.read_tfds(folder, "train")


def test_json_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    sources.write_jsonl(path, ROWS)
    assert tfds_preferences.read_jsonl(path) == FULL


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rejected": " great"}, "rejected: the same text as chosen"),
        ({"weight": -1}, "weight: must be a number >= 0, not -1.0"),
        ({"weight": "1"}, "weight: must be a number, not text"),
        ({"prompt": ""}, "prompt: is empty"),
        ({"tie": 0}, "tie: must be true or false, not an integer"),
        ({"labler": "ann"}, "labler: unknown field; did you mean 'labeler'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, problem):
    path = tmp_path / "pairs.jsonl"
    sources.write_jsonl(path, [ROWS[1], ROWS[0] | change])
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2: {problem}"):
        tfds_preferences.read_jsonl(path)


@pytest.mark.parametrize("name", ["margin", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_in_memory_must_be_finite(name, value):
    with pytest.raises(ValueError, match=f"x: {name}: must be a "):
        tfds_preferences.check(ROWS[0] | {name: value}, "x")
