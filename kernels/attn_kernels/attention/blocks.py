"""How large the blocks of the kernels for GPUs are: a table of what was fastest.

`blocks.json` beside this file has a row for every device, head dimension, dtype, kind of call and
kernel that was searched; others get the blocks of the nearest row.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

TABLE = Path(__file__).with_name("blocks.json")
KERNELS = ("outputs", "row_slopes", "column_slopes")
KINDS = ("plain", "modified", "weights")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel.

    Attributes:
      rows: how many a warpgroup holds.
      columns: how many it gets at once.
      slots: for how many blocks of these there is room.
      warpgroups: how many compute.
    """

    rows: int
    columns: int
    slots: int
    warpgroups: int = 2

    @property
    def held(self) -> int:
        """Rows of a program."""
        return self.rows * self.warpgroups

    def slot(self, n):
        """Where the n-th fetched block is."""
        if self.slots == 1:
            # 0, as there are fewer blocks: of a constant, all addresses would stay in registers.
            return lax.shift_right_logical(n, jnp.int32(24))
        return lax.rem(n, jnp.int32(self.slots))


_given: contextvars.ContextVar[dict[str, Blocks]] = contextvars.ContextVar("blocks")


@contextlib.contextmanager
def using(**blocks: Blocks) -> Iterator[None]:
    """Kernels that are traced inside take these blocks, by the name of the kernel.

    Raises:
      ValueError: if there is no kernel of a name.
    """
    for name in blocks:
        if name not in KERNELS:
            raise ValueError(f"kernels are {', '.join(KERNELS)}; got {name!r}")
    token = _given.set(_given.get({}) | blocks)
    try:
        yield
    finally:
        _given.reset(token)


@functools.cache
def table() -> tuple[dict, ...]:
    """The rows of `blocks.json`."""
    return tuple(json.loads(TABLE.read_text()))


def blocks_of(kernel: str, dim: int, dtype: jnp.dtype, kind: str) -> Blocks:
    """The blocks of a kernel.

    Args:
      kernel: one of `KERNELS`.
      dim: the larger of D and Dv, a multiple of 64.
      dtype: of q, k and v.
      kind: of the call, one of `KINDS`: softmax of plain scores, of modified ones, or weights
        without statistics.
    """
    if kernel in _given.get({}):
        return _given.get()[kernel]
    wanted = {"device": jax.devices()[0].device_kind, "kind": kind, "dtype": jnp.dtype(dtype).name}
    rows = [row for row in table() if row["kernel"] == kernel and row["dim"] == dim]
    if rows:
        nearest = max(rows, key=lambda row: [row[name] == x for name, x in wanted.items()])
        return Blocks(*nearest["blocks"])
    if kernel == "outputs":
        return Blocks(64, {64: 256, 128: 128}.get(dim, 64), 2)
    return Blocks(64, 64, 2, 3) if dim == 64 else Blocks(64, 64, 2 if dim <= 192 else 1)
