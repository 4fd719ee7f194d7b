"""The files of a checkpoint of Hugging Face transformers: safetensors, one or several, each tensor read by parts."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor of a checkpoint."""

    file: Path
    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]  # that part of it; (): all


def tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's files.

    Raises:
        FileNotFoundError: there are no weights, or a file of the index is missing.
        ValueError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(index.values()))]
    found = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; weights must be safetensors, in {WEIGHTS} or as {INDEX} names them")
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    shape = tuple(opened.get_slice(name).get_shape())
                    found[name] = Stored(file, shape, functools.partial(_read, file, name))
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or not safetensors ({error}); download it again") from error
    return found


def _read(file: Path, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    # Opened for each tensor: the pages of a file that stays open would count as the process's memory.
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        return opened.get_slice(name)[index] if index else opened.get_tensor(name)


def write(folder: Path, named: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """One file, or several with an index; no more than one of them is in memory."""
    from safetensors.numpy import save_file

    places: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    files, size, total = 0, 0, 0

    def flush():
        save_file(shard, folder / f"{files}.safetensors", {"format": "pt"})  # which transformers asks for
        places.update(dict.fromkeys(shard, files))
        shard.clear()

    for name, tensor in named:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            files, size = files + 1, 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if not files:
        os.replace(folder / "0.safetensors", folder / WEIGHTS)
        return
    final = [f"model-{i + 1:05}-of-{files + 1:05}.safetensors" for i in range(files + 1)]
    for i, name in enumerate(final):
        os.replace(folder / f"{i}.safetensors", folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[i] for name, i in places.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
