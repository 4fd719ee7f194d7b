"""Rounds of improvement on the disk: immutable manifests in a chain, and which policy is served.

    rounds/000/    policy/, reward_model/ and round.json: where it all began
    rounds/001/    begun.json, snapshot/, stages/, policy/, reward_model/, round.json
    rounds/events.jsonl    append-only: promoted, rolled back
    serving -> rounds/001/policy

`round.json` is written once, last and whole. It names the hashes of all that the round used and made, its own, and that of the
round before. The log of events says what is served; the symlink follows it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.training import events
from jaxrlhf.training.manifest import file_hashes
from jaxrlhf.training.metrics import write_atomic

FILE, BEGUN, SERVING = "round.json", "begun.json", "serving"
PARTS = ("policy", "reward_model", "snapshot")  # folders whose hashes a manifest names


def place(out: Path, number: int) -> Path:
    """The folder of a round."""
    return out / "rounds" / f"{number:03d}"


def finished(out: Path) -> int:
    """How many rounds there are up to the last one with a manifest; round 0 counts."""
    return max((1 + int(file.parent.name) for file in (out / "rounds").glob(f"[0-9]*/{FILE}")), default=0)


# -------------------------------------------------------------------------------------------------------- manifests


def begin(out: Path, number: int, content: dict[str, Any]) -> dict[str, Any]:
    """Note what a round begins with, or of one that has begun give what was noted then.

    Raises:
        ValueError: it was begun with other settings.
    """
    path = place(out, number) / BEGUN
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, content)
        return content
    before = read_sealed(path)
    old, new = before["settings"], json.loads(json.dumps(content["settings"]))
    if old != new:
        differing = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
        raise ValueError(
            f"{path.parent} was begun with other settings ({', '.join(differing[:3])}): {path} has them; go on with them, or "
            "remove that folder, which no other round refers to"
        )
    return before


def seal(out: Path, number: int, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a round whose folders are whole: their hashes, that of the round before, and its own.

    Raises:
        ValueError: the round has a manifest already, or the round before has none.
    """
    folder = place(out, number)
    if (folder / FILE).exists():
        raise ValueError(f"{folder / FILE} is there already: a round is written once")
    parent = None if number == 0 else {"round": number - 1, "blake2b": digest_of(read(out, number - 1))}
    parts = {part: {"blake2b": digest(folder / part)} for part in PARTS if (folder / part).is_dir()}
    whole = {"schema": 1, "round": number, "parent": parent} | content
    for part, found in parts.items():
        whole[part] = found | whole.get(part, {})
    write_sealed(folder / FILE, whole)
    return whole


def read(out: Path, number: int) -> dict[str, Any]:
    """The manifest of a round.

    Raises:
        ValueError: it is missing or not as it was written, or is that of another round.
    """
    path = place(out, number) / FILE
    if not path.is_file():
        raise ValueError(f"{out}: there is no round {number}; there are {finished(out)}, counted from 0")
    content = read_sealed(path)
    if content["round"] != number:
        raise ValueError(f"{path}: is the manifest of round {content['round']}")
    return content


def chain(out: Path) -> list[dict[str, Any]]:
    """All manifests, each of which names the hash of the one before.

    Raises:
        ValueError: naming the round that is not as it was written, or does not follow the one before.
    """
    found = [read(out, number) for number in range(finished(out))]
    for before, after in itertools.pairwise(found):
        if after["parent"] != {"round": before["round"], "blake2b": digest_of(before)}:
            raise ValueError(
                f"{place(out, after['round']) / FILE} does not follow {place(out, before['round']) / FILE}: "
                "the chain is broken there; restore both from a copy"
            )
    return found


def check(out: Path, number: int, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The manifest of a round whose folders are all as they were when it was written.

    Raises:
        ValueError: naming the folder that is not.
    """
    content = read(out, number)
    for part in parts:
        if part in content and "blake2b" in content[part]:
            folder = place(out, number) / part
            if not folder.is_dir() or digest(folder) != content[part]["blake2b"]:
                raise ValueError(f"{folder} is not as round {number} left it: restore it from a copy, or serve another round")
    return content


def digest(folder: Path) -> str:
    """One hash of the names and bytes of all files below a folder."""
    return digest_of(file_hashes(folder))


def digest_of(content: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        ValueError: the file is missing, not readable, or not as it was written.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        own = content.pop("blake2b")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: missing or not readable ({type(error).__name__}); restore it from a copy") from error
    if own != digest_of(content):
        raise ValueError(f"{path} is not as it was written: restore it from a copy")
    return content


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with its own hash, whole or not at all, and have it on the disk."""
    write_atomic(path, json.dumps(content | {"blake2b": digest_of(content)}, indent=1) + "\n")
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all. One that is there is kept.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if target.is_dir():
        return
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    for path in (*fresh.rglob("*"), fresh):
        sync(path)
    os.replace(fresh, target)
    sync(target.parent)


# ------------------------------------------------------------------------------------------------- which one is served


def served(out: Path) -> list[int]:
    """Rounds whose policies were served and were not taken back, oldest first; the last one is served now."""
    found: list[int] = []
    for event in events.read(out / "rounds"):
        if event["kind"] == "rolled back" and event["round"] in found:
            found = found[: len(found) - found[::-1].index(event["round"])]
        elif event["kind"] in ("promoted", "rolled back"):
            found.append(event["round"])
    return found


def promote(out: Path, number: int, instead_of: int | None) -> bool:
    """Serve a round's policy, if what is served is still the one that it was measured against; whether it is served now.

    Raises:
        ValueError: its policy is not as the round left it.
    """
    check(out, number, ("policy",))
    with _alone(out):
        before = served(out)
        if before and before[-1] == number:
            return point(out)
        fits = (before[-1] if before else None) == instead_of
        _tell(out, "promoted" if fits else "superseded", number, before)
        return point(out) and served(out)[-1] == number  # not, either, where the disk had no room for the event


def roll_back(out: Path, number: int | None = None) -> int:
    """Serve an earlier round's policy again, or without `number` the one that was served before; returns which.

    Raises:
        ValueError: there is none, its policy is not as the round left it, or its gates never let it pass.
    """
    if not finished(out):
        raise ValueError(f"{out}: there are no rounds of improvement; give the --out that experiments/improve.py wrote to")
    with _alone(out):
        before = served(out)
        if number is None:
            if len(before) < 2:
                raise ValueError(f"{out}: no policy was served before this one: there is nothing to go back to")
            number = before[-2]
        if before[-1:] == [number]:
            raise ValueError(f"{out}: round {number} is served already")
        if not check(out, number, ("policy",))["passed"]:
            raise ValueError(f"{out}: round {number} was refused by its gates and was never served: choose one that was")
        _tell(out, "rolled back", number, before)
        point(out)
        if served(out)[-1] != number:
            raise ValueError(f"{out}: the log could not be written, so round {before[-1]} is served as before; make room")
    return number


def point(out: Path) -> bool:
    """Let the symlink lead to what the log says is served: True. A process that ended between the two left it behind."""
    target, link = os.path.join("rounds", place(out, served(out)[-1]).name, "policy"), out / SERVING
    if not link.is_symlink() or os.readlink(link) != target:
        if link.exists() and not link.is_symlink():
            raise ValueError(f"{link} is there and is no symlink: move it away")
        fresh = out / f".{SERVING}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target, target_is_directory=True)
        os.replace(fresh, link)
        sync(out)
    return True


def decided(out: Path, number: int) -> bool:
    """Whether the log says what became of a round that passed."""
    return any(event["round"] == number for event in events.read(out / "rounds"))


def _tell(out: Path, kind: str, number: int, before: list[int]) -> None:
    log = events.Events(out / "rounds")
    log.write(kind, round=number, before=before[-1] if before else None, policy=read(out, number)["policy"]["blake2b"])
    log.close()
    sync(out / "rounds")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time changes what is served; a rollback need not wait for the end of a round."""
    handle = os.open(out / "rounds" / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
