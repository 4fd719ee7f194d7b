"""Preference data: rows of a JSON-lines or parquet file, a Hugging Face folder, and TFDS (array_record) without tensorflow.

A row is a dictionary: prompt, chosen, rejected, and where known margin, weight, tie, labeler, pair. Further fields, such as
where a response came from, are kept: in TFDS as one JSON text. TFDS holds margin and weight as float32.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxrlhf.data import hub, sources, strict

DEFAULTS = {"margin": 0.0, "weight": 1.0, "tie": False, "labeler": "", "pair": ""}
SCHEMA = strict.Schema(
    required={"prompt": str, "chosen": str, "rejected": str},
    optional={name: type(value) for name, value in DEFAULTS.items()},
    filled=frozenset({"prompt"}),
)
_FURTHER = "further"  # the TFDS column that holds all other fields


def check(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The row with its defaults filled in. The margin is in the labeler's own unit; in a tie `chosen` is only a name.

    Raises:
        ValueError: `place: field: problem`.
    """
    if problem := strict.row_problem(row, SCHEMA):
        raise ValueError(f"{place}: {problem[0]}: {problem[1]}")
    row = {**DEFAULTS, **row}
    row |= {"margin": float(row["margin"]), "weight": float(row["weight"])}
    if not math.isfinite(row["margin"]):
        raise ValueError(f"{place}: margin: must be a finite number, not {row['margin']}")
    if not 0 <= row["weight"] < math.inf:
        raise ValueError(f"{place}: weight: must be a number >= 0, not {row['weight']}; 0 leaves the pair out")
    if row["chosen"] == row["rejected"] and not row["tie"]:
        raise ValueError(f"{place}: rejected: the same text as chosen; such a pair says nothing, remove it")
    return row


def read_jsonl(path: Path | str, rejects: Path | str | None = None) -> list[dict[str, Any]]:
    """Preferences of a `.jsonl` or `.jsonl.gz` file, with defaults filled in; with `rejects`, without the bad lines.

    Raises:
        ValueError: `file:line: field: problem`.
        FileNotFoundError, PermissionError: naming the file.
    """
    return sources.read_jsonl(path, SCHEMA, rejects=rejects, check=check)


def read_parquet(path: Path | str) -> list[dict[str, Any]]:
    """Preferences of a parquet file, as Hugging Face data sets have them, with defaults filled in.

    Fields without a value are left out.

    Raises:
        ValueError: not parquet, no rows, or `file:row: field: problem`.
        FileNotFoundError: no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found = hub.table(Path(path))
    if not found:
        raise ValueError(f"{path}: no rows")
    return [check(row, f"{path}:{number}") for number, row in enumerate(found, 1)]


def read_hub(folder: Path | str, split: str) -> list[dict[str, Any]]:
    """Preferences of a split of a Hugging Face data set in a folder (`data/hub.py`), with defaults filled in.

    Raises:
        FileNotFoundError, ValueError: as `hub.read`.
    """
    return hub.read(folder, split, SCHEMA, check)


def write_parquet(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write preferences as a parquet file, whole or not at all (to a second name, then renamed).

    Raises:
        ValueError: a bad row, or none.
    """
    import pyarrow
    import pyarrow.parquet

    path = Path(path)
    checked = [check(row, f"{path}:{number}") for number, row in enumerate(rows, 1)]
    if not checked:
        raise ValueError(f"{path}: no rows to write")
    names = dict.fromkeys(name for row in checked for name in row)  # pyarrow would take the first row's alone
    part = path.with_name(path.name + ".part")
    pyarrow.parquet.write_table(pyarrow.table({name: [row.get(name) for row in checked] for name in names}), part)
    part.replace(path)


@functools.cache
def _builder() -> Any:
    """The TFDS builder class; made on first use, since tensorflow_datasets takes half a second to import."""
    import tensorflow_datasets as tfds

    kinds = {str: tfds.features.Text(), float: np.float32, bool: np.bool_}
    types = {**SCHEMA.required, **SCHEMA.optional, _FURTHER: str}

    class HumanPreferences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Which of two responses to a prompt somebody preferred."""

        name = "human_preferences"
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar[dict] = {}  # nothing is downloaded; without this TFDS looks for the folder of its own source

        def __init__(self, splits: dict[str, list[dict[str, Any]]], data_dir: str):
            self._splits = splits
            super().__init__(data_dir=data_dir, file_format="array_record")

        def _info(self):  # dataset_info_from_configs fails in a plain script
            features = tfds.features.FeaturesDict({name: kinds[kind] for name, kind in types.items()})
            return tfds.core.DatasetInfo(builder=self, features=features, description=self.__doc__, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

        def _generate_examples(self, rows):  # this exact name is abstract in TFDS
            for i, row in enumerate(rows):
                further = {name: value for name, value in row.items() if name not in types}
                known = {name: row[name] for name in types if name != _FURTHER}
                yield i, {**known, _FURTHER: json.dumps(further, ensure_ascii=False) if further else ""}

    return HumanPreferences


def write_tfds(folder: Path | str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write splits of preferences as a TFDS data set below `folder`; returns the folder to read, `human_preferences/1.0.0`.

    Raises:
        ValueError: a bad or empty split, a data set is already there, or fewer rows can be read back than were written.
    """
    folder = Path(folder).expanduser().resolve()
    checked = {name: [check(row, f"{name}:{i}") for i, row in enumerate(rows)] for name, rows in splits.items()}
    if empty := [name for name, rows in checked.items() if not rows]:
        raise ValueError(f"split '{empty[0]}' has no rows: leave it out")
    builder = _builder()(checked, str(folder))
    path = Path(builder.data_path)
    if path.exists():
        raise ValueError(f"{path}: already there; remove it or give another folder")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its own progress lines
        builder.download_and_prepare()
    for name, rows in checked.items():
        if (held := len(sources.open_tfds(path, name))) != len(rows):
            raise ValueError(f"{path}: split '{name}' holds {held} of {len(rows)} rows written")
    return path


def read_tfds(folder: Path | str, split: str) -> list[dict[str, Any]]:
    """Preferences of a split, of our own set or of any TFDS set that has the fields prompt, chosen and rejected.

    Raises:
        FileNotFoundError, ValueError: as `sources.open_tfds`, or `folder:split:row: field: problem`.
    """
    source = sources.open_tfds(folder, split)
    rows = []
    for i in range(len(source)):
        row = source[i]
        further = row.pop(_FURTHER, "")
        rows.append(check({**row, **(json.loads(further) if further else {})}, f"{folder}:{split}:{i}"))
    return rows
