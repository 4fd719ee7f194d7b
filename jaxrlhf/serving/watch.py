"""Looks whether another policy was promoted, and has it served."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from jaxrlhf.models import pretrained
from jaxrlhf.serving.engine import Engine, Policy


def place(path: Path) -> tuple[str, int, int]:
    """What the path leads to: the folder, and which file of weights stands in it. A symlink that is replaced changes the first,
    a folder that is replaced the second.

    Raises:
        OSError: it leads nowhere.
    """
    folder = path.resolve(strict=True)
    found = os.stat(folder / pretrained.CONFIG)
    return str(folder), found.st_ino, found.st_mtime_ns


class Watch:
    """A thread that looks every `seconds`. Close it when done (`contextlib.closing`)."""

    def __init__(self, path: Path, load: Callable[[Path], Policy], engine: Engine, seen: tuple[str, int, int], seconds: float):
        """`seen`: the place whose policy is served now."""
        self._path, self._load, self._engine, self._seen, self._seconds = path, load, engine, seen, seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="serving watch", daemon=True)
        self._thread.start()

    def look(self) -> bool:
        """Serve what the path leads to now, if that is new; whether it was. What cannot be served is told once."""
        if not self._engine.settled:  # requests still run on the one before: no third policy in memory
            return False
        try:
            now = place(self._path)
        except OSError:
            return False  # between two renames
        if now == self._seen:
            return False
        self._seen = now
        log = logging.getLogger("uvicorn.error")
        try:
            policy = self._load(Path(now[0]))
            self._engine.swap(policy)
        except Exception as error:  # whatever a folder may hold: the policy that is served stays
            log.error("%s cannot be served, the policy before it stays: %s", now[0], error)
            return False
        log.warning("serving %s (%s)", now[0], policy.version)
        return True

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(self._seconds):
            self.look()
