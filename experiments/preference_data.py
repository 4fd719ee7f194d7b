"""Pairs to learn from: choices in a feedback store, a JSON-lines file or a TFDS folder, or among the policy's own answers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import label, sample_pairs, tasks
from jaxrlhf.algorithms import dpo
from jaxrlhf.core import processes, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Preferences
from jaxrlhf.data import comparisons
from jaxrlhf.data.pipeline import Arrays
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.feedback import exchange, store, unpaired
from jaxrlhf.sampling import rollout
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 48  # tokens of a prompt with its answer; longer pairs are left out and counted
    held_out: float = 0.15  # of the pairs
    skip_bad: bool = False  # leave bad lines of a .jsonl file out, count them and name them in rejects.jsonl; else refuse it
    # Where there are no choices:
    prompts: int = 2048  # answered by the policy itself
    n: int = 4  # answers to each in the arithmetic task, of which the best and the worst are a pair; sentiment takes two


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What is learned from, and what is held out of it."""

    train: Preferences  # on the host
    held_out: Preferences
    too_long: int  # pairs left out for want of room
    longest: int  # tokens of a response: R


def read(path: Path, ties: bool = False, run: Run | None = None, skip_bad: bool = False) -> list[dict[str, Any]]:
    """Rows with prompt, chosen, rejected, ... of a feedback store, a `.jsonl`, `.jsonl.gz` or `.parquet` file, or a folder
    of TFDS or Hugging Face (`train`).

    A `run` that goes on reads of a store what it read before, whatever people have chosen since; a file must be the same.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: `place: problem` of the first bad row, or the file is another than when the run began.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no choices; make a feedback store by sample_pairs.py and label.py, or give a .jsonl file or a folder"
        )
    if path.is_dir() or path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        rejects = run.rejects() if run is not None and skip_bad and path.is_file() else None
        rows = exchange.read(path, rejects)
        if run is not None and rejects is not None:
            run.left_out(path, rejects)
        # Of a folder the rows: what else lies there says nothing.
        content = path.read_bytes() if path.is_file() else json.dumps(rows, default=str).encode()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if run is not None and run.once(f"blake2b of {path.name}", lambda: digest) != digest:
            raise ValueError(f"{path}: changed since this run began to learn from it; put it back, or choose another --out")
    else:
        with contextlib.closing(store.open_store(path)) as db:
            upto = None if run is None else run.once("feedback_sequence", lambda: store.last_sequence(db))
            return store.preferences(db, upto, ties)
    return [row for row in rows if ties or not row["tie"]]


def load(path: Path, tokenizer: Tokenizer, config: Config, seed: int, run: Run | None = None) -> Pairs:
    """Token rows of the choices at `path`; ties are kept.

    Raises:
        ValueError: too few choices to hold some out, or as `read`.
    """
    rows = read(path, True, run, config.skip_bad)
    fitting = comparisons.fitting(rows, tokenizer, config.width)
    if not fitting:
        raise ValueError(f"{path}: none of {len(rows)} choices has room in width={config.width}: label more, or widen it")
    pairs = comparisons.preference_rows(fitting, tokenizer, config.width)
    return split(pairs, config.held_out, seed, len(rows) - len(fitting), str(path))


def thumbs(path: Path, tokenizer: Tokenizer, width: int, run: Run | None = None) -> tuple[dict[str, Any], int]:
    """Single answers that people judged by thumbs up or down, of a feedback store: the fields of `kto.Examples` but those of
    the models, and how many had no room in `width`. A `run` that goes on reads what it read before.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a feedback store, or no judgement in it that has room.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no feedback store; thumbs are collected there by serve.py")
    with contextlib.closing(store.open_store(path)) as db:
        upto = None if run is None else run.once("thumbs_sequence", lambda: unpaired.last_sequence(db))
        rows = unpaired.rows(db, upto)
    arrays, kept = comparisons.answer_rows(rows, tokenizer, width) if rows else ({}, [])
    if not kept:
        raise ValueError(f"{path}: none of {len(rows)} thumbs has room in width={width}: collect more by serve.py, or widen it")
    judged = {"desirable": np.array([row["label"] for row in kept]), "weight": np.ones(len(kept), np.float32)}
    return arrays | judged, len(rows) - len(kept)


def split(pairs: Preferences, held_out: float, seed: int, too_long: int, place: str) -> Pairs:
    """Hold a share of the pairs out.

    Raises:
        ValueError: no pair would be left on one side.
    """
    count = len(pairs.weight)
    cut = int(count * held_out)
    if cut < 1 or cut == count:
        raise ValueError(f"{place}: a share held_out={held_out} of {count} pairs leaves none on one side: make more pairs")
    order = np.random.default_rng(seed).permutation(count)
    test, train = (jax.tree.map(lambda x, part=part: np.asarray(x)[part], pairs) for part in (order[:cut], order[cut:]))
    return Pairs(train, test, too_long, int(np.max(pairs.response_len)))


def simulated(config: Config, policy: Path, out: Path, seed: int, mesh: MeshConfig) -> Path:
    """A feedback store below `out`: the policy's own answers, two to each prompt, with the choices of a simulated person."""
    path = out / "feedback.sqlite"
    batch = min(256, config.prompts)
    sample_pairs.run(
        sample_pairs.Config(
            policies=(policy,), store=path, out=out / "sample_pairs", seed=seed, mesh=mesh, count=config.prompts, against=0,
            batch=batch,
        )
    )  # fmt: skip
    label.run(label.Config(store=path, out=out / "label", seed=seed))
    return path


def judged(config: Config, task: tasks.Task, mesh: jax.sharding.Mesh, seed: int) -> Pairs:
    """Pairs of the start's own answers: of n to each prompt the best and the worst by the task's score."""
    start, parts, drawn = task.start, [], 0
    options = rollout.Options(reuse_sampler_logprobs=True)
    while drawn < config.prompts:
        prompts, key = sharding.shard_batch(task.prompts[len(parts)], mesh), jax.random.key(seed)
        policy = {"policy": start.params}, {"reference": start.params}
        experience = rollout.collect(start.model, *policy, prompts, task.spec, key, config.n, options=options)
        score, weight, _ = task.score(experience.rollout, prompts)
        pairs = processes.to_host(dpo.from_experience(dataclasses.replace(experience, score=score, weight=weight), config.n))
        parts.append(jax.tree.map(lambda x, kept=pairs.weight > 0: x[kept], pairs))
        drawn += len(pairs.weight)
    # The scripts compute log-probs of the plain softmax, as for pairs from anywhere.
    whole = dataclasses.replace(jax.tree.map(lambda *x: np.concatenate(x), *parts), ref_logprobs=None)
    return split(whole, config.held_out, seed, 0, "the policy's own answers")


def arrays(rows: Any) -> Arrays:
    """The fields of a batch type that are there, as arrays for `pipeline.batches`."""
    fields = ((field.name, getattr(rows, field.name)) for field in dataclasses.fields(rows))
    return {name: np.asarray(value) for name, value in fields if value is not None}


def gather(config: Any, task: tasks.Task, mesh: jax.sharding.Mesh, run: Run | None = None) -> Pairs:
    """The pairs that a script's settings ask for: `choices` where given, else made from the policy's own answers.

    There a simulated person chooses (`label.py`), or in the arithmetic task the right answer. `config` has task, policy,
    choices, pairs, out, seed and mesh.
    """
    path = config.choices
    if path is None and config.task == "arithmetic":
        return judged(config.pairs, task, mesh, config.seed)
    if path is None:
        path = simulated(config.pairs, config.policy, config.out, config.seed, config.mesh)
    return load(path, task.start.tokenizer, config.pairs, config.seed, run)
