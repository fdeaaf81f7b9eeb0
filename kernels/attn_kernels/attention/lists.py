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
from attn_kernels.attention.words import words, worth

SHORT = 16  # blocks of columns
MOST = 2**22  # parts of tiles that are asked whether they are empty
LANES = 64  # columns of which products are


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
      offsets: by how much the number of the first query exceeds that of the first key, of all tiles
        that have no answers for their pairs, and others between; None if they are not known.
      stored: what the modification computes in tiles of these offsets, in their order (see
        `toeplitz`).
      halves: int32 `[B|1, H|1, rows, n, warpgroups]`, which half of the columns of a tile a
        warpgroup has pairs in, -1 for both; None if that is not known, or is of no use.
    """

    order: jax.Array
    counts: list[jax.Array]
    kinds: tuple[Kind, ...]
    words: jax.Array | None
    offsets: range | None
    stored: Sequence[jax.Array] = ()
    halves: np.ndarray | None = None

    @property
    def short(self) -> bool:
        """Whether it is known that programs visit few tiles."""
        some = self.counts[-1]
        return not isinstance(some, jax.core.Tracer) and bool(np.asarray(some).mean() <= SHORT)

    @classmethod
    def of(cls, problem, mask, sizes, rows, leaves, every):
        """Those of a call.

        Args:
          problem: what is known of it.
          mask: the pattern as it was given.
          sizes: how many queries and keys a tile has.
          rows: "q" or "k", whose blocks are the rows.
          leaves: of mask, modification and normaliser.
          every: whether to visit empty tiles too.
        """
        kinds = tile_kinds(mask, problem.lengths, sizes, every)
        marks, like, offsets = 0, [], None
        if not problem.parts.plain:
            known = not isinstance(kinds, jax.core.Tracer)
            full = np.asarray(kinds) == FULL if known else np.ones(kinds.shape, bool)
            marks, like = problem.parts.alike(leaves, problem.lengths, sizes, full)
            if known:
                some = (np.asarray(kinds) == PARTIAL) | (full & (marks == 0))
                offsets = _offsets(some, sizes)
        order, *counts = listed(kinds, rows, marks, len(like))
        kinds = *(Kind(True, x) for x in like[::-1]), Kind(True), Kind(False)
        bits = None
        if mask is not None and not isinstance(order, jax.core.Tracer) and worth(mask):
            full, some = map(np.asarray, counts[-2:])
            shape = *order.shape[:3], int(np.max(some - full)), *sizes
            if 0 < math.prod(shape) // 8 <= problem.most_bytes:
                given = dict(most=shape[3], lengths=problem.lengths, sizes=sizes, rows=rows)
                mask, *_ = problem.parts.treedef.unflatten(leaves)
                bits = words(mask, order, full, **given)
        return cls(order, counts, kinds, bits, offsets)

    def storing(self, problem, sizes, batch, leaves):
        """The same lists, with what is stored if it takes no more bytes than the queries.

        Args:
          problem, sizes: as of `of`, queries being the rows.
          batch: B.
          leaves: as kernels read them.
        """
        if self.offsets is None:
            return self
        lead, shift = (batch, problem.heads), problem.lengths[1] - problem.lengths[0]
        given = dict(parts=problem.parts, lead=lead, shift=shift, offsets=self.offsets, sizes=sizes)
        make = functools.partial(tiles, **given)
        size = sum(x.size * x.dtype.itemsize for x in jax.eval_shape(make, leaves))
        if not 0 < size <= problem.most_bytes:
            return self
        return dataclasses.replace(self, stored=make(leaves))

    def halved(self, mask, lengths, blocks):
        """The same lists, with halves of tiles, queries being the rows.

        Args:
          mask: the pattern.
          lengths: T and S.
          blocks: of the kernel.
        """
        columns, groups = blocks.columns // 2, blocks.warpgroups
        known = not isinstance(self.order, jax.core.Tracer)
        parts = math.prod(lengths) // (blocks.rows * columns)
        if mask is None or not known or columns % LANES or parts > MOST:
            return self
        kinds = np.asarray(tile_kinds(mask, lengths, (blocks.rows, columns))) > EMPTY
        order = np.asarray(self.order)[..., None]
        ends = order.shape[2] * groups, 2 * (int(order.max()) + 1)
        kinds = np.pad(
            kinds, [(0, 0), (0, 0), *((0, max(0, n - m)) for n, m in zip(ends, kinds.shape[2:]))]
        )
        kinds = kinds[:, :, : ends[0]].reshape(*kinds.shape[:2], -1, groups, kinds.shape[3])
        first, second = (
            np.take_along_axis(kinds.swapaxes(3, 4), 2 * order + n, 3) for n in range(2)
        )
        found = np.where(first & second, -1, second).astype(np.int32)
        some = np.arange(order.shape[3]) < np.asarray(self.counts[-1])[..., None]
        return dataclasses.replace(self, halves=found) if (found[some] >= 0).any() else self


def _offsets(some, sizes) -> range | None:
    """The offsets of tiles, from the least to the greatest: see `Lists`.

    Args:
      some: bool `[B|1, H|1, T tiles, S tiles]`, the tiles.
      sizes: how many queries and keys each of them has.
    """
    i, j = np.nonzero(some.any((0, 1)))
    found = i * sizes[0] - j * sizes[1]
    return range(int(found.min()), int(found.max()) + 1, math.gcd(*sizes)) if len(found) else None
