"""One row, and what may be wrong with it: missing or misspelt fields, wrong types, text that could not be written again."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


@dataclasses.dataclass(frozen=True)
class Schema:
    """The fields of a row. Further fields are kept as they are, unless their name looks like a misspelling of one of these."""

    required: Mapping[str, type]
    optional: Mapping[str, type] = dataclasses.field(default_factory=dict)
    filled: frozenset[str] = frozenset()  # text fields that may not be empty or white space only


def _kind(value: Any) -> str:
    return "null" if value is None else NAMES.get(type(value), type(value).__name__)


def _text_problem(text: str) -> str | None:
    """Why `text` could not be written and read back unchanged, if so."""
    if "\0" in text:
        return f"NUL character at position {text.index(chr(0))}: remove it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"lone surrogate \\u{ord(text[error.start]):04x} at position {error.start}: this is half a character, replace it"
    return None


def _hidden_problem(value: Any) -> str | None:
    """The first such problem anywhere inside a value."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if problem := _text_problem(value):
                return problem
        elif isinstance(value, dict):
            stack += [*value, *value.values()]
        elif isinstance(value, list):
            stack += [part for part in value if isinstance(part, (str, dict, list))]
    return None


def row_problem(row: Mapping[str, Any], schema: Schema) -> tuple[str, str] | None:
    """(field, what is wrong with it) of the first fault of a row, or None."""
    fields = {**schema.required, **schema.optional}
    absent = [name for name in fields if name not in row]
    for name in [name for name in row if name not in fields]:
        if near := difflib.get_close_matches(name, absent, n=1, cutoff=0.85):  # 'label' is no misspelling of 'labeler'
            return name, f"unknown field; did you mean '{near[0]}'?"
    for name, kind in fields.items():
        if name not in row:
            if name in schema.required:
                return name, f"missing field; the row has {', '.join(row) or 'none'}"
            continue
        found = type(row[name])  # exact, since True is an int
        if found is not kind and not (kind is float and found is int):
            return name, f"must be {NAMES[kind]}, not {_kind(row[name])}"
        if name in schema.filled and not row[name].strip():
            return name, "is empty"
    for name, value in row.items():
        if name not in fields and (problem := _text_problem(name)):
            return name, problem
        if isinstance(value, str) and value.isascii() and "\0" not in value:
            continue  # nearly every value of nearly every file
        if problem := _hidden_problem(value):
            return name, problem
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _FieldError(
            next(name for i, name in enumerate(names) if name in names[:i]), "the field stands twice in one object"
        )
    return row


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text} is too large for a float64")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON; write null or leave the field out")


class _FieldError(ValueError):
    """A fault of one field."""


def _decoded(line: bytes, place: str, max_bytes: int) -> str:
    if len(line) > max_bytes:
        raise ValueError(f"{place}: the line is longer than {max_bytes:,} bytes; split the row or raise max_bytes")
    if line.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{place}: byte-order mark at the start; save the file as UTF-8 without one")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None


def parse_text(line: bytes, place: str, max_bytes: int) -> str:
    """One line of a plain text file, without the white space around it.

    Raises:
        ValueError: `place: problem`.
    """
    text = _decoded(line, place, max_bytes).strip()
    if problem := _text_problem(text):
        raise ValueError(f"{place}: {problem}")
    return text


def parse_line(line: bytes, schema: Schema, place: str, max_bytes: int) -> dict[str, Any]:
    """One line of a JSON-lines file as a checked row.

    Raises:
        ValueError: `place: field: problem`, or `place: problem` where no field is to blame.
    """
    text = _decoded(line, place, max_bytes)
    if not line.strip():
        raise ValueError(f"{place}: blank line; remove it")
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_float=_number, parse_constant=_constant)
    except _FieldError as error:
        raise ValueError(f"{place}: {error.args[0]}: {error.args[1]}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"{place}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: must be an object {{...}}, not {_kind(row)}")
    if problem := row_problem(row, schema):
        raise ValueError(f"{place}: {problem[0]}: {problem[1]}")
    return row
