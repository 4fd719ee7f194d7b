"""Where rows come from: JSON lines, plain text, TFDS folders, lists in memory. A source has `len()` and `[i]`, which is all
that grain asks for.

Reading is strict. A malformed file is refused before its first row is used, with `file:line: field: problem`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from jaxrlhf.data.strict import Schema, parse_line, parse_text, row_problem


def _lines(path: Path, max_bytes: int, kind: str = ".jsonl") -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line without its newline); a line is cut soon after `max_bytes`, never read whole."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a {kind} or {kind}.gz file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            number, offset = 0, 0
            while line := file.readline(max_bytes + 2):
                number += 1
                yield number, offset, line.removesuffix(b"\n")
                offset += len(line)
                while not line.endswith(b"\n") and (line := file.readline(1 << 20)):  # the rest of a cut line
                    offset += len(line)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
        if isinstance(error, PermissionError):
            raise PermissionError(f"{path}: not readable by this user") from None
        raise ValueError(f"{path}: cannot be read: {error}") from None


def read_jsonl(
    path: Path | str,
    schema: Schema,
    max_bytes: int = 10_000_000,
    rejects: Path | str | None = None,
    check: Callable[[dict[str, Any], str], dict[str, Any]] = lambda row, place: row,
) -> list[dict[str, Any]]:
    """All rows of a `.jsonl` or `.jsonl.gz` file. Nothing is returned unless every line is good.

    `check(row, place)` gives the row as it is returned, or raises a ValueError of its own. With `rejects`, bad lines are left
    out and written there instead, one JSON object `{line, problem}` each.

    Raises:
        ValueError: `file:line: field: problem` of the first bad line, or the file is empty.
        FileNotFoundError, PermissionError: naming the file.
    """
    path = Path(path)

    def parse(line: bytes, place: str) -> dict[str, Any]:
        return check(parse_line(line, schema, place, max_bytes), place)

    return _good(path, ((number, line) for number, _, line in _lines(path, max_bytes)), parse, rejects)


def read_text(path: Path | str, max_bytes: int = 10_000_000, rejects: Path | str | None = None) -> list[str]:
    """The texts of a `.txt` or `.txt.gz` file in UTF-8, one a line, without the white space around them; lines of white space
    alone only space them. Nothing is returned unless every line is good; with `rejects` as `read_jsonl`.

    Raises:
        ValueError: `file:line: problem` of the first bad line, or there is no text in the file.
        FileNotFoundError, PermissionError: naming the file.
    """
    path = Path(path)
    lines = ((number, line) for number, _, line in _lines(path, max_bytes, ".txt") if line.strip())
    found = _good(path, lines, lambda line, place: parse_text(line, place, max_bytes), rejects)
    return [text for text in found if text]  # a line may be of white space that only Unicode knows


def _good(
    path: Path, lines: Iterable[tuple[int, bytes]], parse: Callable[[bytes, str], Any], rejects: Path | str | None
) -> list[Any]:
    """What `parse(line, place)` makes of every line; with `rejects` of those that it does not refuse."""
    rows, bad = [], []
    for number, line in lines:
        try:
            rows.append(parse(line, f"{path}:{number}"))
        except ValueError as error:
            if rejects is None:
                raise
            bad.append({"line": number, "problem": str(error)})
    if rejects is not None:
        Path(rejects).write_text("".join(json.dumps(entry) + "\n" for entry in bad), encoding="utf-8")
    if not rows:
        raise ValueError(
            f"{path}: no rows" + (f"; all {len(bad)} lines are bad, see {rejects}" if bad else "; the file is empty")
        )
    return rows


def from_rows(rows: Sequence[Mapping[str, Any]], schema: Schema, name: str = "rows") -> Sequence[Mapping[str, Any]]:
    """Rows in memory, checked like those of a file. A list is a source already: it has `len()` and `[i]`.

    Raises:
        ValueError: `name:index: field: problem` of the first bad row, or there are none.
    """
    if not len(rows):
        raise ValueError(f"{name}: no rows")
    for i, row in enumerate(rows):
        if problem := row_problem(row, schema):
            raise ValueError(f"{name}:{i}: {problem[0]}: {problem[1]}")
    return rows


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all (to a second name, then renamed)."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    part.replace(path)


@dataclasses.dataclass(frozen=True)
class JsonlSource:
    """Random access into a JSON-lines file that need not fit in memory: `open_jsonl` makes it."""

    path: Path
    schema: Schema
    offsets: np.ndarray  # [rows + 1] int64, where each line starts; the last is the end of the file
    size: int  # bytes, to notice a file that changed
    max_bytes: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = range(len(self))[index]
        if self.path.stat().st_size != self.size:
            raise ValueError(f"{self.path}: changed while in use; start again")
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            line = file.read(self.offsets[index + 1] - self.offsets[index])
        return parse_line(line.removesuffix(b"\n"), self.schema, f"{self.path}:{index + 1}", self.max_bytes)


def open_jsonl(path: Path | str, schema: Schema, max_bytes: int = 10_000_000) -> JsonlSource:
    """Check every line of a `.jsonl` file, then read rows on demand.

    Raises:
        ValueError: `file:line: field: problem` of the first bad line, the file is empty, or it is compressed.
        FileNotFoundError, PermissionError: naming the file.
    """
    path = Path(path)
    if path.suffix == ".gz":
        raise ValueError(f"{path}: compressed files have no random access; unpack it or use read_jsonl")
    offsets = []
    for number, offset, line in _lines(path, max_bytes):
        parse_line(line, schema, f"{path}:{number}", max_bytes)
        offsets.append(offset)
    if not offsets:
        raise ValueError(f"{path}: no rows; the file is empty")
    size = path.stat().st_size
    return JsonlSource(path, schema, np.asarray([*offsets, size], np.int64), size, max_bytes)


def _plain(value: Any) -> Any:
    """bytes -> str and NumPy scalars -> Python, also inside dictionaries; arrays stay."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value.item() if isinstance(value, np.generic) else value


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Random access into one split of a TFDS data set in the array_record format: `open_tfds` makes it."""

    records: Sequence[Any]
    place: str  # of error messages

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = range(len(self))[index]
        try:
            return _plain(self.records[index])
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.place}:{index}: cannot be read ({_one_line(error)})") from None


def open_tfds(folder: Path | str, split: str) -> TfdsSource:
    """One split of a prepared TFDS folder (the one that holds `dataset_info.json`), read without tensorflow.

    Raises:
        FileNotFoundError: not a TFDS folder.
        ValueError: no such split, a file format that needs tensorflow or loses rows, or fewer rows than the folder promises.
    """
    folder = Path(folder).expanduser()
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(f"{folder}: not a TFDS folder (no dataset_info.json); give .../name/version")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(folder))
    except Exception as error:  # of half a dozen kinds, from protobuf's to json's
        raise ValueError(f"{folder}: damaged TFDS folder ({_one_line(error)}); prepare it again") from None
    if split not in builder.info.splits:
        raise ValueError(f"{folder}: no split '{split}'; it has {', '.join(sorted(builder.info.splits))}")
    kind = builder.info.file_format
    if kind is None or kind.value != "array_record":
        # TFDS 4.9.10 drops rows in silence when it writes parquet, and reads tfrecord by tensorflow only
        raise ValueError(f"{folder}: file format '{kind and kind.value}'; prepare the set with file_format='array_record'")
    promised = builder.info.splits[split].num_examples
    try:
        held = _records_held(builder.info.splits[split].filepaths)
    except RuntimeError as error:
        raise ValueError(f"{folder}: split '{split}' is damaged ({_one_line(error)}); prepare it again") from None
    if held != promised or not promised:
        raise ValueError(f"{folder}: split '{split}' holds {held} rows of {promised} promised; prepare it again")
    records = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]: a decorator of TFDS hides its arguments
    return TfdsSource(records, f"{folder}:{split}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _records_held(files: Sequence[Any]) -> int:
    """Records that are really in the files; `len` of TFDS's own source only repeats what dataset_info.json promises."""
    from array_record.python import array_record_data_source

    if not all(Path(file).is_file() for file in files):
        return 0
    return len(array_record_data_source.ArrayRecordDataSource([str(file) for file in files]))
