"""How large the blocks of the kernels for GPUs are: a table of what was fastest.

`blocks.json` beside this file has a row for every device, head dimension, dtype, kind of call and
kernel that was searched; others get the blocks of the nearest row.
"""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from attn_kernels.gpu import MULTIPROCESSORS

TABLE = Path(__file__).with_name("blocks.json")
KERNELS = ("outputs", "row_slopes", "column_slopes")
KINDS = ("plain", "modified", "weights")
SHARED_BYTES = 232_448  # of a program on Hopper,
RESERVED = 3072  # of which vectors and barriers take
TURNS = 8  # of programs that are as many as multiprocessors


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a kernel.

    Attributes:
      rows: how many a warpgroup holds.
      columns: how many it gets at once.
      slots: for how many blocks of these there is room.
      warpgroups: how many compute.
      programs: how many there are, each of which takes one block of rows after another and has room
        for the next one; 0 if every block has a program of its own.
    """

    rows: int
    columns: int
    slots: int
    warpgroups: int = 2
    programs: int = 0

    @property
    def held(self) -> int:
        """Rows of a program."""
        return self.rows * self.warpgroups

    def fits(self, kernel: str, dims: Sequence[int], pairs: int = 0) -> bool:
        """Whether a kernel's arrays fit into shared memory: see `fitting`."""
        held = sum(dims)
        if kernel == "outputs":  # results of another size leave through a place of their own
            held = dims[0] if len({*dims}) == 1 else sum(dims)
        held *= 2 if self.programs else 1
        fetched = sum(dims) + pairs * self.held
        numbers = held * self.held + self.slots * self.columns * fetched
        return 2 * numbers <= SHARED_BYTES - RESERVED

    def in_turns(self, count: int, *given) -> "Blocks":
        """The same for a program on every multiprocessor, if that `fits`.

        Args:
          count: of blocks of rows; few of them are better divided as programs end.
          given: the arguments of `fits`.
        """
        blocks = dataclasses.replace(self, programs=self.programs or MULTIPROCESSORS)
        return blocks if count >= TURNS * MULTIPROCESSORS and blocks.fits(*given) else self

    def slot(self, n):
        """Where the n-th fetched block is."""
        if self.slots == 1:
            # 0, as there are fewer blocks: of a constant, all addresses would stay in registers.
            return lax.shift_right_logical(n, jnp.int32(30))
        return lax.rem(n, jnp.int32(self.slots))


def fitting(kernel: str, blocks: Blocks, dims: Sequence[int], pairs: int) -> Blocks | None:
    """The largest part of `blocks` that fits into shared memory, None if none does.

    Args:
      kernel: one of `KERNELS`.
      blocks: of rows of the same size.
      dims: of keys and of values, as far as the kernel takes them.
      pairs: how many arrays of all pairs are fetched.
    """
    columns = (blocks.columns // n for n in (1, 2, 4) if blocks.columns % (64 * n) == 0)
    found = (
        dataclasses.replace(blocks, columns=n, slots=slots)
        for n, slots in itertools.product(columns, range(1, 1 + blocks.slots))
    )
    found = [x for x in found if x.fits(kernel, dims, pairs)]
    return max(found, key=lambda x: (x.slots > 1, x.columns, x.slots), default=None)


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
