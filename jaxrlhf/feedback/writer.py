"""One thread that owns the store's connection: whatever waits goes to the disk in one commit, and is answered after it.

Fifty people at once are then one writer for SQLite, and one wait for the disk.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from jaxrlhf.feedback import schema, store

Job = Callable[[sqlite3.Connection], Any]
BATCH = 64  # jobs of one commit at most


class Busy(RuntimeError):
    """More jobs wait than may."""


class Writer:
    """Runs jobs on the store, in order, each whole or not at all. Close it when done (`contextlib.closing`)."""

    def __init__(self, path: Path, waiting: int = 256):
        """`waiting`: jobs that may wait; one more is refused.

        Raises:
            ValueError, FileNotFoundError: as `store.open_store`.
        """
        self._jobs: queue.Queue[tuple[Job, Future] | None] = queue.Queue(waiting)
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(path, opened), name="feedback writer", daemon=True)
        self._thread.start()
        opened.result()

    def submit(self, job: Job) -> Future:
        """The job's result, when it is on the disk.

        Raises:
            Busy: too many wait.
        """
        future: Future = Future()
        try:
            self._jobs.put_nowait((job, future))
        except queue.Full:
            raise Busy(f"{self._jobs.maxsize} requests wait for the disk") from None
        return future

    def close(self) -> None:
        """Finish what waits, and close the store."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self, path: Path, opened: Future[None]) -> None:
        try:
            db = store.open_store(path)  # a connection belongs to the thread that made it
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            while (first := self._jobs.get()) is not None:
                batch, ended = [first], False
                while len(batch) < BATCH and not ended:
                    try:
                        following = self._jobs.get_nowait()
                    except queue.Empty:
                        break
                    ended = following is None
                    batch += [] if following is None else [following]
                commit(db, batch)
                if ended:
                    break
        finally:
            db.close()


def commit(db: sqlite3.Connection, batch: list[tuple[Job, Future]]) -> None:
    """Run jobs in one transaction; a job that raises is undone alone. Nobody is answered before the commit."""
    outcomes: list[tuple[Any, BaseException | None]] = []
    try:
        with schema.transaction(db):
            for job, _ in batch:
                outcomes.append(_attempt(db, job))
    except BaseException as error:  # nothing of the batch is kept
        outcomes = [(None, error)] * len(batch)
    for (_, future), (result, error) in zip(batch, outcomes, strict=True):
        if not future.set_running_or_notify_cancel():
            continue  # the client has gone; what it sent is kept
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _attempt(db: sqlite3.Connection, job: Job) -> tuple[Any, BaseException | None]:
    try:
        with schema.transaction(db):
            return job(db), None
    except Exception as error:
        if not db.in_transaction:  # a full disk ends the whole transaction
            raise
        return None, error
