"""Checkpoints: Orbax writes the arrays; a manifest of content hashes and one rename make them trustworthy.

Orbax alone restores flipped bits and casts types in silence. So a checkpoint `DIR/00000030/` holds `state/` (Orbax) and
`manifest.json` (shape, type and hash of every leaf, hash of every file), is written under a temporary name, and is renamed
when whole: a step that is listed is complete, and what is restored is what was saved or an error that names the leaf.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core import processes
from jaxrlhf.core.sharding import path_name
from jaxrlhf.training.metrics import write_atomic

MANIFEST = "manifest.json"


def steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, ascending."""
    directory = Path(directory)
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(p.name) for p in found if p.name.isdigit() and (p / MANIFEST).is_file())


def latest(directory: str | Path) -> int | None:
    """The newest complete step, or None."""
    found = steps(directory)
    return found[-1] if found else None


def save(directory: str | Path, step: int, state: Any, keep: int = 2) -> None:
    """Write `state`, a pytree of arrays, as checkpoint `step`; then remove all but the newest `keep`.

    Nothing older is touched before the new one is complete. A step that exists already is left as it is. Of several processes
    all must call it, on one file system: each writes the parts of arrays that it holds, the first all else.
    """
    directory = Path(directory).resolve()  # Orbax refuses relative paths, after having made the folder
    final, temporary = _folder(directory, step), directory / f".tmp-{step:08d}"
    if processes.by_first(lambda: step in steps(directory)):
        return

    def clear() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in (*directory.glob(".tmp-*"), final):  # what a killed save left behind
            shutil.rmtree(stale, ignore_errors=True)

    def complete() -> None:
        manifest = {"step": step, "leaves": described, "files": _file_hashes(temporary / "state")}
        write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
        os.replace(temporary, final)
        _sync_folder(directory)
        for old in steps(directory)[:-keep]:
            shutil.rmtree(_folder(directory, old))

    processes.by_first(clear)
    leaves = _leaves(state)
    try:
        _orbax().save(temporary / "state", leaves)
        described = {name: _describe(x) | {"blake2b": _hash(x)} for name, x in leaves.items()}
        processes.by_first(complete)
    except BaseException:
        if processes.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def restore(directory: str | Path, like: Any, step: int | None = None) -> tuple[Any, int]:
    """The state of checkpoint `step` (default: the newest), and the step.

    `like` is a pytree of arrays or `ShapeDtypeStruct`s that gives structure, shapes, types and shardings (none: the first
    device); the mesh may differ from the one that saved.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: it does not fit `like` (naming leaf and both shapes or types), or it is damaged (naming file or leaf).
    """
    directory = Path(directory).resolve()
    step = latest(directory) if step is None else step
    if step is None or step not in steps(directory):
        raise FileNotFoundError(f"no complete checkpoint{'' if step is None else f' of step {step}'} in {directory}")
    folder = _folder(directory, step)
    manifest = _manifest(folder)
    wanted = _leaves(like)
    _check_fit(folder, manifest["leaves"], wanted)
    hashes = _file_hashes(folder / "state")
    changed = [name for name, digest in manifest["files"].items() if hashes.get(name) != digest]
    if changed:  # Orbax may restore such files without a word
        raise _damaged(directory, step, "file", changed)
    found = _orbax().load(folder / "state", {name: _abstract(x) for name, x in wanted.items()})
    changed = [name for name, x in found.items() if _hash(x) != manifest["leaves"][name]["blake2b"]]
    if changed:
        raise _damaged(directory, step, "leaf", changed)
    return _unflatten(like, found), step


def _damaged(directory: Path, step: int, kind: str, names: list[str]) -> ValueError:
    folder, older = _folder(directory, step), [s for s in steps(directory) if s < step]
    fix = f"remove {folder} to go on from step {older[-1]}" if older else "there is no older one: start in a new --out"
    return ValueError(f"checkpoint {folder} is damaged: {kind} {', '.join(names[:3])} is not as it was written; {fix}")


def _folder(directory: Path, step: int) -> Path:
    return directory / f"{step:08d}"


def _orbax() -> Any:
    from orbax.checkpoint import v1

    return v1


def _leaves(state: Any) -> dict[str, Any]:
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


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax would take the saved one, of devices that may not be here.
    placed = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


def _unflatten(like: Any, found: dict[str, jax.Array]) -> Any:
    def one(path, leaf):
        value = found[_name(path)]
        return jax.random.wrap_key_data(value, impl=_key_impl(leaf)) if _is_key(leaf) else value

    return jax.tree_util.tree_map_with_path(one, like)


def _key_impl(x: Any) -> Any:
    return jax.random.key_impl(jax.random.key(0)) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_impl(x)


def _describe(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _check_fit(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    problems = [f"{name} is missing in it" for name in wanted if name not in saved]
    problems += [f"{name} is only in it" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        if name in saved:
            there = {k: saved[name][k] for k in ("shape", "dtype")}
            if there != _describe(leaf):
                problems.append(f"{name} is {_text(there)} there, {_text(_describe(leaf))} here")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"checkpoint {folder} is of another model or optimizer: {'; '.join(problems[:3])}{more}")


def _text(leaf: dict[str, Any]) -> str:
    return f"{leaf['dtype']}{leaf['shape']}"


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _ = manifest["leaves"], manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {MANIFEST} is not readable; remove the folder") from error
    return manifest


def _hash(x: jax.Array) -> str:
    """Of the values in C order; type and shape stand beside it in the manifest."""
    return hashlib.blake2b(np.asarray(processes.to_host(x)).tobytes(), digest_size=16).hexdigest()


def _file_hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, lambda: hashlib.blake2b(digest_size=16)
            ).hexdigest()
    return found


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder was written."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
