"""Which positions of a sequence each of several devices holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

ORDERS = ("contiguous", "zigzag", "striped")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The positions of `shards` devices with `length` each; they ascend on every device.

    contiguous: device r has `r length + i`. striped: it has `i shards + r` (Brandon et al., 2023,
    arXiv 2311.09431). zigzag: of `2 shards` parts, device r has parts r and `2 shards - 1 - r`.

    Attributes:
      order: one of `ORDERS`.
      shards: the number of devices.
      length: positions a device; even for zigzag.
    """

    order: str
    shards: int
    length: int

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"layout must be one of {', '.join(ORDERS)}, got {self.order!r}")
        if self.order == "zigzag" and self.length % 2:
            raise ValueError(f"a zigzag layout needs an even length a device, got {self.length}")

    def positions(self, rank: int | jax.Array, index: jax.Array | np.ndarray):
        """The position of the entries `index` of device `rank`."""
        if self.order == "striped":
            return index * self.shards + rank
        if self.order == "contiguous":
            return index + rank * self.length
        half = self.length // 2
        numpy = isinstance(rank, int | np.ndarray) and isinstance(index, int | np.ndarray)
        where = np.where if numpy else jnp.where
        late = (2 * self.shards - 2 - rank) * half  # half less than the part's first position
        return index + where(index < half, rank * half, late)

    def permutation(self) -> np.ndarray:
        """The positions of device 0, then those of device 1, and so on: `[shards * length]`."""
        ranks, index = np.arange(self.shards)[:, None], np.arange(self.length)
        return np.broadcast_to(self.positions(ranks, index), (self.shards, self.length)).ravel()


def deal(x: jax.Array, axis: int, order: str, *, axis_name: str, rank: jax.Array) -> jax.Array:
    """Exchanges the contiguous positions of device `rank` for those of an order, in `shard_map`.

    Striped order needs as many positions a device as a multiple of the devices.
    """
    count = jax.lax.axis_size(axis_name)
    if order == "contiguous" or count == 1:
        return x
    if order == "striped":
        rows = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
        rows = jax.lax.all_to_all(jnp.moveaxis(rows, axis + 1, 0), axis_name, 0, 0, tiled=True)
        return jnp.moveaxis(rows, 0, axis).reshape(x.shape)
    even, odd = (
        jax.lax.ppermute(part, axis_name, [(n, _owner(2 * n + odd, count)) for n in range(count)])
        for odd, part in enumerate(jnp.split(x, 2, axis))
    )
    return jnp.concatenate(_swapped(rank % 2 == 1, even, odd), axis)


def undeal(x: jax.Array, axis: int, order: str, *, axis_name: str, rank: jax.Array) -> jax.Array:
    """The inverse of `deal`."""
    count = jax.lax.axis_size(axis_name)
    if order == "contiguous" or count == 1:
        return x
    if order == "striped":
        rows = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
        rows = jax.lax.all_to_all(jnp.moveaxis(rows, axis, 0), axis_name, 0, 0, tiled=True)
        return jnp.moveaxis(rows, 0, axis + 1).reshape(x.shape)
    parts = (
        jax.lax.ppermute(part, axis_name, [(_owner(2 * n + odd, count), n) for n in range(count)])
        for odd, part in enumerate(_swapped(rank % 2 == 1, *jnp.split(x, 2, axis)))
    )
    return jnp.concatenate(list(parts), axis)


def _owner(part, count):
    """The device of a part in zigzag order."""
    return part if part < count else 2 * count - 1 - part


def _swapped(condition, a, b):
    return jnp.where(condition, b, a), jnp.where(condition, a, b)
