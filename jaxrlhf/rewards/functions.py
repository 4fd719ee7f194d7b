"""Rewards that are plain Python, (prompt, response, row) -> number, and how rewards of any kind add up.

`row` is the data-set row, where a verifiable reward finds its reference at row["answer"]. A response that a reward cannot
score (it raises, or gives NaN, None, an infinity) is left out of the update: score 0, weight 0, counted, and named. Functions
that hang or may not be trusted run in child processes: `rewards/pool.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np

from jaxrlhf.core import processes
from jaxrlhf.core.types import Rollout
from jaxrlhf.rewards import pool

RewardFunction = Callable[[str, str, dict[str, Any]], float]
Decode = Callable[[list[int]], str]

SHOWN = 80  # characters of a prompt in a report
LARGEST = 3.4e38  # float32 holds no more


@dataclasses.dataclass(frozen=True)
class Fault:
    """A response that a reward could not score."""

    reward: str  # its name
    row: int  # of the rollout
    prompt: str  # the first 80 characters
    cause: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a reward says of the rows of a rollout."""

    score: np.ndarray  # [B] float32, 0 where there is a fault
    weight: np.ndarray  # [B] float32, 0 where there is a fault, else 1
    faults: tuple[Fault, ...] = ()  # of the rows that this process scored


# ------------------------------------------------------------------------------------------------ from a reward to scores


def texts(rollout: Rollout, decode: Decode) -> tuple[list[str], list[str]]:
    """The prompts and the responses of a rollout as text, one of each a row."""
    tokens, prompt_len, response_len = processes.to_host((rollout.tokens, rollout.prompt_len, rollout.response_len))
    ends = prompt_len + response_len
    prompts = [decode(row[:start].tolist()) for row, start in zip(tokens, prompt_len, strict=True)]
    responses = [decode(row[start:end].tolist()) for row, start, end in zip(tokens, prompt_len, ends, strict=True)]
    return prompts, responses


def apply(
    function: RewardFunction | pool.Remote,
    rollout: Rollout,
    decode: Decode,
    rows: Sequence[dict[str, Any]] | None = None,
    name: str = "",
) -> Scores:
    """Scores by a function of one response. What it raises costs that row, not the run; a warning names the first fault.
    In a job of several processes each scores its share of the rows, and all learn of all.

    `rows` are the data-set rows (a reference answer, ...), one a rollout row. `name`: in reports; the function's own if empty.
    A function of a pool (`rewards/pool.open_pool`) runs in its child processes, within their limits.

    Raises:
        ValueError: the number of rows is not that of the rollout, or one cannot be sent to a child process.
    """
    prompts, responses = texts(rollout, decode)
    rows = [{}] * len(prompts) if rows is None else rows
    if len(rows) != len(prompts):
        raise ValueError(f"reward function: {len(rows)} data rows for {len(prompts)} responses; pass one a response")
    items = list(zip(prompts, responses, rows, strict=True))
    mine = range(jax.process_index(), len(prompts), jax.process_count())
    given: list[Any] = [0.0] * len(items)
    raised = {}
    if isinstance(function, pool.Remote):
        own = function.name
        score_mine = functools.partial(function.pool.score, own, [items[i] for i in mine])
        values, causes = processes.alike(score_mine)  # children that cannot be started end all processes, not one
        given[mine.start :: mine.step] = values
        raised = {mine[k]: cause for k, cause in causes.items()}
    else:
        own = getattr(function, "__name__", "reward")
        for i in mine:
            try:
                given[i] = function(*items[i])
            except Exception as error:  # of any kind: it is not our code
                raised[i] = f"raised {type(error).__name__}: {error}"
    found = _scores(given, name or own, prompts.__getitem__, raised)
    score, fault = processes.added(found.score, 1 - found.weight)
    return Scores(score, 1 - fault, found.faults)


def of_values(values: Any, rollout: Rollout, decode: Decode, name: str) -> Scores:
    """Scores from the values of all rows at once: an array reward's (`rewards/model.reward`), or a list, one number a row.

    Raises:
        ValueError: another number of values than the rollout has rows.
    """
    values, tokens, prompt_len = processes.to_host((values, rollout.tokens, rollout.prompt_len))
    given = values.tolist() if isinstance(values, np.ndarray) else list(values)
    count = rollout.tokens.shape[0]
    if len(given) != count:
        raise ValueError(f"reward '{name}' gave {len(given)} values for {count} responses: it must give one a response")

    def prompt(i: int) -> str:
        return decode(tokens[i, : int(prompt_len[i])].tolist())

    return _scores(given, name, prompt, {})


def weighted_sum(parts: Mapping[str, Scores], weights: Mapping[str, float]) -> tuple[Scores, dict[str, float]]:
    """Sum of weight x score over the named rewards, of functions and of arrays alike, and what there is to log of it.

    A row that one of them could not score is left out. Logged: `reward/NAME`, the mean score before its weight over the rows
    that NAME could score; `reward/faults`, the rows left out.

    Raises:
        ValueError: no reward, a reward without a weight or a weight without a reward, a weight that is not finite, or
            rewards of unequally many rows.
    """
    if not parts or set(parts) != set(weights):
        raise ValueError(
            f"rewards {sorted(parts)} have weights for {sorted(weights)}: give each reward its weight, and no other"
        )
    if wrong := {name: weight for name, weight in weights.items() if not math.isfinite(weight)}:
        raise ValueError(f"reward weights {wrong} are not finite: give numbers; 0 only logs a reward")
    heights = {name: len(part.score) for name, part in parts.items()}
    if len(set(heights.values())) != 1:
        raise ValueError(f"rewards of unequally many rows, {heights}: score the same rollout with each")
    weight = np.prod([part.weight for part in parts.values()], axis=0).astype(np.float32)
    total = np.sum([weights[name] * part.score.astype(np.float64) for name, part in parts.items()], axis=0)
    logged = {
        f"reward/{name}": float(part.score.sum(dtype=np.float64) / count) if (count := part.weight.sum()) else math.nan
        for name, part in parts.items()
    }
    faults = tuple(fault for part in parts.values() for fault in part.faults)
    score = np.where(weight > 0, total, 0.0).astype(np.float32)
    return Scores(score, weight, faults), logged | {"reward/faults": float((weight == 0).sum())}


def _scores(given: Sequence[Any], name: str, prompt: Callable[[int], str], raised: dict[int, str]) -> Scores:
    score, weight, faults = np.zeros(len(given), np.float32), np.ones(len(given), np.float32), []
    for i, value in enumerate(given):
        number = _number(value)
        if i not in raised and number is not None:
            score[i] = number
            continue
        weight[i] = 0.0
        faults.append(
            Fault(name, i, prompt(i)[:SHOWN], raised.get(i, f"returned {str(value)[:SHOWN]}, which is no finite number"))
        )
    if faults:
        first = faults[0]
        warnings.warn(
            f"reward '{name}' could not score {len(faults)} of {len(given)} responses, which are left out; the first, row "
            f"{first.row} with the prompt '{first.prompt}': {first.cause}",
            stacklevel=3,
        )
    return Scores(score, weight, tuple(faults))


def _number(value: Any) -> float | None:
    """A finite float32's value, or None."""
    if isinstance(value, str):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # a comparison with NaN is false


# ------------------------------------------------------------------------------------------------------ verifiable rewards

_NUMBER = re.compile(
    r"((?<![\w)\]}])[-+−])?"  # after a digit, a letter or a bracket it is an operator
    r"[$€£]?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?|(?<![0-9])\.[0-9]+)"
    r"(?:\s?/\s?([0-9]+(?:\.[0-9]+)?))?"
)


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where there is none. Reads -1,234.5, 3/4, .5, 2e3, $7; not words, not 1 3/4."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    sign, number, divisor = found[-1]
    try:
        value = Fraction(number.replace(",", "")) / Fraction(divisor or 1)
    except (ZeroDivisionError, ValueError):  # n/0; more digits than Python converts
        return None
    return -value if sign in ("-", "−") else value


def exact_match(prompt: str, response: str, row: dict[str, Any]) -> float:
    """1 where the response is row["answer"] to the letter, but for spaces around it; else 0."""
    del prompt
    return float(response.strip() == str(row["answer"]).strip())


def number_match(prompt: str, response: str, row: dict[str, Any]) -> float:
    """1 where the last number of the response equals that of row["answer"] (1,200 = 1200.0; 3/4 = 0.75), else 0.

    Raises:
        ValueError: the answer holds no number.
    """
    del prompt
    answer = last_number(str(row["answer"]))
    if answer is None:
        raise ValueError(f"the reference answer '{row['answer']}' holds no number: use exact_match for it")
    return float(last_number(response) == answer)


def format_match(pattern: str) -> RewardFunction:
    """A reward of 1 where the whole response matches the regular expression (`.` matches line breaks too), else 0.

    Raises:
        ValueError: not a regular expression.
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"format_match('{pattern}') is not a regular expression: {error}") from None
    return lambda prompt, response, row: float(compiled.fullmatch(response) is not None)


def length_within(least: int, most: int) -> RewardFunction:
    """A reward of 0 for a response of `least` to `most` words, else minus the words beyond, as a share of `most`.

    Raises:
        ValueError: not 0 <= least <= most, most >= 1.
    """
    if not 0 <= least <= most or most < 1:
        raise ValueError(f"length_within(least={least}, most={most}): need 0 <= least <= most and most >= 1, in words")

    def length(prompt: str, response: str, row: dict[str, Any]) -> float:
        words = len(response.split())
        return -max(least - words, words - most, 0) / most

    return length


def repetition(n: int = 3) -> RewardFunction:
    """A reward of minus the share of n-grams of words that repeat an earlier one: 0 where all differ, near -1 for a loop.

    Source: Yeo et al. 2025 ("Demystifying long chain-of-thought reasoning"), appendix C.2; Open-R1's repetition penalty.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"repetition(n={n}): an n-gram has at least 1 word")

    def repeated(prompt: str, response: str, row: dict[str, Any]) -> float:
        words = response.lower().split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        return len(set(grams)) / len(grams) - 1.0 if grams else 0.0

    return repeated


def math_match() -> RewardFunction:
    r"""A reward of 1 where the response's formula equals row["answer"] as mathematics (1/2, 0.5, $\frac{1}{2}$), else 0.

    By math-verify, whose time limit is an alarm signal: use it in the main thread, or in a pool, whose limit is one that holds.

    Raises:
        ImportError: the extra `math` is not installed.
    """
    try:
        import math_verify  # pyright: ignore[reportMissingImports]: an extra
    except ImportError:
        raise ImportError("math_match needs the package math-verify: pip install 'jaxrlhf[math]'") from None

    def equal(prompt: str, response: str, row: dict[str, Any]) -> float:
        answer = math_verify.parse(str(row["answer"])) or math_verify.parse(f"${row['answer']}$")
        if not answer:
            raise ValueError(f"math-verify finds no formula in the reference answer '{row['answer']}'")
        return float(math_verify.verify(answer, math_verify.parse(response)))

    return equal
