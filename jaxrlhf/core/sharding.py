"""The mesh, the one table from logical axes to mesh axes, and parameters declared by specification.

A model declares each parameter once, as a `ParamSpec` (shape, logical axes, initialiser). Initial values, shardings and
abstract restore targets all derive from it. Every array axis has a logical name; `RULES` says which mesh axis splits it.
`jit` with these shardings takes the place of `pmap`: one program for 1 CPU, 8 GPUs or many hosts.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrlhf.core import processes

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),  # sequences
    "length": None,  # positions of a row
    "layers": None,  # scanned over, so every device needs each in turn
    "embed": "fsdp",  # model width of a weight
    "residual": None,  # model width of an activation: its batch axis already uses fsdp
    "vocab": "tensor",
    "mlp": "tensor",
    "expert": "expert",  # the other axes of its weights use fsdp and tensor already
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices split each axis. `data=-1` takes all devices that the other axes leave."""

    data: int = -1  # replicas of the parameters, each with its part of the batch
    fsdp: int = 1  # splits both the batch and the parameters
    tensor: int = 1  # splits heads, MLP and vocabulary
    expert: int = 1  # splits the batch, and of the parameters the experts of a mixture (`models/experts.py`)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Those of `AXES`; `data=-1` is one."""
        return max(self.data, 1), self.fsdp, self.expert, self.tensor


AXES = ("data", "fsdp", "expert", "tensor")  # what says most to its neighbours last, so that these are near each other


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh of `AXES` over all devices.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if min(config.fsdp, config.tensor, config.expert) < 1 or config.data == 0 or config.data < -1:
        raise ValueError(f"mesh {config}: axes must be >= 1 (data may be -1: all that is left)")
    rest = config.fsdp * config.tensor * config.expert
    data = len(devices) // rest if config.data == -1 else config.data
    if data * rest != len(devices):
        raise ValueError(
            f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor}"
            f"{f' x expert={config.expert}' * (config.expert > 1)} does not fit {len(devices)} device(s): "
            f"choose axes whose product is {len(devices)} (data=-1 takes what is left)"
        )
    # Auto axes: jax >= 0.9 would make them Explicit, under which an embedding gather already fails.
    sizes = dataclasses.replace(config, data=data).sizes
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh over devices that need not be here."""
    return AbstractMesh(config.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of each axis (None: never split), and its initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[[jax.Array, tuple[int, ...], Any], jax.Array]  # (key, shape, dtype) -> array

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} has {len(self.shape)} axes but {len(self.axes)} names: {self.axes}")


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialiser: 0."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initialiser: 1."""
    del key
    return jnp.ones(shape, dtype)


def normal(std: float) -> Callable[[jax.Array, tuple[int, ...], Any], jax.Array]:
    """Initialiser: normal with mean 0 and the given standard deviation."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def _is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def path_name(path: tuple) -> str:
    """`layers/attention/query` for a `jax.tree_util` key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init_params(specs: Any, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Initial values of a tree of specs. Each leaf's key is named by its path, so adding a leaf changes no other."""

    def init(path, spec):
        return spec.init(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), spec.shape, dtype)

    return jax.tree_util.tree_map_with_path(init, specs, is_leaf=_is_spec)


# A vocabulary is what its tokenizer makes it, 50,257 say: where the mesh does not divide it, each device holds all of it.
# Padded, it would be another distribution: the rows added would take probability.
WHOLE_IF_UNEVEN = ("vocab",)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes that split an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def shardings(specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`NamedSharding` of each spec; an axis of `WHOLE_IF_UNEVEN` that the mesh does not divide is not split (`undivided`).

    Raises:
        ValueError: another axis is not divisible by the mesh axes that split it (naming the leaf, the axis and the sizes).
    """

    def one(path, spec):
        axes = []
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            names, ways = _split(axis, mesh)
            if size % ways and axis not in WHOLE_IF_UNEVEN:
                raise ValueError(
                    f"parameter {path_name(path)}: axis '{axis}' of size {size} cannot be split {ways} ways over mesh "
                    f"{names}; choose a mesh that divides it"
                )
            axes.append(None if size % ways else axis)
        return NamedSharding(mesh, partition_spec(tuple(axes)))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=_is_spec)


def undivided(specs: Any, mesh: Mesh) -> list[str]:
    """What `shardings` leaves whole though its axis has mesh axes to split it, for people to read."""
    found = []
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec):
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            if axis in WHOLE_IF_UNEVEN and size % (ways := _split(axis, mesh)[1]):
                found.append(f"{path_name(path)}: axis '{axis}' of size {size} is not split, since {ways} do not divide it")
    return found


def parts(axis: str | None, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits a logical axis."""
    return _split(axis, mesh)[1]


def _split(axis: str | None, mesh: Mesh | AbstractMesh) -> tuple[tuple[str, ...], int]:
    """The mesh axes that split a logical axis, and into how many parts."""
    names = () if axis is None else RULES[axis]
    names = (names,) if isinstance(names, str) else names or ()
    return names, math.prod(mesh.shape[name] for name in names)


def abstract(specs: Any, mesh: Mesh | AbstractMesh, dtype: Any = jnp.float32) -> Any:
    """Shapes, types and shardings without values: what a checkpoint is restored into, what a program is compiled for, or over
    an abstract mesh what a run on devices that are not here is planned with."""
    leaves = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs, is_leaf=_is_spec)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), leaves, shardings(specs, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the axes that share the rows of a batch."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put every array of a batch on the mesh, its leading axis split as `batch_sharding` says.

    In a job of several processes every one has the whole batch and puts its own rows down: what is a function of the step need
    not be sent.

    Raises:
        ValueError: the leading axis is not divisible by data x fsdp (x expert).
    """
    ways = parts("batch", mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.shape[0] % ways:
            raise ValueError(
                f"batch field {path_name(path)} has {leaf.shape[0]} rows, not divisible by {_sharing(mesh)} = {ways}: "
                "choose a batch size that is a multiple of it"
            )
    return processes.from_host(batch, batch_sharding(mesh))


def ways() -> int:
    """Parts into which the mesh that is set splits the rows of a batch; 1 where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else parts("batch", mesh)


def _sharing(mesh: Mesh) -> str:
    """The mesh axes that share the rows of a batch, for people to read."""
    return "data x fsdp" + " x expert" * (mesh.shape["expert"] > 1)


def check_rows(mesh: Mesh, rows: dict[str, int], minibatches: tuple[int, int] | None = None) -> None:
    """Refuse numbers of rows that the mesh cannot share, before anything is compiled for them.

    `rows`: by the setting that names them. `minibatches`: (rows, parts that they are dealt into).

    Raises:
        ValueError: with the numbers and what would do.
    """
    ways, axes = parts("batch", mesh), _sharing(mesh)
    for name, count in rows.items():
        if count % ways:
            near = f"{count // ways * ways} or {(count // ways + 1) * ways}" if count > ways else str(ways)
            raise ValueError(
                f"--{name.replace('_', '-')} {count} cannot be shared by {axes} = {ways} devices: choose {near}, or a "
                f"mesh whose {axes} divides it (--mesh.tensor takes devices and splits no rows)"
            )
    count, dealt = minibatches or (0, 1)
    if count % (dealt * ways):
        raise ValueError(
            f"{count} answers cannot be dealt into minibatches={dealt} of a multiple of {axes} = {ways} rows: choose a "
            f"--batch that makes them a multiple of {dealt * ways}, or fewer minibatches"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the table's sharding inside a mesh; outside one, do nothing.

    Without this on the residual stream the partitioner chooses a plan with several times the memory and traffic.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
