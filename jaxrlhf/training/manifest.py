"""What a checkpoint says of itself: the names, shapes, types and hashes of its leaves and files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core import processes
from jaxrlhf.core.sharding import path_name
from jaxrlhf.training.metrics import write_atomic

FILE = "manifest.json"


def write(folder: Path, step: int, leaves: dict[str, Any], notes: dict[str, Any]) -> None:
    """Write the manifest of a folder that is whole but for it. It carries its own hash."""
    content = {"step": step, "notes": notes, "leaves": leaves, "files": file_hashes(folder / "state")}
    write_atomic(folder / FILE, json.dumps(content | {"blake2b": _of_text(content)}, indent=1))


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, not readable, not as it was written, or of another step than its folder.
    """
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        digest = content.pop("blake2b")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _untrusted(folder, "is missing" if isinstance(error, FileNotFoundError) else "is not readable") from error
    if digest != _of_text(content):
        raise _untrusted(folder, "is not as it was written")
    if content["step"] != int(folder.name):
        raise _untrusted(folder, f"is that of step {content['step']}")
    return content


def _untrusted(folder: Path, problem: str) -> ValueError:
    return ValueError(f"checkpoint {folder} is damaged: file {FILE} {problem}, so that no leaf of it can be trusted")


def _of_text(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def of_leaves(manifest: dict[str, Any]) -> str:
    """A hash of what a checkpoint holds, whatever else its files say: equal for equal arrays."""
    return _of_text(manifest["leaves"])


def leaves_of(state: Any) -> dict[str, Any]:
    """{name: array, or its shape}; random keys as their data."""
    return {_name(path): _key_data(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _name(path: tuple) -> str:
    return path_name(path).replace("/", ".")  # Orbax would read `/` as a folder


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(x: Any) -> Any:
    if not _is_key(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
    return jax.random.key_data(x)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """What Orbax is to restore a leaf as."""
    # Without a sharding Orbax would take the saved one, of devices that may not be here.
    placed = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


def unflatten(like: Any, found: dict[str, jax.Array]) -> Any:
    """The leaves of `leaves_of` as the pytree `like`."""

    def one(path, leaf):
        value = found[_name(path)]
        return jax.random.wrap_key_data(value, impl=_key_impl(leaf)) if _is_key(leaf) else value

    return jax.tree_util.tree_map_with_path(one, like)


def _key_impl(x: Any) -> Any:
    return jax.random.key_impl(jax.random.key(0)) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_impl(x)


def describe(x: Any) -> dict[str, Any]:
    """Shape and type of a leaf, as the manifest has them."""
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def check_fit(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint whose leaves are not those that are wanted, each of its shape and type.

    Raises:
        ValueError: naming leaves, with both shapes and types.
    """
    problems = [f"{name} is missing in it" for name in wanted if name not in saved]
    problems += [f"{name} is only in it" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        if name in saved:
            there = {k: saved[name][k] for k in ("shape", "dtype")}
            if there != describe(leaf):
                problems.append(f"{name} is {_text(there)} there, {_text(describe(leaf))} here")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"checkpoint {folder} is of another model or optimizer: {'; '.join(problems[:3])}{more}")


def _text(leaf: dict[str, Any]) -> str:
    return f"{leaf['dtype']}{leaf['shape']}"


def on_host(x: Any) -> np.ndarray:
    """All values of an array. Where processes share it, each of them must call this."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        return processes.to_host(x)
    # Of one device the very array that Orbax copies from: then there is one copy to the host, not two.
    return np.asarray(x.addressable_shards[0].data if x.is_fully_replicated else x)


def hash_of(x: Any) -> str:
    """Of the values of an array in C order; type and shape stand beside it in the manifest."""
    values = x if isinstance(x, np.ndarray) else on_host(x)
    return hashlib.blake2b(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, digest_size=16).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by its path there."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, lambda: hashlib.blake2b(digest_size=16)
            ).hexdigest()
    return found
