"""Device mesh and sharding rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn_lab.data.order import Rows

AXES = ("data", "fsdp", "tensor", "seq")

Rules = Sequence[tuple[str, PartitionSpec | Callable[[tuple[int, ...], Mesh], PartitionSpec]]]


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    seq: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh with axes data, fsdp, tensor and seq; one size may be -1 and takes what is left.

    Args:
      data: replicas of the parameters, each with its part of the batch.
      fsdp: parts of the batch, among which the parameters are split as well.
      tensor: parts of the parameters that compute on the same examples.
      seq: parts of the sequence axis, among which the parameters are split further.
      devices: all devices of all processes by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor, seq]
    asked = dict(zip(AXES, sizes))
    if sizes.count(-1) == 1:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh sizes must multiply to the {len(devices)} devices (one may be -1); got {asked}"
        )
    return jax.make_mesh(
        tuple(sizes),
        AXES,
        devices=devices,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    )


def parameter_axes(length: int, mesh: Mesh) -> str | tuple[str, str] | None:
    """Along what an axis of parameters is split: "fsdp", and "seq" too, where they divide it.

    The devices of a sequence need the same parameters, as those of different examples do.
    """
    fsdp, seq = mesh.shape["fsdp"], mesh.shape.get("seq", 1)
    if length % fsdp:
        return None
    return ("fsdp", "seq") if seq > 1 and length % (fsdp * seq) == 0 else "fsdp"


def shard_largest(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits the largest axis that the mesh axis "fsdp" divides; none if there is no such axis."""
    fitting = [axis for axis, length in enumerate(shape) if parameter_axes(length, mesh)]
    if not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * largest, parameter_axes(shape[largest], mesh))


def split_axes(*names: str) -> Callable[[tuple[int, ...], Mesh], PartitionSpec]:
    """A spec that splits axis n along the mesh axis `names[n]`, where that divides it."""

    def along(length, name, mesh):
        if name == "fsdp":
            return parameter_axes(length, mesh)
        return name if length % mesh.shape[name] == 0 else None

    def spec(shape, mesh):
        return PartitionSpec(*(along(length, name, mesh) for length, name in zip(shape, names)))

    return spec


def gathered(sharding: NamedSharding) -> NamedSharding:
    """The sharding without what `parameter_axes` splits: that of parameters where they are used."""
    spec = (None if axis in ("fsdp", ("fsdp", "seq")) else axis for axis in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


REPLICATED: Rules = ()
FSDP: Rules = ((".*", shard_largest),)
# Tensor parallelism (Shoeybi et al., Megatron-LM, 2019, arXiv 1909.08053) and FSDP along the other
# axis: maps into heads and hidden units by columns, maps out of them by rows, words by rows.
COLUMNS = r"(mlp/(up|gate)|mixer/(query|key|value|qkv|gate|output_gate|receptance))/kernel$"
PARALLEL: Rules = (
    (COLUMNS, split_axes("fsdp", "tensor")),
    (r"(mlp/down|mixer/out)/kernel$", split_axes("tensor", "fsdp")),
    (r"(^|/)embed$", split_axes("tensor", "fsdp")),
    (r"(^|/)head/kernel$", split_axes("fsdp", "tensor")),
    *FSDP,
)


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf of a pytree as `a/b/0/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def state_sharding(state: Any, mesh: Mesh, rules: Rules = REPLICATED) -> Any:
    """Shardings of the structure of `state`.

    Each array takes the spec of the first rule whose regular expression is found in its path,
    such as `params/layers/0/mlp/up/kernel` or `opt_state/1/0/mu/layers/0/mlp/up/kernel`, so that
    the optimizer's copies follow their parameters. A spec may be a function of (shape, mesh).
    Scalars, and arrays that no rule names, are replicated.

    Raises:
      ValueError: a spec that does not fit the array, naming the path.
    """

    def sharding(path, leaf):
        name, shape = path_name(path), jax.numpy.shape(leaf)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), PartitionSpec())
        if not shape:
            spec = PartitionSpec()
        elif callable(spec) and not isinstance(spec, PartitionSpec):
            spec = spec(shape, mesh)
        try:
            result = NamedSharding(mesh, spec)
            result.shard_shape(shape)
            result.check_compatible_aval(shape)
        except ValueError as error:
            raise ValueError(
                f"sharding rule {spec} does not fit {name} of shape {shape} on a mesh of sizes "
                f"{dict(mesh.shape)}"
            ) from error
        return result

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(array: Any, mesh: Mesh) -> NamedSharding:
    """Batch axis over data and fsdp, and the next axis, if there is one, over seq."""
    return NamedSharding(mesh, PartitionSpec(*(("data", "fsdp"), "seq")[: np.ndim(array)]))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a batch on the devices of the mesh.

    Args:
      batch: a pytree of arrays, of which every process holds a copy, or `Rows`, of which a process
        makes those that its own devices hold.
      mesh: from `make_mesh`.

    Raises:
      ValueError: an array whose axes the mesh does not divide, naming its path.
    """
    rows = None
    if isinstance(batch, Rows):
        size, rows = batch.size, rows_here(batch.size, mesh)
        batch = batch.make(rows)

    def place(path, array):
        sharding, shape = batch_sharding(array, mesh), np.shape(array)
        if rows is not None:
            shape = size, *shape[1:]
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise ValueError(
                f"batch {path_name(path)} of shape {shape} cannot be split over a mesh "
                f"of sizes {dict(mesh.shape)}"
            ) from error
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        host = np.asarray(array)

        def part(index):
            if rows is None:
                return host[index]
            asked = np.arange(size)[index[0]]
            return host[(np.searchsorted(rows, asked), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree_util.tree_map_with_path(place, batch)


def rows_here(size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch of that size the devices of this process hold, ascending.

    Where they cannot be split evenly, all.
    """
    rows = np.arange(size)
    if size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return rows
    held = batch_sharding(rows, mesh).addressable_devices_indices_map(rows.shape).values()
    return np.unique(np.concatenate([rows[index] for index in held]))
