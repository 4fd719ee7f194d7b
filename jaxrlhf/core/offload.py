"""Arrays that rest in the host's memory between the programs that use them: the optimizer's state, a frozen reference.

Inside a program they are fetched where they are needed (`fetch`) and left where they came from (`leave`); of arrays in a
device's own memory both do nothing. What it costs is their way to the device and back, at every update.
"""

from __future__ import annotations

from typing import Any

import jax

KIND = "pinned_host"


def to_host_memory(tree: Any) -> Any:
    """The arrays of a tree in the memory of the hosts of their devices, split as they are; single numbers stay.

    Raises:
        ValueError: a device has no such memory.
    """
    leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
    for device in {device for x in leaves for device in x.sharding.addressable_devices}:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if KIND not in kinds:
            raise ValueError(
                f"device {device} ({device.device_kind}) has no memory '{KIND}' to offload to, only {', '.join(kinds)}: set "
                "offload to none, or split over more devices (--mesh.fsdp)"
            )
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(KIND)) if x.ndim else x, tree)


def to_device_memory(tree: Any) -> Any:
    """The arrays of a tree in the memory of their devices; those that are there stay as they are."""

    def one(x: Any) -> Any:
        place = getattr(x, "sharding", None)
        return jax.device_put(x, place.with_memory_kind("device")) if place is not None and place.memory_kind == KIND else x

    return jax.tree.map(one, tree)


def _rests(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetch(tree: Any, after: Any = None) -> Any:
    """Inside a program: the tree in the device's memory. `after`: not before this has been computed, whose memory is then free
    for it."""
    if not any(map(_rests, jax.tree.leaves(tree))):
        return tree
    tree, _ = jax.lax.optimization_barrier((tree, after))
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _rests(x) else x, tree)


def leave(tree: Any, like: Any) -> Any:
    """Inside a program: each array back in the host's memory whose place in `like` is there."""
    return jax.tree.map(lambda x, old: jax.device_put(x, jax.memory.Space.Host) if _rests(old) else x, tree, like)
