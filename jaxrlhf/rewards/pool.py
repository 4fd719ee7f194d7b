"""Reward functions that are not trusted, or may be slow, each call in a child process that is killed when it takes too long.

Threads and alarm signals do not end a regular expression or a solver that hangs; killing its process does. A child that
raises, hangs, fills the memory, ends itself or answers rubbish costs its one response: weight 0, counted, and named
(`rewards/functions.apply`). What a function prints goes nowhere. Children speak JSON, not pickle, so that what one answers
cannot run here. They are no sandbox: files and network are open to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxrlhf.core import processes
from jaxrlhf.rewards.child import TEXT, Source, pack

Item = tuple[str, str, dict[str, Any]]  # prompt, response, data-set row

STARTING = 60.0  # seconds for a child to import the functions
LARGEST = 65_536  # bytes of an answer; more is rubbish


@dataclasses.dataclass(frozen=True)
class Config:
    workers: int = 0  # child processes; 0: functions run in this process, without any limit
    seconds: float = 5.0  # for one response
    memory_mb: int = 512  # of address space, beside what a child has when it starts
    functions: tuple[str, ...] = ()  # further rewards, added with weight 1: FILE.py:NAME or MODULE:NAME


@dataclasses.dataclass
class _Child:
    process: subprocess.Popen
    channel: socket.socket
    born: float
    ready: bool = False
    buffer: bytes = b""
    job: tuple[int, float] | None = None  # index of the item, deadline


class Pool:
    """`config.workers` children at work and a spare one, so that who is killed need not be waited for. Made by `open_pool`."""

    def __init__(self, sources: Mapping[str, Source], config: Config):
        self.config = config
        self.killed = 0  # children, since the start
        self._setup = {name: dataclasses.asdict(source) for name, source in sources.items()}
        self._selector = selectors.DefaultSelector()
        self._children: list[_Child] = []

    def score(self, name: str, items: Sequence[Item]) -> tuple[list[Any], dict[int, str]]:
        """The value of each item by the function called `name`, and the cause for those that have none.

        Raises:
            ValueError: an item cannot be written as JSON, or no child can be started any more.
        """
        requests = [pack([name, *item]) for item in items]
        values, causes, waiting = [None] * len(items), {}, list(range(len(items)))[::-1]
        while waiting or any(child.job for child in self._children):
            self._fill()
            for child in [c for c in self._children if c.ready and c.job is None][: len(waiting)]:
                if sum(c.job is not None for c in self._children) < self.config.workers:
                    self._give(child, waiting.pop(), requests)
            for key, _ in self._selector.select(self._patience()):
                self._hear(key.data, values, causes)
            for child in [c for c in self._children if c.job and time.monotonic() > c.job[1]]:
                self._fail(child, causes, f"took longer than {self.config.seconds:g} s")
            if any(not c.ready and time.monotonic() > c.born + STARTING for c in self._children):
                raise ValueError(f"a child process for rewards did not start within {STARTING:g} s")
        return values, causes

    def check(self) -> None:
        """Return when a child has imported the functions.

        Raises:
            ValueError: it cannot, with the reason.
        """
        self._fill()
        while not any(child.ready for child in self._children):
            for key, _ in self._selector.select(1.0):
                self._hear(key.data, [], {})
            self._fill()
            if any(time.monotonic() > child.born + STARTING for child in self._children):
                raise ValueError(f"reward functions {self._places()}: were not imported within {STARTING:g} s")

    def close(self) -> None:
        """Kill every child, and whatever each of them started."""
        for child in list(self._children):
            self._kill(child)
        self._selector.close()

    def _places(self) -> str:
        return ", ".join(setup["place"] for setup in self._setup.values())

    def _fill(self) -> None:
        while len(self._children) < self.config.workers + 1:
            ours, theirs = socket.socketpair()
            # The paths of this process, because a file of the user's may lie on any of them.
            start = (
                f"import json, sys; sys.path[:] = json.loads({json.dumps(json.dumps(sys.path))}); "
                f"from jaxrlhf.rewards import child; child.serve({theirs.fileno()}, {os.getpid()})"
            )
            process = subprocess.Popen(
                [sys.executable, "-c", start],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us; and the group is what is killed
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is ours
            )
            theirs.close()
            ours.setblocking(True)
            ours.settimeout(self.config.seconds)
            child = _Child(process, ours, time.monotonic())
            self._children.append(child)
            self._selector.register(ours, selectors.EVENT_READ, child)
            ours.sendall(pack([self._setup, self.config.memory_mb]))

    def _patience(self) -> float:
        deadlines = [child.job[1] for child in self._children if child.job]
        return max(0.0, min(deadlines, default=time.monotonic() + 0.2) - time.monotonic()) + 0.001

    def _give(self, child: _Child, index: int, requests: list[bytes]) -> None:
        child.job = index, time.monotonic() + self.config.seconds
        with contextlib.suppress(OSError):  # it is gone or does not listen: which is heard, or takes too long
            child.channel.sendall(requests[index])

    def _hear(self, child: _Child, values: list[Any], causes: dict[int, str]) -> None:
        """Take in what a child says: that it is ready, a value, or a reason why there is none."""
        try:
            data = child.channel.recv(LARGEST)
        except OSError:
            data = b""
        child.buffer += data
        if not data:
            return self._fail(child, causes, f"ended its process ({_how(child.process)})")
        if len(child.buffer) < 4 or len(child.buffer) < (size := 4 + struct.unpack(">I", child.buffer[:4])[0]) <= LARGEST:
            return None
        message, child.buffer = _unpack(child.buffer[4:size]), child.buffer[size:]
        match message:
            case {"ready": True} if not child.ready:
                child.ready = True
            case {"unready": str(reason)} if not child.ready:
                raise ValueError(f"reward functions {self._places()}: {reason[:TEXT]}")
            case {"value": value} if child.job and child.ready:
                values[child.job[0]], child.job = value, None
            case {"raised": str(reason), "spent": bool(spent)} if child.job and child.ready:
                causes[child.job[0]] = f"raised {reason[:TEXT]}"
                child.job = None
                if spent:  # what filled its memory may still be there
                    self._kill(child)
            case _:
                self._fail(child, causes, "answered rubbish")
        return None

    def _fail(self, child: _Child, causes: dict[int, str], cause: str) -> None:
        if not child.ready:
            raise ValueError(f"a child process for the reward functions {self._places()} {cause} before it was ready")
        if child.job:
            causes[child.job[0]] = cause
        self._kill(child)

    def _kill(self, child: _Child) -> None:
        self._children.remove(child)
        self._selector.unregister(child.channel)
        child.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
        self.killed += 1


@dataclasses.dataclass(frozen=True)
class Remote:
    """One of a pool's functions, which `rewards/functions.apply` takes in place of a function."""

    pool: Pool
    name: str


@contextlib.contextmanager
def open_pool(sources: Mapping[str, Source], config: Config) -> Iterator[dict[str, Remote]]:
    """{name: function} of the sources, run in children until the end of the `with`.

    Raises:
        ValueError: a limit that is none, or a function that a child cannot import.
    """
    if config.workers < 1 or not config.seconds > 0 or config.memory_mb < 16:
        raise ValueError(f"{config}: need workers >= 1, seconds > 0 and memory_mb >= 16")
    pool = Pool(sources, config)
    try:
        processes.alike(pool.check)
        yield {name: Remote(pool, name) for name in sources}
    finally:
        pool.close()


def _unpack(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _how(process: subprocess.Popen) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.2)
    code = process.returncode
    return "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
