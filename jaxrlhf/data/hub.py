"""Folders of Hugging Face data sets, read without their package: what `save_to_disk` writes, and what the hub holds.

`save_to_disk` leaves arrow files that `state.json` lists. A folder of the hub holds parquet or JSON lines, a split in one file
(`train.parquet`) or in several that say how many they are (`data/train-00000-of-00003.parquet`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrlhf.data import sources, strict

KINDS = (".parquet", ".arrow", ".jsonl", ".jsonl.gz")
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")  # of several files, which one
_STATE, _SPLITS = "state.json", "dataset_dict.json"

Check = Callable[[dict[str, Any], str], dict[str, Any]]  # (row, place) -> the row as it is returned; it may raise


def is_folder(folder: Path) -> bool:
    """Whether a folder is a Hugging Face data set; one of TFDS describes its features in a file of its own."""
    if (folder / "features.json").is_file():
        return False
    return (folder / _STATE).is_file() or (folder / _SPLITS).is_file() or any(_files(folder))


def read(folder: Path | str, split: str, schema: strict.Schema, check: Check = lambda row, place: row) -> list[dict[str, Any]]:
    """All rows of a split, file after file. Fields without a value are left out; nothing is returned unless every row is good.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such split, a file of it is missing or cannot be read, or `file:row: field: problem`.
    """
    folder, rows = Path(folder), []
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for path in files(folder, split):
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            rows += sources.read_jsonl(path, schema, check=check)
        else:
            rows += [check(row, f"{path}:{number}") for number, row in enumerate(table(path), 1)]
    if not rows:
        raise ValueError(f"{folder}: split '{split}' has no rows")
    return rows


def table(path: Path) -> list[dict[str, Any]]:
    """Rows of a parquet or arrow file, each without the fields that have no value there.

    Raises:
        ValueError: it cannot be read.
    """
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    arrow = path.suffix == ".arrow"
    try:
        if arrow:
            with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
                found = stream.read_all().to_pylist()
        else:
            found = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        kind = "arrow" if arrow else "parquet"
        raise ValueError(f"{path}: not a readable {kind} file ({' '.join(str(error).split())[:200]})") from None
    return [{name: value for name, value in row.items() if value is not None} for row in found]


def files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order.

    Raises:
        ValueError: no such split, several data sets lie below the folder, or a file is missing.
    """
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS).get("splits", [])
        if split not in splits:
            raise ValueError(f"{folder}: no split '{split}'; there are: {', '.join(map(str, splits)) or 'none'}")
        folder = folder / split
    if (folder / _STATE).is_file():
        names = [each["filename"] for each in _json(folder / _STATE).get("_data_files", [])]
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder}: file {absent[0]} of {len(names)} is missing")
        return [folder / name for name in names]
    found = [path for path in _files(folder) if re.split(r"[-.]", path.name)[0] == split or path.parent.name == split]
    if not found:
        there = ", ".join(path.relative_to(folder).as_posix() for path in _files(folder)[:5])
        raise ValueError(f"{folder}: no files of split '{split}'; there are: {there or 'none'}")
    if len(places := sorted({path.parent for path in found})) > 1:
        names = ", ".join(place.relative_to(folder).as_posix() for place in places[:5])
        raise ValueError(f"{folder}: split '{split}' of several data sets ({names}): give the folder of one")
    _check_parts(folder, found)
    return found


def _check_parts(folder: Path, found: list[Path]) -> None:
    """Every file of those that say how many they are is there."""
    parts = [part for path in found if (part := _PART.search(path.name.partition(".")[0]))]
    for total in {int(part[2]) for part in parts}:
        there = {int(part[1]) for part in parts if int(part[2]) == total}
        if absent := sorted(set(range(total)) - there):
            raise ValueError(f"{folder}: file {absent[0]:05d} of {total} is missing")


def _files(folder: Path) -> list[Path]:
    every = (path for path in folder.rglob("*") if path.name.endswith(KINDS) and path.is_file())
    return sorted(path for path in every if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no description of a data set")
    return found
