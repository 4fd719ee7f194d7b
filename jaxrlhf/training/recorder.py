"""Some rollouts of a run, token by token, as it goes: what a person reads to see what a policy is rewarded for.

`samples.jsonl` holds a line a rollout: a few rows of at most `STEPS` steps spread over the run, so that its size is bounded
whatever the run is. `experiments/inspect_run.py` shows them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.core import processes
from jaxrlhf.core.types import Array, Experience
from jaxrlhf.training.metrics import cut_back

FILE = "samples.jsonl"
STEPS = 24  # of a run, besides its last
ROWS = 4  # a step
TOKENS = 512  # of a response; the rest is left out, which `length` tells
LETTERS = 4000  # of a prompt, its last ones
LARGEST = 8_000_000  # bytes of the file: then no more are written
COLUMNS = ("logprob", "kl", "advantage", "reward", "value")  # a number a token, where a run has it
NEEDED = {"step", "row", "prompt", "tokens", "length", "finished", "score", "weight"}


def due(step: int, total: int) -> bool:
    """Whether rollouts of this step are kept: of a run of `total` steps every n-th, and the last."""
    return step % max(1, math.ceil(total / STEPS)) == 0 or step == total - 1


def of_experience(
    experience: Experience,
    advantages: Array | None,
    rewards: Array | None,
    token_texts: Callable[[Sequence[int]], list[str]],
    text: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
    """A few rows as JSON: two neighbours, which may answer one prompt, from the beginning and two from the middle.

    Per response token: its text, log-prob, KL to the reference in nats (of the whole distribution where it is known, else
    log-prob less that of the reference), reward [B, R] (None: the score at the last token); advantage [B, R] and value where
    there are any. Of several processes all must call it.
    """
    rollout = dataclasses.replace(experience.rollout, kept=None)  # a bit for each word of the vocabulary at each token
    experience = dataclasses.replace(experience, rollout=rollout)
    experience, advantages, rewards = processes.to_host((experience, advantages, rewards))
    rollout, height = experience.rollout, len(experience.score)
    kl = experience.logprobs - experience.ref_logprobs if experience.ref_kl is None else experience.ref_kl
    chosen = dict.fromkeys(i for i in (0, 1, height // 2, height // 2 + 1) if i < height)
    found = []
    for i in list(chosen)[:ROWS]:
        length, start = int(rollout.response_len[i]), int(rollout.prompt_len[i])
        shown = min(length, TOKENS)
        given = np.zeros(length, np.float32) if rewards is None else rewards[i]
        if rewards is None and length:
            given[-1] = experience.score[i]
        columns = {"logprob": experience.logprobs[i], "kl": kl[i], "reward": given}
        columns |= {name: x[i] for name, x in (("advantage", advantages), ("value", experience.values)) if x is not None}
        found.append(
            {
                "row": i,
                "group": int(rollout.group[i]),
                "prompt": text(rollout.tokens[i, :start].tolist())[-LETTERS:],
                "tokens": token_texts(rollout.tokens[i, start : start + shown].tolist()),
                "length": length,
                "finished": bool(rollout.finished[i]),
                "score": _short(experience.score[i]),
                "weight": _short(experience.weight[i]),
            }
            | {name: [_short(x) for x in column[:shown]] for name, column in columns.items()}
        )
    return found


def _short(value: Any) -> float | None:
    """Four figures; None for what is no finite number, which JSON does not have."""
    return float(f"{float(value):.4g}") if math.isfinite(value) else None


class Samples:
    """Appends the rollouts of a step. After a resume each step stands there once, as in metrics.jsonl."""

    def __init__(self, directory: Path, start: int = 0, size: int = 0, writes: bool = True):
        """Open the file of a run that goes on at step `start`, where it had `size` bytes; what came after them is dropped.

        Raises:
            ValueError: the file is shorter than that.
        """
        self.path = Path(directory) / FILE
        self._writes = writes
        if writes:
            cut_back(self.path, size, start)
        self._file = open(self.path if writes else os.devnull, "ab", buffering=0)  # noqa: SIM115  open as long as the run

    def write(self, step: int, rows: list[dict[str, Any]]) -> bool:
        """Append the rows of a step; whether there was room for them."""
        text = "".join(json.dumps({"step": step, **row}) + "\n" for row in rows).encode()
        if self.size() + len(text) > LARGEST:
            return False
        rest = memoryview(text)  # written at once, so that a process that is killed leaves whole lines, but for a full disk
        while rest:
            rest = rest[os.write(self._file.fileno(), rest) :]
        return True

    def size(self) -> int:
        """Bytes of the file so far."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> int:
        """Have them on the disk, and say how many bytes they are."""
        if self._writes:
            os.fsync(self._file.fileno())
        return self.size()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(directory: Path) -> list[dict[str, Any]]:
    """The rollouts of a run, in order; a last line cut short by a crash is left out.

    Raises:
        ValueError: a line that is no rollout.
    """
    path = Path(directory) / FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            columns = [row[name] for name in COLUMNS if name in row]
            whole = row.keys() >= NEEDED and all(len(column) == len(row["tokens"]) for column in columns)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not a rollout ({error})") from error
        if not whole:
            raise ValueError(f"{path}:{number}: not a rollout: it needs {', '.join(sorted(NEEDED))}, and a number a token")
        rows.append(row)
    return rows
