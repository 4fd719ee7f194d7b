"""The recipes' data: rows of two JSON-lines files, or of a synthetic stand-in, as the stages want them.

Demonstrations are {"prompt", "response"} a line, comparisons {"prompt", "chosen", "rejected"} a line; a response begins with
the space or line break that stands between it and the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.algorithms import reward
from jaxrlhf.core.types import Prompts
from jaxrlhf.data import comparisons, pipeline, sources
from jaxrlhf.data.tokenizer import BOS, EOS, Tokenizer

Row = Mapping[str, Any]
StandIn = Callable[[int, int], tuple[list[dict[str, str]], list[dict[str, str]]]]
"""(rows, seed) -> as many demonstrations and comparisons."""

DEMONSTRATION = sources.Schema({"prompt": str, "response": str}, filled=frozenset({"prompt", "response"}))
COMPARISON = sources.Schema({"prompt": str, "chosen": str, "rejected": str}, filled=frozenset({"prompt"}))
STAND_IN = 2000  # rows of each kind, where no file is given
HELD_OUT = 48  # of each, never trained on


class Data(NamedTuple):
    demonstrations: Sequence[Row]
    comparisons: Sequence[Row]


def read(demonstrations: Path | None, compared: Path | None, stand_in: StandIn, seed: int) -> Data:
    """Rows of the files that are given, else of the stand-in.

    Raises:
        ValueError: a file is malformed, or holds too few rows to hold some out.
    """
    made = stand_in(STAND_IN, seed) if demonstrations is None or compared is None else ([], [])
    files = ((demonstrations, DEMONSTRATION), (compared, COMPARISON))
    data = Data(*(sources.read_jsonl(path, schema) if path else rows for (path, schema), rows in zip(files, made, strict=True)))
    for name, rows in zip(data._fields, data, strict=True):
        if len(rows) < 3 * HELD_OUT:
            raise ValueError(f"{name}: {len(rows)} rows, of which {HELD_OUT} are held out: give {3 * HELD_OUT} or more")
    return data


def demonstration_rows(data: Data, tokenizer: Tokenizer, query: int, response: int) -> tuple[dict[str, np.ndarray], int]:
    """Rows bos + prompt + response + eos that fit, and how many were left out.

    Raises:
        ValueError: fewer fit than are held out.
    """
    starts = tokenizer.encode_batch([row["prompt"] for row in data.demonstrations])
    ends = tokenizer.encode_batch([row["response"] for row in data.demonstrations], continuation=True)
    pairs = [(p, r) for p, r in zip(starts, ends, strict=True) if len(p) + 1 <= query and len(r) + 1 <= response]
    if len(pairs) < 2 * HELD_OUT:
        raise ValueError(f"{len(pairs)} demonstrations have room in {query} + {response} tokens: give shorter texts, or widen")
    whole = [[BOS, *p, *r, EOS] for p, r in pairs]
    tokens, length = pipeline.pad_rows(whole, max(map(len, whole)))  # the widest there is: padding costs as text does
    prompt_len = np.fromiter((len(p) + 1 for p, _ in pairs), np.int32, len(pairs))
    rows = {"tokens": tokens, "prompt_len": prompt_len, "response_len": length - prompt_len}
    return rows, len(starts) - len(pairs)


def sets(rows: Sequence[Row], tokenizer: Tokenizer, width: int) -> dict[str, np.ndarray]:
    """The pairs as sets of two (fields of `reward.Batch`), as wide as the widest row."""
    pairs = comparisons.preference_rows(rows, tokenizer, width)
    longest = int(np.max(pairs.prompt_len + pairs.response_len))
    batch = reward.from_preferences(dataclasses.replace(pairs, tokens=pairs.tokens[..., :longest]))
    return {name: np.asarray(getattr(batch, name)) for name in ("tokens", "prompt_len", "response_len", "preferred", "margin")}


def queries(rows: dict[str, np.ndarray]) -> Prompts:
    """The prompts of demonstration rows."""
    width = int(rows["prompt_len"].max())
    index = np.arange(len(rows["prompt_len"]), dtype=np.int32)
    inside = np.arange(width) < rows["prompt_len"][:, None]
    return Prompts(np.where(inside, rows["tokens"][:, :width], 0).astype(np.int32), rows["prompt_len"], index, index)
