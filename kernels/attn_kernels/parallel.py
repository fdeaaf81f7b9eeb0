"""Sequences split over the devices of a mesh: how the engines are told, and by which algorithm.

Models know nothing of devices. Whoever traces one for a mesh whose sequence axis is larger than 1
does so inside `sequence_parallel`, and both engines then run over that axis.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from attn_kernels.layout import ORDERS

MODES = ("ring", "all_to_all", "allgather")


@dataclasses.dataclass(frozen=True)
class SequenceParallel:
    """The choices of `sequence_parallel`."""

    mesh: Mesh
    mode: str
    axis: str
    order: str
    batch: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def devices(self) -> int:
        """How many devices share a sequence."""
        return self.mesh.shape[self.axis]

    def splits(self, *lengths: int, order: str = "contiguous") -> bool:
        """Whether all lengths are one that several devices share evenly, 2 positions at least each.

        In zigzag order a device has two parts of equal length, in striped order of every device's
        positions an equal number.
        """
        count = self.devices
        parts = {"contiguous": count, "zigzag": 2 * count, "striped": count**2}[order]
        even = len(set(lengths)) == 1 and lengths[0] % parts == 0 and lengths[0] > count
        return count > 1 and even

    def dividing(self, axes: tuple[str, ...], size: int) -> tuple[str, ...]:
        """Those of the axes that together divide a size, taken in order."""
        chosen: tuple[str, ...] = ()
        for axis in axes:
            parts = math.prod(self.mesh.shape[name] for name in (*chosen, axis))
            chosen += (axis,) if size % parts == 0 else ()
        return chosen

    def shard_map(
        self, function: Callable, in_specs: Any, out_specs: Any, alone: bool = True
    ) -> Callable:
        """`function(rank, ...)` on every device's part along the axis, `rank` being its number.

        If it is split `alone`, other axes of the mesh are left to the compiler, which is why the
        number is an argument: it does not compile `axis_index` beside them everywhere.
        """
        sharded = jax.shard_map(
            lambda ranks, *args: function(ranks[0], *args),
            mesh=self.mesh,
            in_specs=(PartitionSpec(self.axis), *in_specs),
            out_specs=out_specs,
            axis_names={self.axis} if alone else set(self.mesh.axis_names),
        )
        return jax.jit(functools.partial(sharded, jnp.arange(self.devices, dtype=jnp.int32)))


def rank_of(axis_name: str, rank: jax.Array | None) -> jax.Array:
    """The number of this device along an axis: `rank` if it is known."""
    return jax.lax.axis_index(axis_name) if rank is None else rank


_current: contextvars.ContextVar[SequenceParallel | None] = contextvars.ContextVar(
    "sequence_parallel", default=None
)


@contextlib.contextmanager
def sequence_parallel(
    mesh: Mesh,
    mode: str = "ring",
    axis: str = "seq",
    order: str = "contiguous",
    *,
    batch: tuple[str, ...] = ("data", "fsdp"),
    heads: tuple[str, ...] = ("tensor",),
) -> Iterator[None]:
    """Runs `attention`, `linear_attention` and `diagonal_recurrence` over a mesh axis.

    It is read while a function is traced, so it belongs inside the function that is jitted. Arrays
    keep their meaning and their natural order; every length that the axis divides (with T = S, and
    two positions a device at least) is split over it by a `jax.shard_map`. Recurrences leave all
    other axes to the compiler; attention is split by `batch` and `heads` as well, as far as these
    divide. Everything else in a model is left to the compiler.

    Args:
      mesh: the mesh; an axis of size 1 changes nothing.
      mode: of attention: "ring" (keys and values travel from device to device, memory O(T / N)),
        "all_to_all" (sequences for heads and back: the devices must divide the heads) or
        "allgather" (every device gets all keys and values). Recurrences combine states in all.
      axis: the name of the axis.
      order: which positions a device works on: "contiguous", or, balanced for causal masks,
        "zigzag" or "striped", which costs an exchange of q, k, v and of the output.
      batch, heads: the axes over which rows of the batch and heads are spread; those that the mesh
        lacks do not count.

    Raises:
      ValueError: if the mode, the axis or the order is unknown.
    """
    for name, given, known in (
        ("mode", mode, MODES),
        ("axis", axis, mesh.axis_names),
        ("order", order, ORDERS),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
    others = (
        tuple(a for a in axes if a in mesh.axis_names and a != axis) for axes in (batch, heads)
    )
    token = _current.set(SequenceParallel(mesh, mode, axis, order, *others))
    try:
        yield
    finally:
        _current.reset(token)


def current(kernel: bool = False) -> SequenceParallel | None:
    """What to run over, or None: no context, no sequence to share, or axes that are manual already.

    A `kernel`, which the compiler cannot split, is to run over a mesh of several devices even where
    they share no sequence.
    """
    found = _current.get()
    if found is None or (found.mesh.size if kernel else found.devices) == 1:
        return None
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return None if found.axis in manual else found


def of_one_device() -> bool:
    """Whether what is traced now has arrays of one device, or is brought there by the context."""
    if _current.get() is not None or jax.device_count() == 1:
        return True
    mesh = jax.sharding.get_abstract_mesh()
    split = [axis for axis, size in mesh.shape.items() if size > 1]
    return bool(split) and set(split) <= set(mesh.manual_axes)
