"""Pairs to learn from: choices in a feedback store, a JSON-lines file or a TFDS folder; or sampled and chosen from here."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments import label, sample_pairs
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Preferences
from jaxrlhf.data import comparisons, tfds_preferences
from jaxrlhf.data.pipeline import Arrays
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.feedback import store


def read(path: Path, ties: bool = False) -> list[dict[str, Any]]:
    """Rows with prompt, chosen, rejected, ... of a feedback store, a `.jsonl` or `.jsonl.gz` file, or a TFDS folder (`train`).

    Raises:
        FileNotFoundError: nothing there.
        ValueError: `place: problem` of the first bad row.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no choices; make a feedback store by sample_pairs.py and label.py, or give a .jsonl file or a TFDS folder"
        )
    if path.is_dir():
        rows = tfds_preferences.read_tfds(path, "train")
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = tfds_preferences.read_jsonl(path)
    else:
        with contextlib.closing(store.open_store(path)) as db:
            return store.preferences(db, ties=ties)
    return [row for row in rows if ties or not row["tie"]]


def sample(config: sample_pairs.Config, policy: Path, out: Path, seed: int, mesh: MeshConfig) -> Path:
    """A feedback store below `out`: the policy's own answers, twice to each prompt, with the choices of a simulated person."""
    path = out / "feedback.sqlite"
    own = {"policies": (policy,), "store": path, "out": out / "sample_pairs", "seed": seed, "mesh": mesh, "against": 0}
    sample_pairs.run(dataclasses.replace(config, **own))
    label.run(label.Config(store=path, out=out / "label", seed=seed))
    return path


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What is learned from, and what is held out of it."""

    train: Preferences
    held_out: Preferences
    too_long: int  # pairs left out for want of room
    longest: int  # tokens of a response: R


def load(path: Path, tokenizer: Tokenizer, width: int, held_out: float, seed: int) -> Pairs:
    """Token rows of `width` of the choices at `path`, a share of them held out; ties are kept.

    Raises:
        ValueError: too few choices to hold some out, or as `read`.
    """
    rows = read(path, ties=True)
    fitting = comparisons.fitting(rows, tokenizer, width)
    cut = int(len(fitting) * held_out)
    if cut < 1 or cut == len(fitting):
        raise ValueError(
            f"{path}: {len(fitting)} choices with room in width={width}: a share of {held_out} leaves no pair on one side"
        )
    order = np.random.default_rng(seed).permutation(len(fitting))
    parts = [comparisons.preference_rows([fitting[i] for i in part], tokenizer, width) for part in (order[cut:], order[:cut])]
    longest = max(int(np.max(part.response_len)) for part in parts)
    return Pairs(parts[0], parts[1], len(rows) - len(fitting), longest)


def arrays(rows: Any) -> Arrays:
    """The fields of a batch type that are there, as arrays for `pipeline.batches`."""
    fields = ((field.name, getattr(rows, field.name)) for field in dataclasses.fields(rows))
    return {name: np.asarray(value) for name, value in fields if value is not None}
