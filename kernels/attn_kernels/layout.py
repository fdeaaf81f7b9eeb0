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
