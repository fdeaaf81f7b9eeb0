"""Which tiles programs of GPUs visit, and what is known of them."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from attn_kernels.attention.mask import EMPTY, FULL, PARTIAL, Mask
from attn_kernels.attention.score_tile import Kind
from attn_kernels.attention.toeplitz import tiles
from attn_kernels.attention.traced import listed, tile_kinds
from attn_kernels.attention.warpgroups import BOTH, LEAST, NONE
from attn_kernels.attention.words import words, worth

SHORT = 16  # blocks of columns
MOST = 2**22  # parts of tiles that are asked whether they are empty


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A mask whose operands are no arguments of a program: lists of its tiles are constants."""

    mask: Mask | None


@dataclasses.dataclass(frozen=True)
class Lists:
    """Which tiles programs visit.

    Attributes:
      order, counts: from `listed`.
      kinds: of the tiles up to each of the counts.
      words: what the mask says of the last kind of tiles, if that is known (see `words`).
      halves: int32 `[B|1, H|1, rows, m, warpgroups]`, which half of the columns of the m-th tile of
        the last kind a warpgroup has pairs in: 0, 1, `BOTH` or `NONE`, the latter two alone of 64
        columns. None if that is not known, or `BOTH` of all.
      offsets: by how much the number of the first query exceeds that of the first key, of all tiles
        that have no answers for their pairs, and others between; None if they are not known.
      stored: what the modification computes in tiles of these offsets, in their order (see
        `toeplitz`).
    """

    order: jax.Array
    counts: list[jax.Array]
    kinds: tuple[Kind, ...]
    words: jax.Array | None
    halves: np.ndarray | None
    offsets: range | None
    stored: Sequence[jax.Array] = ()

    @property
    def short(self) -> bool:
        """Whether it is known that programs visit few tiles."""
        some = self.counts[-1]
        return not isinstance(some, jax.core.Tracer) and bool(np.asarray(some).mean() <= SHORT)

    @classmethod
    def of(cls, problem, mask, blocks, rows, leaves, every):
        """Those of a call.

        Args:
          problem: what is known of it.
          mask: the pattern as it was given.
          blocks: of the kernel.
          rows: "q" or "k", whose blocks are the rows.
          leaves: of mask, modification and normaliser.
          every: whether to visit empty tiles too.
        """
        sizes = (blocks.held, blocks.columns)[:: 1 if rows == "q" else -1]
        kinds = tile_kinds(mask, problem.lengths, sizes, every)
        known = not isinstance(kinds, jax.core.Tracer)
        marks, like, offsets = 0, [], None
        if not problem.parts.plain:
            full = np.asarray(kinds) == FULL if known else np.ones(kinds.shape, bool)
            marks, like = problem.parts.alike(leaves, problem.lengths, sizes, full)
            if known:
                some = (np.asarray(kinds) == PARTIAL) | (full & (marks == 0))
                offsets = _offsets(some, sizes)
        order, *counts = listed(kinds, rows, marks, len(like))
        kinds = *(Kind(True, x) for x in like[::-1]), Kind(True), Kind(False)
        bits = halves = None
        if known and mask is not None:
            first, end = map(np.asarray, counts[-2:])
            most = int(np.max(end - first))
            if not every:
                halves = halves_of(mask, problem.lengths, blocks, rows, order, first, end)
            size = math.prod((*order.shape[:3], most, *sizes)) // 8
            if worth(mask) and 0 < size <= problem.most_bytes:
                pattern, *_ = problem.parts.treedef.unflatten(leaves)
                given = dict(most=most, lengths=problem.lengths, sizes=sizes, rows=rows)
                bits = words(pattern, order, first, **given)
        return cls(order, counts, kinds, bits, halves, offsets)

    def storing(self, problem, batch, leaves):
        """The same lists of the forward kernel, with what is stored if that is small enough.

        Args:
          problem: as of `of`.
          batch: B.
          leaves: as kernels read them.
        """
        if self.offsets is None:
            return self
        lead, shift = (batch, problem.heads), problem.lengths[1] - problem.lengths[0]
        sizes = problem.forward.held, problem.forward.columns
        given = dict(parts=problem.parts, lead=lead, shift=shift, offsets=self.offsets, sizes=sizes)
        make = functools.partial(tiles, **given)
        size = sum(x.size * x.dtype.itemsize for x in jax.eval_shape(make, leaves))
        if not 0 < size <= problem.most_bytes:
            return self
        return dataclasses.replace(self, stored=make(leaves))


def halves_of(mask, lengths, blocks, rows, order, first, end) -> np.ndarray | None:
    """Which half of its columns of every tile a warpgroup has pairs in: see `Lists`.

    Args:
      mask: the pattern.
      lengths: T and S.
      blocks: of the kernel.
      rows: "q" or "k", whose blocks are the rows.
      order, first, end: from `listed`, the latter of the last kind of tiles.
    """
    columns = max(LEAST, blocks.columns // 2)
    count = blocks.columns // columns
    order, most = np.asarray(order), np.arange(np.max(end - first))
    if not len(most) or math.prod(lengths) // (blocks.rows * columns) > MOST:
        return None
    listed = first[..., None] + most
    order = np.take_along_axis(order, np.minimum(listed, order.shape[3] - 1), 3)[..., None]
    sizes = (blocks.rows, columns) if rows == "q" else (columns, blocks.rows)
    met = np.asarray(tile_kinds(mask, lengths, sizes)) > EMPTY
    met = met if rows == "q" else met.swapaxes(2, 3)
    groups = blocks.warpgroups
    whole = order.shape[2] * groups, count * (int(order.max()) + 1)
    met = met[:, :, : whole[0], : whole[1]]
    met = np.pad(met, [(0, 0), (0, 0), *((0, n - m) for n, m in zip(whole, met.shape[2:]))])
    met = met.reshape(*met.shape[:2], -1, groups, met.shape[3]).swapaxes(3, 4)
    parts = np.stack([np.take_along_axis(met, count * order + n, 3) for n in range(count)])
    found = np.where(parts.all(0), BOTH, np.where(parts.any(0), parts.argmax(0), NONE))
    some = found[listed < end[..., None]] != BOTH
    return found.astype(np.int32) if some.any() else None


def _offsets(some, sizes) -> range | None:
    """The offsets of tiles, from the least to the greatest: see `Lists`.

    Args:
      some: bool `[B|1, H|1, T tiles, S tiles]`, the tiles.
      sizes: how many queries and keys each of them has.
    """
    i, j = np.nonzero(some.any((0, 1)))
    found = i * sizes[0] - j * sizes[1]
    return range(int(found.min()), int(found.max()) + 1, math.gcd(*sizes)) if len(found) else None
