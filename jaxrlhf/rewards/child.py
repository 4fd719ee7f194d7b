"""What runs inside a child process of `rewards/pool.py`: import the functions, limit the memory, answer request after request.

A message is its length in four bytes and JSON. Imports nothing heavy: a child that was killed is replaced at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

TEXT = 200  # characters of a message


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a child finds a function: `MODULE:NAME` or `FILE.py:NAME`; with arguments, NAME is called with them to make it."""

    place: str
    arguments: Mapping[str, Any] | None = None


def find(source: Source) -> Any:
    """The function that a source names, imported into this process.

    Raises:
        ValueError: no such file, module or name in it.
    """
    import importlib.util
    import pkgutil

    where, _, name = source.place.rpartition(":")
    if not where or not name:
        raise ValueError(f"'{source.place}' names no function: write FILE.py:NAME or MODULE:NAME")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location("reward_functions", where)
            if spec is None or spec.loader is None:
                raise ImportError(f"{where} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found = getattr(module, name)
        else:
            found = pkgutil.resolve_name(source.place)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"{source.place}: {error}") from error
    if not callable(found):
        raise ValueError(f"{source.place} is a {type(found).__name__}, not a function")
    return found if source.arguments is None else found(**source.arguments)


def pack(message: Any) -> bytes:
    """A message of the channel.

    Raises:
        ValueError: JSON cannot hold it.
    """
    try:
        text = json.dumps(message)
    except TypeError as error:
        raise ValueError(
            f"a data-set row cannot be sent to a child process: {error}; keep to text, numbers and lists"
        ) from error
    return struct.pack(">I", len(text)) + text.encode()


def serve(handle: int, parent: int) -> None:
    """What a child does, all its life: import the functions, limit its memory, then answer requests until there are no more."""
    _die_with(parent)
    channel = socket.socket(fileno=handle)
    setup, memory_mb = _receive(channel)
    try:
        functions = {name: find(Source(**source)) for name, source in setup.items()}
        _limit_memory(memory_mb)
    except BaseException as error:
        channel.sendall(pack({"unready": f"{type(error).__name__}: {error}"}))
        return
    channel.sendall(pack({"ready": True}))
    while True:
        name, *item = _receive(channel)
        channel.sendall(_answer(functions[name], item))


def _answer(function: Any, item: Sequence[Any]) -> bytes:
    try:
        value = function(*item)
        try:
            value = value if isinstance(value, str) else float(value)
        except (TypeError, ValueError, OverflowError):
            value = str(value)
        return pack({"value": value[:TEXT] if isinstance(value, str) else value})
    except BaseException as error:  # SystemExit too
        reason = f"{type(error).__name__}: {error}"[:TEXT]
        return pack({"raised": reason, "spent": isinstance(error, MemoryError)})


def _receive(channel: socket.socket) -> Any:
    """One message; where there are no more, the process ends."""
    data = b""
    while len(data) < 4 or len(data) < 4 + struct.unpack(">I", data[:4])[0]:
        more = channel.recv(1 << 20)
        if not more:
            os._exit(0)
        data += more
    return json.loads(data[4:])


def _die_with(parent: int) -> None:
    """On Linux a child is killed when the parent ends, however it ends; elsewhere it ends at its next request."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(0)


def _limit_memory(memory_mb: int) -> None:
    import resource

    if not os.path.isfile("/proc/self/statm"):
        return  # not Linux: the limit of address space is not kept there anyway
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    most = mapped + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
