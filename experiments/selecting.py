"""Which pairs of a feedback store people are asked about first, by what a reward model says of them (docs/selection.md)."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments import stage
from jaxrlhf.core import processes
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import comparisons
from jaxrlhf.feedback import assignments, selection, store
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards


@dataclasses.dataclass(frozen=True)
class Config:
    by: Literal["arrival", "random", "uncertainty", "disagreement", "bald"] = "arrival"  # arrival: as the pairs came
    reward: Path | None = None  # reward model that says what is uncertain; of an ensemble for disagreement and bald

    def __post_init__(self):
        if self.by in ("uncertainty", *selection.SEVERAL) and self.reward is None:
            raise ValueError(
                f"select.by={self.by} needs a reward model: give select.reward, a folder that reward_model.py wrote"
            )
        if self.by in ("arrival", "random") and self.reward is not None:
            raise ValueError(f"select.by={self.by} reads no reward model: leave select.reward out, or choose another way")


def ask_first(db: sqlite3.Connection, config: Config, rules: assignments.Rules, seed: int) -> dict[str, Any]:
    """Put the pairs that lack labels in the order in which they are worth asking about, and say what was done.

    Raises:
        FileNotFoundError: no such reward model.
        ValueError: it is none, or is a single model where several must disagree.
    """
    waiting, told = assignments.waiting(db, rules), {"by": config.by, "reward": config.reward and str(config.reward)}
    if config.by == "arrival" or not waiting:
        return told | {"pairs": 0}
    margins = np.zeros((1, len(waiting))) if config.reward is None else read_margins(config.reward, waiting)
    value = selection.worth(margins, config.by, seed)
    open_ones = {pair.id for pair in waiting}
    asked = Counter(pair.prompt for pair in store.pairs(db) if pair.id not in open_ones)
    order = selection.order(value, [pair.prompt for pair in waiting], asked)
    assignments.ask_first(db, [waiting[i].id for i in order])
    return told | {"pairs": len(waiting), "worth": {"first": float(value[order[0]]), "mean": float(value.mean())}}


def read_margins(folder: Path, pairs: Sequence[store.Pair], size: int = 128) -> Float[np.ndarray, "m n"]:
    """What a reward model (an ensemble: each member) scores response a above response b, in the unit of its choices."""
    mesh = stage.mesh(MeshConfig(), scored=size)
    with jax.set_mesh(mesh):
        judged = stage.load(folder, mesh, "reward_model")
        return margins(judged, pairs, size)


def margins(judged: stage.Trained, pairs: Sequence[store.Pair], size: int = 128) -> Float[np.ndarray, "m n"]:
    """`read_margins` of a model that is loaded; `size` responses at a time."""
    several, pooling = stage.ensembled(judged.settings), judged.settings["pooling"]

    @jax.jit
    def score(params: Any, tokens: jax.Array, length: jax.Array) -> jax.Array:
        if several is None:
            found = rewards.score(judged.model, params, tokens, length, pooling)[None]
        else:
            found = ensembles.scores(judged.model, params, tokens, length, pooling, several)
        # The gain was fixed after training, for policies; choices were learned without it.
        return found / params["gain"].reshape(-1, 1)

    rows = [{"prompt": pair.prompt, "chosen": pair.response_a, "rejected": pair.response_b} for pair in pairs]
    both = comparisons.whole_rows(rows, judged.tokenizer, multiple=16)
    tokens = np.asarray(both.tokens).reshape(2 * len(pairs), -1)
    length = np.asarray(both.prompt_len + both.response_len).reshape(-1)
    whole = -(-len(tokens) // size) * size
    padded = np.resize(tokens, (whole, tokens.shape[1])), np.resize(length, whole)
    parts = [score(judged.params, *(jnp.asarray(x[i : i + size]) for x in padded)) for i in range(0, whole, size)]
    found = np.concatenate(processes.to_host(parts), axis=1)[:, : len(tokens)].astype(np.float64)
    return found[:, ::2] - found[:, 1::2]
