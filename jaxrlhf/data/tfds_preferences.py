"""Preference data: what people preferred, as rows, as a TFDS data set of our own, and as token arrays.

A row is (prompt, chosen, rejected) with a margin, who chose, and where the pair came from. JSON lines are the exchange format;
TFDS (array_record, without tensorflow) is written and read back here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxrlhf.core.types import Preferences
from jaxrlhf.data import pipeline, sources
from jaxrlhf.data.tokenizer import BOS, EOS, Tokenizer

SCHEMA = sources.Schema(
    required={"prompt": str, "chosen": str, "rejected": str},
    optional={"margin": float, "weight": float, "tie": bool, "labeler": str, "pair": str},
    filled=frozenset({"prompt"}),
)


@dataclasses.dataclass(frozen=True)
class Preference:
    """One choice between two responses to a prompt."""

    prompt: str
    chosen: str  # with the space that it starts with, since it follows the prompt at once
    rejected: str
    margin: float = 0.0  # by how much, in the labeler's own unit; 0: not said
    weight: float = 1.0
    tie: bool = False  # neither was preferred; then chosen and rejected are only names
    labeler: str = ""
    pair: str = ""  # id of the pair in the feedback store


def _preference(row: dict[str, Any], place: str) -> Preference:
    names = [field.name for field in dataclasses.fields(Preference)]
    preference = Preference(**{name: row[name] for name in names if name in row})
    preference = dataclasses.replace(preference, margin=float(preference.margin), weight=float(preference.weight))
    if preference.weight < 0:
        raise ValueError(f"{place}: weight: must be >= 0, not {preference.weight}; 0 leaves the pair out")
    if not math.isfinite(preference.margin):
        raise ValueError(f"{place}: margin: must be a finite number, not {preference.margin}")
    if preference.chosen == preference.rejected and not preference.tie:
        raise ValueError(f"{place}: rejected: is the same text as chosen; such a pair says nothing, remove it")
    return preference


def read_jsonl(path: Path | str) -> list[Preference]:
    """Preferences of a `.jsonl` or `.jsonl.gz` file with the fields of `Preference`; all but the three texts may be absent.

    Raises:
        ValueError: `file:line: field: problem`.
        FileNotFoundError, PermissionError: naming the file.
    """
    return [_preference(row, f"{path}:{number}") for number, row in enumerate(sources.read_jsonl(path, SCHEMA), 1)]


def write_jsonl(path: Path | str, preferences: Iterable[Preference]) -> None:
    """Write preferences as JSON lines."""
    sources.write_jsonl(path, map(dataclasses.asdict, preferences))


@functools.cache
def _builder() -> Any:
    """The TFDS builder class; made on first use, since tensorflow_datasets takes half a second to import."""
    import tensorflow_datasets as tfds

    kinds = {str: tfds.features.Text(), float: np.float64, bool: np.bool_}
    types = {**SCHEMA.required, **SCHEMA.optional}

    class HumanPreferences(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Preferences between two responses to a prompt."""

        name = "human_preferences"
        VERSION = tfds.core.Version("1.0.0")
        url_infos: ClassVar[dict] = {}  # nothing is downloaded; without this TFDS looks for the folder of its own source

        def __init__(self, splits: dict[str, Sequence[Preference]], data_dir: str):
            self._splits = splits
            super().__init__(data_dir=data_dir, file_format="array_record")

        def _info(self):  # dataset_info_from_configs fails in a plain script
            features = tfds.features.FeaturesDict({name: kinds[kind] for name, kind in types.items()})
            return tfds.core.DatasetInfo(builder=self, features=features, description=self.__doc__)

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

        def _generate_examples(self, rows):  # this exact name is abstract in TFDS
            for i, row in enumerate(rows):
                yield i, dataclasses.asdict(row)

    return HumanPreferences


def write_tfds(folder: Path | str, splits: dict[str, Sequence[Preference]]) -> Path:
    """Write splits of preferences as a TFDS data set below `folder`; returns the folder to read, `human_preferences/1.0.0`.

    Raises:
        ValueError: an empty split, a data set is already there, or fewer rows can be read back than were written.
    """
    folder = Path(folder).expanduser().resolve()
    if empty := [name for name, rows in splits.items() if not rows]:
        raise ValueError(f"split '{empty[0]}' has no rows: leave it out")
    builder = _builder()(splits, str(folder))
    if Path(builder.data_path).exists():
        raise ValueError(f"{builder.data_path}: already there; remove it or give another folder")
    builder.download_and_prepare()
    for name, rows in splits.items():
        if (held := len(sources.open_tfds(builder.data_path, name))) != len(rows):
            raise ValueError(f"{builder.data_path}: split '{name}' holds {held} of {len(rows)} rows written")
    return Path(builder.data_path)


def read_tfds(folder: Path | str, split: str) -> list[Preference]:
    """Preferences of a split, of our own set or of any TFDS set with the fields prompt, chosen and rejected.

    Raises:
        FileNotFoundError, ValueError: as `sources.open_tfds`, or `folder:split:row: field: problem`.
    """
    source = sources.open_tfds(folder, split)
    preferences = []
    for i in range(len(source)):
        row, place = source[i], f"{folder}:{split}:{i}"
        if problem := sources.row_problem(row, SCHEMA):
            raise ValueError(f"{place}: {problem[0]}: {problem[1]}")
        preferences.append(_preference(row, place))
    return preferences


def encode(preferences: Sequence[Preference], tokenizer: Tokenizer, width: int) -> tuple[Preferences, int]:
    """Token rows of pairs, and how many pairs were left out because a row would be longer than `width`.

    A row is bos + prompt + response + eos. The label is 1 (0.5 for a tie): response 0 is the chosen one.

    Raises:
        ValueError: no pair fits.
    """
    prompts = tokenizer.encode_batch([preference.prompt for preference in preferences])
    sides = [
        tokenizer.encode_batch([getattr(preference, side) for preference in preferences], continuation=True)
        for side in ("chosen", "rejected")
    ]
    rows = [[[BOS, *prompt, *response, EOS] for response in two] for prompt, *two in zip(prompts, *sides, strict=True)]
    kept = [i for i, two in enumerate(rows) if max(map(len, two)) <= width]
    if not kept:
        raise ValueError(f"none of {len(rows)} pairs fits into {width} tokens: choose a larger width")
    tokens, length = pipeline.pad_rows([row for i in kept for row in rows[i]], width)
    prompt_len = np.repeat(np.fromiter((len(prompts[i]) + 1 for i in kept), np.int32, len(kept))[:, None], 2, axis=1)
    chosen = [preferences[i] for i in kept]
    tie = np.array([preference.tie for preference in chosen])
    encoded = Preferences(
        tokens=tokens.reshape(-1, 2, width),
        prompt_len=prompt_len,
        response_len=length.reshape(-1, 2) - prompt_len,
        label=np.where(tie, 0.5, 1.0).astype(np.float32),
        tie=tie,
        weight=np.array([preference.weight for preference in chosen], np.float32),
        margin=np.array([preference.margin for preference in chosen], np.float32),
    )
    return encoded, len(rows) - len(kept)
