"""Sources: every hostile file gets the right verdict, and a good one comes back exactly."""

from __future__ import annotations

import gzip
import json
import pathlib
import random

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from jaxrlhf.data import sources

SCHEMA = sources.Schema({"prompt": str, "chosen": str}, {"margin": float, "tie": bool}, filled=frozenset({"prompt"}))
GOOD = {"prompt": "a", "chosen": "b"}
LINE = b'{"prompt": "a", "chosen": "b"}\n'


def write(folder: pathlib.Path, content: bytes, name: str = "pairs.jsonl") -> pathlib.Path:
    path = folder / name
    path.write_bytes(content)
    return path


# name: (content, what is said after the path); LINE is a good line
HOSTILE = {
    "bad json": (LINE + b'{"prompt": "a", "chosen": }\n', r":2: not JSON: Expecting value at column 27"),
    "cut line": (LINE + b'{"prompt": "a", "cho', r":2: not JSON: Unterminated string .* at column 17"),
    "single quotes": (b"{'prompt': 'a'}\n", r":1: not JSON: .* at column 2"),
    "two objects a line": (LINE.strip() + b" " + LINE, r":1: not JSON: Extra data at column 32"),
    "trailing comma": (b'{"prompt": "a", "chosen": "b",}\n', r":1: not JSON: "),
    "blank line": (LINE + b"\n" + LINE, r":2: blank line; remove it"),
    "line of spaces": (LINE + b"  \t\n", r":2: blank line; remove it"),
    "blank CRLF line": (LINE + b"\r\n", r":2: blank line; remove it"),
    "byte-order mark": (b"\xef\xbb\xbf" + LINE, r":1: byte-order mark at the start; save the file as UTF-8 without one"),
    "utf-16": (LINE.decode().encode("utf-16"), r":1: not UTF-8: byte 0xff at column 1"),
    "latin-1": (LINE + b'{"prompt": "caf\xe9", "chosen": "b"}\n', r":2: not UTF-8: byte 0xe9 at column 16"),
    "overlong utf-8": (b'{"prompt": "\xc0\xaf", "chosen": "b"}\n', r":1: not UTF-8: byte 0xc0 at column 13"),
    "duplicate key": (b'{"prompt": "a", "chosen": "b", "prompt": "c"}\n', r":1: prompt: the field stands twice"),
    "nested duplicate key": (b'{"prompt": "a", "chosen": "b", "x": {"y": 1, "y": 1}}\n', r":1: y: the field stands twice"),
    "missing field": (LINE + b'{"prompt": "a"}\n', r":2: chosen: missing field; the row has prompt"),
    "no field": (b"{}\n", r":1: prompt: missing field; the row has none"),
    "misspelled field": (b'{"prompt": "a", "choosen": "b"}\n', r":1: choosen: unknown field; did you mean 'chosen'\?"),
    "misspelled option": (
        b'{"prompt": "a", "chosen": "b", "margn": 1}\n',
        r":1: margn: unknown field; did you mean 'margin'\?",
    ),
    "number for text": (b'{"prompt": "a", "chosen": 5}\n', r":1: chosen: must be text, not an integer"),
    "null for text": (b'{"prompt": null, "chosen": "b"}\n', r":1: prompt: must be text, not null"),
    "list for text": (b'{"prompt": ["a"], "chosen": "b"}\n', r":1: prompt: must be text, not a list"),
    "text for number": (b'{"prompt": "a", "chosen": "b", "margin": "1"}\n', r":1: margin: must be a number, not text"),
    "true for number": (
        b'{"prompt": "a", "chosen": "b", "margin": true}\n',
        r":1: margin: must be a number, not true or false",
    ),
    "1 for true": (b'{"prompt": "a", "chosen": "b", "tie": 1}\n', r":1: tie: must be true or false, not an integer"),
    "empty prompt": (b'{"prompt": "", "chosen": "b"}\n', r":1: prompt: is empty"),
    "prompt of spaces": ('{"prompt": " \u00a0\u3000", "chosen": "b"}\n'.encode(), r":1: prompt: is empty"),
    "escaped NUL": (b'{"prompt": "a\\u0000b", "chosen": "b"}\n', r":1: prompt: NUL character at position 1: remove it"),
    "raw NUL": (b'{"prompt": "a\x00b", "chosen": "b"}\n', r":1: not JSON: Invalid control character at at column 14"),
    "NUL outside": (LINE + b"\x00\x00\x00\n", r":2: not JSON: "),
    "lone surrogate": (b'{"prompt": "a", "chosen": "x\\ud83d"}\n', r":1: chosen: lone surrogate \\ud83d at position 1"),
    "swapped surrogates": (
        b'{"prompt": "a", "chosen": "\\ude00\\ud83d"}\n',
        r":1: chosen: lone surrogate \\ude00 at position 0",
    ),
    "hidden surrogate": (b'{"prompt": "a", "chosen": "b", "x": [{"y": "\\udfff"}]}\n', r":1: x: lone surrogate \\udfff"),
    "surrogate in a name": (b'{"prompt": "a", "chosen": "b", "\\udfff": 1}\n', r":1: .*: lone surrogate \\udfff"),
    "NaN": (b'{"prompt": "a", "chosen": "b", "margin": NaN}\n', r":1: NaN is not JSON"),
    "Infinity": (b'{"prompt": "a", "chosen": "b", "margin": -Infinity}\n', r":1: -Infinity is not JSON"),
    "1e999": (b'{"prompt": "a", "chosen": "b", "margin": 1e999}\n', r":1: number 1e999 is too large"),
    "integer of 5000 digits": (b'{"prompt": "a", "chosen": "b", "x": ' + b"9" * 5000 + b"}\n", r":1: .*digits"),
    "deep nesting": (b'{"x": ' + b"[" * 100_000 + b"\n", r":1: nested too deeply"),
    "array": (b'[{"prompt": "a"}]\n', r":1: must be an object \{\.\.\.\}, not a list"),
    "text": (b'"a"\n', r":1: must be an object \{\.\.\.\}, not text"),
    "huge line": (
        LINE + b'{"prompt": "' + b"a" * 3000 + b'", "chosen": "b"}\n' + LINE,
        r":2: the line is longer than 1,000 bytes",
    ),
    "endless line": (b"x" * 4_000_000, r":1: the line is longer than 1,000 bytes"),
    "empty file": (b"", r": no rows; the file is empty"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [sources.read_jsonl, sources.open_jsonl])
def test_a_hostile_file_is_refused_by_line_and_field(tmp_path, name, read):
    content, said = HOSTILE[name]
    path = write(tmp_path, content)
    limit = 1_000 if "line" in name and "longer" in said else 10_000_000
    with pytest.raises(ValueError, match=f"^{path}{said}"):
        read(path, SCHEMA, max_bytes=limit)


# What looks odd and is right: it must be read as it stands.
ODD = {
    "CRLF": (LINE.replace(b"\n", b"\r\n") * 2, [GOOD, GOOD]),
    "no last newline": (LINE + LINE.strip(), [GOOD, GOOD]),
    "U+2028 and U+0085": (
        '{"prompt": "a\u2028b\u0085c", "chosen": "b"}\n'.encode(),
        [{"prompt": "a\u2028b\u0085c", "chosen": "b"}],
    ),
    "surrogate pair": (b'{"prompt": "\\ud83d\\ude00", "chosen": "b"}\n', [{"prompt": "\U0001f600", "chosen": "b"}]),
    "further fields": (b'{"prompt": "a", "chosen": "b", "label": [1, {"x": null}]}\n', [{**GOOD, "label": [1, {"x": None}]}]),
    "integer for number": (b'{"prompt": "a", "chosen": "b", "margin": 2}\n', [{**GOOD, "margin": 2}]),
    "empty response": (b'{"prompt": "a", "chosen": ""}\n', [{"prompt": "a", "chosen": ""}]),
    "spaces around": (b'  {"prompt": "a", "chosen": "b"}\t\n', [GOOD]),
    "a line at the limit": (b'{"prompt": "' + b"a" * 971 + b'", "chosen": "b"}\n', [{"prompt": "a" * 971, "chosen": "b"}]),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_but_right_file_is_read(tmp_path, name):
    content, rows = ODD[name]
    path = write(tmp_path, content)
    assert sources.read_jsonl(path, SCHEMA, max_bytes=1_000) == rows
    source = sources.open_jsonl(path, SCHEMA, max_bytes=1_000)
    assert [source[i] for i in range(len(source))] == rows


@pytest.mark.parametrize("read", [sources.read_jsonl, sources.open_jsonl])
def test_wrong_paths(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read(tmp_path / "none.jsonl", SCHEMA)
    with pytest.raises(ValueError, match=r"is a folder; give a \.jsonl or \.jsonl\.gz file"):
        read(tmp_path, SCHEMA)


def test_an_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, LINE)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # the tests may run as root, who can read everything
    with pytest.raises(PermissionError, match=r"pairs\.jsonl: not readable by this user"):
        sources.read_jsonl(path, SCHEMA)


def test_an_over_long_line_is_never_read_whole(tmp_path, monkeypatch):
    path = write(tmp_path, b"x" * 100_000 + b"\n" + LINE)
    read = []

    def parse(line, *rest):
        read.append(len(line))
        return GOOD

    monkeypatch.setattr(sources, "parse_line", parse)
    assert sources.read_jsonl(path, SCHEMA, max_bytes=1_000) == [GOOD] * 2
    assert max(read) == 1_002
    source = sources.open_jsonl(path, SCHEMA, max_bytes=1_000)
    assert source.offsets.tolist() == [0, 100_001, 100_001 + len(LINE)]


def test_compressed_files(tmp_path):
    path = write(tmp_path, gzip.compress(LINE * 3), "pairs.jsonl.gz")
    assert sources.read_jsonl(path, SCHEMA) == [GOOD] * 3
    with pytest.raises(ValueError, match="no random access"):
        sources.open_jsonl(path, SCHEMA)
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: cannot be read"):
        sources.read_jsonl(write(tmp_path, gzip.compress(LINE * 500)[:-12], "cut.jsonl.gz"), SCHEMA)
    with pytest.raises(ValueError, match=r"not\.jsonl\.gz: cannot be read: Not a gzipped file"):
        sources.read_jsonl(write(tmp_path, LINE, "not.jsonl.gz"), SCHEMA)
    for place, byte, said in ((-6, 0x5A, "CRC"), (10, 0xFF, "Error -3")):  # in the checksum; a kind of block that is none
        flipped = bytearray(gzip.compress(LINE * 3))
        flipped[place] = byte
        with pytest.raises(ValueError, match=rf"flipped\.jsonl\.gz: cannot be read: {said}"):
            sources.read_jsonl(write(tmp_path, bytes(flipped), "flipped.jsonl.gz"), SCHEMA)


def test_rejects_are_written_and_counted(tmp_path):
    path = write(tmp_path, LINE + b"\n" + LINE + b'{"prompt": "a"}\n')
    rejects = tmp_path / "rejects.jsonl"
    assert sources.read_jsonl(path, SCHEMA, rejects=rejects) == [GOOD, GOOD]
    bad = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [entry["line"] for entry in bad] == [2, 4]
    assert bad[1]["problem"] == f"{path}:4: chosen: missing field; the row has prompt"
    with pytest.raises(ValueError, match="no rows; all 1 lines are bad"):
        sources.read_jsonl(write(tmp_path, b"x\n"), SCHEMA, rejects=rejects)


def test_plain_text_is_read_line_by_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes("one\r\n\n  two \u2028 three\t\n \u3000 \nfour".encode())
    assert sources.read_text(path) == ["one", "two \u2028 three", "four"]
    packed = tmp_path / "mine.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert sources.read_text(packed) == sources.read_text(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"good\nb\xffd\n", r":2: not UTF-8: byte 0xff at column 2"),
        (b"good\nx\x00y\n", r":2: NUL character at position 1: remove it"),
        (b"\xef\xbb\xbfgood\n", r":1: byte-order mark at the start"),
        (b"good\n" + b"x" * 3000, r":2: the line is longer than 1,000 bytes"),
        (b" \n\n", r": no rows; the file is empty"),
    ],
)
def test_bad_plain_text_is_refused_by_line_or_left_out(tmp_path, content, said):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}{said}"):
        sources.read_text(path, max_bytes=1000)
    if content.startswith(b"good"):
        rejects = tmp_path / "rejects.jsonl"
        assert sources.read_text(path, 1000, rejects) == ["good"]
        assert [json.loads(line)["line"] for line in rejects.read_text().splitlines()] == [2]


def test_random_access(tmp_path):
    rows = [{"prompt": f"{i} " + "é" * (i % 7), "chosen": "b\n" * (i % 3)} for i in range(200)]
    path = tmp_path / "pairs.jsonl"
    sources.write_jsonl(path, rows)
    source = sources.open_jsonl(path, SCHEMA)
    assert len(source) == 200
    for i in np.random.default_rng(0).permutation(200):
        assert source[i] == rows[i]
    assert source[-1] == rows[-1]
    with pytest.raises(IndexError):
        source[200]


def test_a_file_that_changed_is_noticed(tmp_path):
    path = write(tmp_path, LINE * 2)
    source = sources.open_jsonl(path, SCHEMA)
    path.write_bytes(LINE * 3)
    with pytest.raises(ValueError, match="changed while in use"):
        source[0]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = write(tmp_path, LINE)

    def rows():
        yield GOOD
        raise RuntimeError

    with pytest.raises(RuntimeError):
        sources.write_jsonl(path, rows())
    assert path.read_bytes() == LINE
    with pytest.raises(ValueError, match="Out of range float"):
        sources.write_jsonl(path, [{"margin": float("nan")}])
    assert path.read_bytes() == LINE


TEXTS = strategies.text(strategies.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(texts=strategies.lists(TEXTS, min_size=1, max_size=5))
def test_any_text_survives_the_file(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    schema = sources.Schema({"text": str})
    sources.write_jsonl(path, [{"text": text} for text in texts])
    assert [row["text"] for row in sources.read_jsonl(path, schema)] == texts
    source = sources.open_jsonl(path, schema)
    assert [source[i]["text"] for i in range(len(source))] == texts


def test_ten_thousand_strings_of_all_unicode_come_back(tmp_path):
    draw = random.Random(0)
    planes = [range(1, 0x80), range(0x80, 0x800), range(0x800, 0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000)]
    texts = ["".join(chr(draw.choice(draw.choice(planes))) for _ in range(draw.randrange(30))) for _ in range(10_000)]
    path = tmp_path / "rows.jsonl"
    sources.write_jsonl(path, [{"text": text} for text in texts])
    assert [row["text"] for row in sources.read_jsonl(path, sources.Schema({"text": str}))] == texts


def test_rows_in_memory():
    assert sources.from_rows([GOOD], SCHEMA) == [GOOD]
    with pytest.raises(ValueError, match="mine:1: chosen: missing field; the row has prompt"):
        sources.from_rows([GOOD, {"prompt": "a"}], SCHEMA, name="mine")
    with pytest.raises(ValueError, match="rows: no rows"):
        sources.from_rows([], SCHEMA)


def test_grain_reads_a_source(tmp_path):
    import grain

    rows = [{"prompt": str(i), "chosen": "b"} for i in range(10)]
    sources.write_jsonl(tmp_path / "a.jsonl", rows)
    for source in (sources.open_jsonl(tmp_path / "a.jsonl", SCHEMA), sources.from_rows(rows, SCHEMA)):
        data = grain.MapDataset.source(source).seed(0).shuffle().map(lambda row: row["prompt"])
        assert sorted(data[i] for i in range(10)) == [str(i) for i in range(10)]
