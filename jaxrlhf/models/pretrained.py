"""A trained model as a folder: `params.safetensors` with flat names such as `layers/query`, and `config.json`.

What a finished stage hands to the next, and all that serving reads: no optimizer, no pickles, nothing that runs on loading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jaxrlhf.core import processes
from jaxrlhf.models import int8

PARAMS, CONFIG = "params.safetensors", "config.json"


def save(path: Path | str, params: dict[str, Any], config: dict[str, Any] | Any) -> None:
    """Write the folder `path`; `config` is a dataclass or a dict of what JSON can hold. An earlier model is replaced as a
    whole: a reader sees the old model or the new one, and a crash leaves one of them.

    Raises:
        ValueError: the folder holds something else, a name cannot be flattened, or a weight is in eight bits.
        TypeError: the configuration holds what JSON cannot.
    """
    from safetensors.numpy import save_file

    int8.refuse(params, "saved")
    path = Path(path)
    values = config if isinstance(config, dict) else dataclasses.asdict(config)
    text = json.dumps(values, indent=1) + "\n"  # before anything is written
    if path.exists() and not (path / CONFIG).is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds no model ({CONFIG} is missing): choose another folder")
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    if traverse_util.unflatten_dict(flat, sep="/").keys() != params.keys():
        raise ValueError(f"parameters {sorted(params)} have '/' in a name, which separates levels in the file: rename them")
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: np.asarray(leaf, order="C") for name, leaf in flat.items()}, temporary / PARAMS)
    (temporary / CONFIG).write_text(text, encoding="utf-8")
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def load(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params as NumPy arrays, config) of a folder that `save` wrote.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config = settings(path)
    path = Path(path)
    try:
        flat = load_file(path / PARAMS)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path / PARAMS}: damaged or not safetensors ({error}); export the model again") from error
    return traverse_util.unflatten_dict(flat, sep="/"), config


def settings(path: Path | str) -> dict[str, Any]:
    """The configuration alone.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: it is damaged.
    """
    path = Path(path)
    for name in (CONFIG, PARAMS):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path}: no trained model there ({name} is missing); give the `model` folder of a finished stage"
            )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / CONFIG}: not readable JSON ({error}); export the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG}: holds {type(config).__name__}, not the settings of a model; export it again")
    return config


def fingerprint(params: Any) -> str:
    """A hash of names, types, shapes and numbers, by which parameters are known again wherever they were read from."""
    found = hashlib.blake2b(digest_size=16)
    for name, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        array = np.ascontiguousarray(processes.to_host(leaf))  # leaf by leaf: the host need not hold a second model
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()
