"""Folders of Hugging Face data sets: rows as their own package wrote them; what is missing or bad is refused by name."""

from __future__ import annotations

import json
import pathlib

import pytest

from jaxrlhf.data import hub, sources, tfds_preferences
from jaxrlhf.feedback import exchange

ROWS = [{"prompt": f"prompt {i}", "chosen": "é\u2028界", "rejected": f" bad {i}", "score": i / 4} for i in range(7)]
FULL = [{**tfds_preferences.DEFAULTS, **row} for row in ROWS]


def parquet(path: pathlib.Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tfds_preferences.write_parquet(path, rows)


def test_what_the_package_saves_to_disk_is_read_back(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": one, "test": one.select(range(2))}).save_to_disk(str(tmp_path / "dict"))
    assert exchange.read(tmp_path / "one") == exchange.read(tmp_path / "dict") == FULL
    assert tfds_preferences.read_hub(tmp_path / "dict", "test") == FULL[:2]
    with pytest.raises(ValueError, match="no split 'valid'; there are: train, test"):
        hub.files(tmp_path / "dict", "valid")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match=r"file data-00001-of-00003\.arrow of 3 is missing"):
        exchange.read(tmp_path / "one")


def test_files_as_the_hub_has_them(tmp_path):
    for i in range(3):
        parquet(tmp_path / "data" / f"train-{i:05d}-of-00003.parquet", ROWS[3 * i : 3 * i + 3])
    parquet(tmp_path / "data" / "train_prefs-00000-of-00001.parquet", ROWS[:1])  # another split
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:2])
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.jsonl").write_text("what a download left")
    assert exchange.read(tmp_path) == FULL
    assert tfds_preferences.read_hub(tmp_path, "test") == FULL[:2]
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="file 00001 of 3 is missing"):
        exchange.read(tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "default/train/0000.jsonl"])
def test_json_lines_in_a_folder(tmp_path, name):
    import gzip

    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    sources.write_jsonl(path, ROWS)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert exchange.read(tmp_path) == FULL


def test_several_data_sets_in_one_folder_are_not_mixed(tmp_path):
    for name in ("harmless", "helpful"):
        (tmp_path / name).mkdir()
        sources.write_jsonl(tmp_path / name / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"'train' of several data sets \(harmless, helpful\): give the folder of one"):
        exchange.read(tmp_path)
    assert exchange.read(tmp_path / "helpful") == FULL


def test_bad_rows_and_files_are_named(tmp_path):
    parquet(tmp_path / "a" / "train-00000-of-00002.parquet", ROWS[:2])
    import pyarrow
    import pyarrow.parquet

    bad = [{"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "q", "chosen": None, "rejected": "r"}]
    second = tmp_path / "a" / "train-00001-of-00002.parquet"
    pyarrow.parquet.write_table(pyarrow.table({k: [row[k] for row in bad] for k in bad[0]}), second)
    with pytest.raises(ValueError, match=rf"^{second}:2: chosen: missing field; the row has prompt, rejected"):
        exchange.read(tmp_path / "a")
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"^{second}: not a readable parquet file"):
        exchange.read(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    (tmp_path / "b" / "x.arrow").write_bytes(b"no arrow file")
    with pytest.raises(ValueError, match=r"x\.arrow: not a readable arrow file"):
        exchange.read(tmp_path / "b")
    (tmp_path / "b" / "state.json").write_text("[")
    with pytest.raises(ValueError, match=r"state\.json: not readable"):
        exchange.read(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        tfds_preferences.read_hub(tmp_path / "none", "train")
    with pytest.raises(ValueError, match=r"no files of split 'valid'; there are: train-0"):
        hub.files(tmp_path / "a", "valid")
