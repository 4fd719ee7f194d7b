"""Checkpoints: Orbax writes the arrays in the background; a manifest of content hashes and one rename make them trustworthy.

Orbax alone restores flipped bits and casts types in silence. So a checkpoint `DIR/00000030/` holds `state/` (Orbax) and
`manifest.json` (shape, type and hash of every leaf, hash of every file, and the run's notes), is written under a temporary
name, and is renamed when whole: a step that is listed is complete, and what is restored is what was saved or an error that
names file and leaf. Arrays and notes are one commit: there is no moment at which the one is newer than the other.

Of several processes all must save and restore alike, on one file system: each writes the parts of arrays that it holds, the
first all else. There nothing goes on in the background, see `save_async`.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.core import processes
from jaxrlhf.training import manifest as manifests

SLACK = 1_000_000  # bytes of a checkpoint beside its arrays: manifest, Orbax's own files


@dataclasses.dataclass(frozen=True)
class Saving:
    """A checkpoint on its way to the disk."""

    step: int
    blocked: float  # seconds for which the caller was held up
    _began: float
    _ended: futures.Future  # when

    def done(self) -> bool:
        """Whether it is complete, or has failed."""
        return self._ended.done()

    def wait(self) -> None:
        """Return when it is complete.

        Raises:
            OSError, ValueError: it could not be written; older ones are as they were.
        """
        self._ended.result()

    def took(self) -> float:
        """Seconds from the call to the complete checkpoint, for which it waits."""
        return self._ended.result() - self._began


def steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, ascending."""
    return [step for step in numbered(Path(directory)) if (folder(Path(directory), step) / manifests.FILE).is_file()]


def numbered(directory: Path) -> list[int]:
    """Steps of all folders that are named as a checkpoint, complete or damaged, ascending."""
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.is_dir() else []


def latest(directory: str | Path) -> int | None:
    """The newest complete step, or None."""
    found = steps(directory)
    return found[-1] if found else None


Notes = dict[str, Any]  # JSON


def save(directory: str | Path, step: int, state: Any, keep: int | None = 2, notes: Notes | None = None) -> None:
    """Write `state` as checkpoint `step`, and return when it is complete: `save_async` and `wait`."""
    save_async(directory, step, state, keep, notes).wait()


def save_async(directory: str | Path, step: int, state: Any, keep: int | None = 2, notes: Notes | None = None) -> Saving:
    """Write `state`, a pytree of arrays, with `notes` as checkpoint `step`; then remove all but the newest `keep` (None: none).

    Returns as soon as the arrays are on the host, so that the caller may donate them; the rest goes on in a thread. Nothing
    older is touched before the new one is complete. A step that exists already is left as it is. One at a time: `wait` first.
    Of several processes it returns when the checkpoint is complete: arrays are gathered to be hashed and all wait for the
    commit, which in a thread beside the steps would not come in the same order in every process.

    Raises:
        OSError: the disk has not room enough; nothing was written.
        ValueError: keep < 1, which would remove the newest.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep} checkpoints: at least 1, the newest, is kept")
    started = time.monotonic()
    directory, ended = Path(directory).resolve(), futures.Future()  # Orbax refuses relative paths, after having made the folder
    if processes.by_first(lambda: step in steps(directory)):
        ended.set_result(started)
        return Saving(step, 0.0, started, ended)
    leaves = manifests.leaves_of(state)
    processes.by_first(lambda: _make_room(directory, step, sum(x.nbytes for x in leaves.values())))
    temporary, several = _temporary(directory, step), jax.process_count() > 1
    for x in leaves.values():
        x.copy_to_host_async()
    try:
        written = _orbax().save_async(temporary / "state", leaves)
    except OSError as error:
        raise _unwritten(directory, step, error) from error
    # Of several processes one leaf after the other: no host need hold all of them whole.
    values = leaves if several else {name: manifests.on_host(x) for name, x in leaves.items()}

    def finish() -> None:
        try:
            told = {name: manifests.describe(x) | {"blake2b": manifests.hash_of(x)} for name, x in values.items()}
            written.result()
            processes.by_first(lambda: _commit(directory, step, keep, told, notes or {}))
        except BaseException as error:
            if processes.is_first():
                _remove(temporary)
            raise _unwritten(directory, step, error) from error

    if several:
        _into(ended, finish)
    else:
        # A daemon: a process that is told to stop at once does not wait for it; what it leaves is a temporary folder.
        threading.Thread(target=_into, args=(ended, finish), name="checkpoint", daemon=True).start()
    return Saving(step, time.monotonic() - started, started, ended)


def _into(ended: futures.Future, work: Callable[[], None]) -> None:
    try:
        work()
        ended.set_result(time.monotonic())
    except BaseException as error:
        ended.set_exception(error)


def _make_room(directory: Path, step: int, size: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    clean(directory)
    shutil.rmtree(folder(directory, step), ignore_errors=True)  # one that never became complete
    _check_space(directory, step, size)


def _commit(directory: Path, step: int, keep: int | None, leaves: dict[str, Any], notes: dict[str, Any]) -> None:
    """Make what Orbax wrote a checkpoint, and only then remove older ones."""
    temporary = _temporary(directory, step)
    manifests.write(temporary, step, leaves, notes)
    os.replace(temporary, folder(directory, step))
    _sync_folder(directory)
    if keep is not None:
        remove(directory, steps(directory)[:-keep])


def remove(directory: Path, which: Iterable[int]) -> None:
    """Remove complete checkpoints."""
    for step in which:
        going = directory / f".tmp-old-{step:08d}"  # a kill while it is removed leaves nothing that looks like a checkpoint
        os.replace(folder(directory, step), going)
        shutil.rmtree(going)


def _remove(temporary: Path) -> None:
    """Remove what a failed save wrote; Orbax's other threads may still be writing into it. What is left `clean` finds."""
    for _ in range(20):
        shutil.rmtree(temporary, ignore_errors=True)
        if not temporary.exists():
            return
        time.sleep(0.1)


def _check_space(directory: Path, step: int, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size + SLACK:
        needed, there = f"{(size + SLACK) / 1e6:.1f} MB", f"{free / 1e6:.1f} MB"
        raise OSError(errno.ENOSPC, f"checkpoint {step} takes {needed} and {directory} has {there} free; {_kept(directory)}")


def _unwritten(directory: Path, step: int, error: BaseException) -> Exception:
    """What the caller is told when a save failed half-way."""
    cause = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "RESOURCE_EXHAUSTED" in cause or "No space left" in cause:
        return OSError(errno.ENOSPC, f"the disk was full before checkpoint {step} in {directory} was whole; {_kept(directory)}")
    return ValueError(f"checkpoint {step} in {directory} could not be written ({cause[:300]}); {_kept(directory)}")


def _kept(directory: Path) -> str:
    last = latest(directory)
    kept = "there is no older one" if last is None else f"step {last} is kept as it was"
    return f"{kept}: make room, and the same command goes on"


def clean(directory: str | Path) -> list[str]:
    """Remove what killed saves left behind, and name it."""
    stale = sorted(Path(directory).glob(".tmp-*"))
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in stale]


def set_aside(directory: str | Path, after: int) -> list[str]:
    """Rename the checkpoints after step `after` to `left-STEP`, so that they are listed no more, and name them."""
    directory, names = Path(directory), []
    for step in (s for s in numbered(directory) if s > after):
        target = directory / f"left-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder(directory, step), target)
        names.append(target.name)
    return names


def starting(directory: str | Path, step: int | None = None) -> int | None:
    """The checkpoint to go on from: `step`, or the newest; None where there is none at all.

    Raises:
        FileNotFoundError: there are some, but no complete one of `step`.
        ValueError: the newest has no manifest, or one that cannot be trusted. No save that was killed leaves such a folder.
    """
    directory, found = Path(directory), numbered(Path(directory))
    if step is not None and found and step not in steps(directory):
        there = ", ".join(map(str, steps(directory))) or "none"
        raise FileNotFoundError(f"no complete checkpoint of step {step} in {directory}; complete: {there}")
    if step is None and found:
        step = found[-1]
        try:
            manifests.read(folder(directory, step))
        except ValueError as error:
            raise ValueError(f"{error}; {_way_out(directory, step)}") from error
    return step if found else None


def notes(directory: str | Path, step: int) -> dict[str, Any]:
    """What a run noted down beside the arrays of a checkpoint.

    Raises:
        ValueError: its manifest cannot be read.
    """
    return manifests.read(folder(Path(directory), step)).get("notes", {})


def contents(directory: Path, step: int) -> str:
    """A hash of what checkpoint `step` holds: names, shapes, types and values of its leaves, as its manifest has them.

    Raises:
        ValueError: its manifest cannot be read.
    """
    return manifests.of_leaves(manifests.read(folder(directory, step)))


def verify(directory: Path, step: int) -> None:
    """Read every file of checkpoint `step`, and compare its hash.

    Raises:
        ValueError: it is damaged, naming files.
    """
    where = folder(directory, step)
    manifest = manifests.read(where)
    if changed := _changed_files(where, manifest["files"]):
        raise ValueError(f"checkpoint {where} is damaged: file {_few(changed)} is not as it was written")


def restore(directory: str | Path, like: Any, step: int | None = None) -> tuple[Any, int]:
    """The state of checkpoint `step` (default: the newest), and the step.

    `like` is a pytree of arrays or `ShapeDtypeStruct`s that gives structure, shapes, types and shardings (none: the first
    device); the mesh may differ from the one that saved.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: it does not fit `like` (naming leaf and both shapes or types), or it is damaged (naming files and leaves).
    """
    directory = Path(directory).resolve()
    asked = step
    step = processes.by_first(lambda: starting(directory, asked))
    if step is None:
        raise FileNotFoundError(f"no complete checkpoint in {directory}")
    where = folder(directory, step)
    manifest = manifests.read(where)
    wanted = manifests.leaves_of(like)
    manifests.check_fit(where, manifest["leaves"], wanted)
    changed = processes.by_first(lambda: _changed_files(where, manifest["files"]))
    if changed:  # Orbax may restore such files without a word
        raise _damaged(directory, step, f"file {_few(changed)}", _damaged_leaves(where, manifest, wanted))
    found = _orbax().load(where / "state", {name: manifests.abstract(x) for name, x in wanted.items()})
    leaves = [name for name, x in found.items() if manifests.hash_of(x) != manifest["leaves"][name]["blake2b"]]
    if leaves:
        raise _damaged(directory, step, "", leaves)
    return manifests.unflatten(like, found), step


def _changed_files(where: Path, written: dict[str, str]) -> list[str]:
    """Files that are not as they were written, one of them missing or new included."""
    hashes = manifests.file_hashes(where / "state")
    return [name for name in {**written, **hashes} if hashes.get(name) != written.get(name)]


def _damaged_leaves(where: Path, manifest: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The leaves whose values are no more what they were, each read alone."""
    orbax, changed = _orbax(), []
    for name, leaf in wanted.items():
        one = dict.fromkeys(wanted, orbax.PLACEHOLDER) | {name: manifests.abstract(leaf)}
        try:
            found = orbax.load(where / "state", one)[name]
            right = manifests.hash_of(found) == manifest["leaves"][name]["blake2b"]
        except Exception:  # of whatever kind: it cannot be read
            right = False
        if not right:
            changed.append(name)
    return changed


def _damaged(directory: Path, step: int, file: str, leaves: list[str]) -> ValueError:
    leaf = f"leaf {_few(leaves)}" if leaves else "no leaf"
    what = f"{file} is not as it was written ({leaf} is touched)" if file else f"{leaf} is not as it was written"
    return ValueError(f"checkpoint {folder(directory, step)} is damaged: {what}; {_way_out(directory, step)}")


def _way_out(directory: Path, step: int) -> str:
    older = [s for s in steps(directory) if s < step]
    return f"--from-step {older[-1]} goes on from the one before" if older else "there is no older one: start in a new --out"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def folder(directory: Path, step: int) -> Path:
    """Where a checkpoint lies."""
    return directory / f"{step:08d}"


def _temporary(directory: Path, step: int) -> Path:
    return directory / f".tmp-{step:08d}"


def _orbax() -> Any:
    from orbax.checkpoint import v1

    logging.getLogger("absl").addFilter(_ours)  # again and again is once
    return v1


def _ours(record: logging.LogRecord) -> bool:
    """Not what Orbax logs: what it fails at is raised too, and then told in one line instead of two hundred."""
    return "orbax" not in record.pathname


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder was written."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
