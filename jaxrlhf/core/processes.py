"""A job of several processes, one or more a host: starting it, and what its processes must agree on.

All processes run the same program and call the same compiled functions in the same order; else they wait for each other for
ever. So whatever the host decides must follow from values that every process has: from arrays that are whole on each, or from
what the first process said (`by_first`). The first one writes files. In a job of one process nothing here does anything.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# Step ids for jax's preemption service: how often this process has asked, over all runs of the job, so the same in all.
_ASKED = itertools.count(1)

# How many processes a launcher started, in the words of each. JAX reads the rest (who is where) itself.
LAUNCHERS = {"SLURM": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}


def launcher(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process as one of several, if one did."""
    for name, count in LAUNCHERS.items():
        if environment.get(count, "").isdigit() and int(environment[count]) > 1:
            return name
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"  # an indexed job, of which the cluster knows the rest
    # Of a slice of TPUs, on GKE too, every host has the names of all.
    return "TPU" if "," in environment.get("TPU_WORKER_HOSTNAMES", "") else None


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> bool:
    """Join the job, before anything else of jax: that of a launcher, or the one described by all three. Whether there is one.

    `coordinator`: HOST:PORT on which the first process listens; `process`: which one this is, 0 .. processes-1. `processes` = 1
    alone: a job of its own, whatever the launcher.

    Raises:
        ValueError: one or two of the three are given, or they are not such numbers; or the job cannot be joined.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing == ["--coordinator", "--process"] and processes == 1:
        return False
    if len(missing) == 3:
        if (found := launcher(os.environ)) is None:
            return False
        return _initialize(found, {})
    if coordinator is None or processes is None or process is None:
        raise ValueError(f"a job of several processes needs {', '.join(given)}: {', '.join(missing)} is missing")
    if not coordinator.rpartition(":")[2].isdigit() or not coordinator.rpartition(":")[0]:
        raise ValueError(f"--coordinator {coordinator} must be HOST:PORT of the first process, like 10.0.0.1:8476")
    if not 0 <= process < processes:
        raise ValueError(f"--process {process}: give each of the --processes {processes} its own number, 0 .. {processes - 1}")
    return _initialize("--coordinator", {"coordinator_address": coordinator, "num_processes": processes, "process_id": process})


def _initialize(origin: str, given: dict[str, Any]) -> bool:
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"the job that {origin} describes could not be joined ({str(error).splitlines()[0]}): see docs/scaling.md; "
            "--coordinator, --processes and --process name it without a launcher"
        ) from error
    return True


def is_first() -> bool:
    """Whether this process writes files and talks."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def by_first(function: Callable[[], Any]) -> Any:
    """What `function`, run by the first process alone, returns, on every process; it must be what JSON can hold.

    Raises:
        ValueError: on every process, where the function raised one or an OSError on the first.
        RuntimeError: on the others, where it raised anything else.
    """
    if jax.process_count() == 1:
        return function()
    told, error = {}, None
    if is_first():
        try:
            told = {"value": function()}
        except BaseException as raised:  # whatever it is: else the others would wait for ever
            error, told = raised, {"error": str(raised), "bad_input": isinstance(raised, ValueError | OSError)}
    told = json.loads(_text_of(0, json.dumps(told, default=lambda x: x.item())))
    if error is not None:
        raise error
    if "error" in told:
        kind = ValueError if told["bad_input"] else RuntimeError
        raise kind(f"{told['error']} (said by the first process)")
    return told["value"]


def alike(function: Callable[[], Any]) -> Any:
    """What `function` returns on this process. Where it raises on any, it raises on all, so that none waits for one that ended.

    Raises:
        Exception: on this process, where it was raised here.
        ValueError: on the others, where one raised that or an OSError; which process and what, of several the last one.
        RuntimeError: on the others, where it raised anything else.
    """
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    try:
        value = function()
    except Exception as raised:
        error = raised
    (failed,) = largest(0 if error is None else jax.process_index() + 1)
    if not failed:
        return value
    told = {"error": str(error), "bad_input": isinstance(error, ValueError | OSError)}
    told = json.loads(_text_of(failed - 1, json.dumps(told)))
    if error is not None:
        raise error
    kind = ValueError if told["bad_input"] else RuntimeError
    raise kind(f"{told['error']} (said by process {failed - 1})")


def _text_of(process: int, text: str) -> str:
    """The text that this process has, on all of them."""
    from jax.experimental import multihost_utils

    source = jax.process_index() == process
    data = np.frombuffer(text.encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size), is_source=source))
    room = max(256, 1 << (length - 1).bit_length())  # powers of two, so that few programs are compiled for it
    mine = np.zeros(room, np.uint8)
    if source:
        mine[:length] = data
    return multihost_utils.broadcast_one_to_all(mine, is_source=source)[:length].tobytes().decode()


def largest(*numbers: int) -> tuple[int, ...]:
    """Of each number the largest over all processes."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    return tuple(multihost_utils.process_allgather(np.array(numbers, np.int32)).max(0).tolist())


def told_of_preemption() -> bool:
    """Whether jax's preemption service takes SIGTERM in this job, so that nobody else should (`preempted`)."""
    on = jax.config.jax_enable_preemption_service  # pyright: ignore[reportAttributeAccessIssue]: a flag
    return jax.process_count() > 1 and bool(on)


def preempted() -> bool:
    """Whether a machine of the job is about to be taken back and now is the time to save: true at the same call in all
    processes, after SIGTERM came to any. Nothing is sent before one did."""
    if not told_of_preemption():
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_ASKED))


def added(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each array the sum over all processes: where each did its part and left 0 elsewhere, the whole."""
    if jax.process_count() == 1:
        return arrays
    from jax.experimental import multihost_utils

    return tuple(multihost_utils.process_allgather(x).sum(0, dtype=x.dtype) for x in arrays)


def to_host(tree: Any) -> Any:
    """Every array whole, as NumPy, on every process; what other processes hold is gathered, so all must call it alike."""

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(one, tree))


def from_host(tree: Any, places: Any) -> Any:
    """Arrays that every process has whole, put on the mesh: each process copies only what its own devices hold.

    `places`: a sharding, or a tree of one for each array.
    """

    def one(x: Any, place: jax.sharding.Sharding) -> jax.Array:
        if place.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, place)
        # Not device_put, which would send all of it to every process to compare it.
        x = np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    if isinstance(places, jax.sharding.Sharding):
        return jax.tree.map(lambda x: one(x, places), tree)
    return jax.tree.map(one, tree, places)
