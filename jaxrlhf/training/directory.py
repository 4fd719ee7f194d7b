"""Whose a run's directory is: of one run, one process and one set of settings."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxrlhf
from jaxrlhf.training import cli
from jaxrlhf.training.metrics import write_atomic

MARK = "run.json"


def read_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds, or None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): remove it, or choose another --out") from error


def take(out: Path, config: Any, free: tuple[str, ...]) -> int:
    """Make the directory this run's, and give the lock of it (`take_lock`).

    Raises:
        ValueError: it belongs to something else, to a run with settings other than those in `free`, or to one that is running.
    """
    check_own(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = take_lock(out)
    try:
        settle_config(out, config, free)
    except BaseException:
        os.close(lock)
        raise
    return lock


def check_own(out: Path) -> None:
    """Nothing, an empty directory, or one of ours.

    Raises:
        ValueError: something else.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: --out must name a directory")
    if out.is_dir() and not (out / MARK).is_file() and any(p.name not in (".lock", f".{MARK}.tmp") for p in out.iterdir()):
        raise ValueError(f"{out} is not empty and was not made by this program (no {MARK}): choose a new or empty --out")


def take_lock(out: Path) -> int:
    """A file descriptor that holds the lock. The system frees it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it, naming that.
    """
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise ValueError(f"{out} is in use by another run ({owner}): wait for it, stop it, or choose another --out") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def settle_config(out: Path, config: Any, free: tuple[str, ...]) -> None:
    """Write config.yaml, or compare with the one that is there; of a run that ended before it did anything, that is replaced.

    Raises:
        ValueError: a setting differs that is not in `free`.
    """
    path = out / "config.yaml"
    new = cli.plain(dataclasses.asdict(config))
    if (out / MARK).is_file() and path.is_file() and _has_begun(out):
        import yaml

        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = [name for name in _differences(old, new, "") if name.partition(":")[0].partition(".")[0] not in free]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ValueError(f"{out} holds a run with other settings ({', '.join(differing[:3])}{more}): choose another --out")
    elif not (out / MARK).is_file():
        write_atomic(out / MARK, json.dumps({"seconds": 0.0, "cpu_seconds": 0.0, "version": jaxrlhf.__version__}) + "\n")
    write_atomic(path, cli.dump(config))


def _has_begun(out: Path) -> bool:
    """Whether there is more than what taking a directory leaves in it."""
    own = {MARK, "config.yaml", ".lock"}
    return any(path.name not in own and (path.is_dir() or path.stat().st_size) for path in out.iterdir())


def _differences(old: Any, new: Any, name: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old} there, {new} here"
