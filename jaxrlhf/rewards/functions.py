"""Rewards that are plain Python: (prompt, response, row) -> number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf.core.types import Rollout

RewardFunction = Callable[[str, str, dict[str, Any]], float]


def texts(rollout: Rollout, decode: Callable[[list[int]], str]) -> tuple[list[str], list[str]]:
    """The prompts and the responses of a rollout as text, one of each a row."""
    tokens, prompt_len, response_len = jax.device_get((rollout.tokens, rollout.prompt_len, rollout.response_len))
    ends = prompt_len + response_len
    prompts = [decode(row[:start].tolist()) for row, start in zip(tokens, prompt_len, strict=True)]
    responses = [decode(row[start:end].tolist()) for row, start, end in zip(tokens, prompt_len, ends, strict=True)]
    return prompts, responses


def apply(
    function: RewardFunction,
    rollout: Rollout,
    decode: Callable[[list[int]], str],
    rows: Sequence[dict[str, Any]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Score of each row, and its weight: 0 where the function gave no finite number (the score there is 0), else 1.

    `rows` are the data-set rows (a reference answer, ...), one a rollout row. An exception of the function is passed on.

    Raises:
        ValueError: the number of rows is not that of the rollout.
    """
    prompts, responses = texts(rollout, decode)
    rows = [{}] * len(prompts) if rows is None else rows
    if len(rows) != len(prompts):
        raise ValueError(f"reward function: {len(rows)} data rows for {len(prompts)} responses; pass one a response")
    given = [function(*item) for item in zip(prompts, responses, rows, strict=True)]
    score = np.array([math.nan if value is None else float(value) for value in given], np.float32)
    valid = np.isfinite(score)
    return np.where(valid, score, 0.0).astype(np.float32), valid.astype(np.float32)
