"""What happened to a run: an append-only file of JSON lines, and the environment that it ran in."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxrlhf.training.metrics import write_atomic

FILE = "events.jsonl"
ENVIRONMENT = "environment.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "tokenizers")


class Events:
    """Appends a line an event: `number` (their order, whatever the clock does), `time` (UTC), `seconds` of the process, `kind`.

    A line goes to the system in one write, so that a killed process leaves whole lines; one that a power cut tore is dropped
    when the file is opened again. Without `writes` there is no file: of the processes of a job the first alone tells.
    """

    def __init__(self, directory: Path, writes: bool = True):
        self.path = Path(directory) / FILE
        self._writes = writes
        if not writes:
            return
        text = self.path.read_bytes() if self.path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            os.truncate(self.path, len(whole))
        self._number = whole.count(b"\n")
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._opened = time.monotonic()

    def write(self, kind: str, **fields: Any) -> None:
        """Append an event. A full disk does not silence what led to it: the event then goes to stderr."""
        if not self._writes:
            return
        self._number += 1
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        seconds = round(time.monotonic() - self._opened, 3)
        event = {"number": self._number, "time": now, "seconds": seconds, "pid": os.getpid(), "kind": kind, **fields}
        line = json.dumps(event, default=str) + "\n"
        try:
            os.write(self._handle, line.encode())
        except OSError as error:
            self._number -= 1
            print(f"{self.path} could not be written ({error.strerror}): {line}", end="", file=sys.stderr)

    def close(self) -> None:
        """Have them on the disk."""
        if not self._writes:
            return
        os.fsync(self._handle)
        os.close(self._handle)


def read(directory: Path) -> list[dict[str, Any]]:
    """The events of a run, in order."""
    path = Path(directory) / FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def environment() -> dict[str, Any]:
    """What a figure depends on beside settings and seed: versions, devices, commit."""
    import jax

    devices = [device.device_kind for device in jax.devices()]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": {kind: devices.count(kind) for kind in sorted(set(devices))},
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "host": socket.gethostname(),
        "cores": os.cpu_count(),
        "commit": _commit(),
    }


def settle_environment(directory: Path) -> list[str]:
    """Write environment.json, and name what differs from the one that was there and may change bits."""
    path, found = Path(directory) / ENVIRONMENT, environment()
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found
    except ValueError:
        before = {}
    matters = ("versions", "backend", "devices", "processes", "xla_flags", "commit")
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    return [f"{name}: {before.get(name)} before, {found[name]} now" for name in matters if before.get(name) != found[name]]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this package lies in; with a plus where files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if (root / ".git").exists() and (commit := git("rev-parse", "HEAD")):
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return None
