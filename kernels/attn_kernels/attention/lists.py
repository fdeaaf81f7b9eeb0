"""Which tiles programs of GPUs visit, and what is known of them."""

import dataclasses
import math

import jax
import numpy as np

from attn_kernels.attention.mask import FULL, Mask
from attn_kernels.attention.score_tile import Kind
from attn_kernels.attention.traced import listed, tile_kinds
from attn_kernels.attention.words import words, worth

SHORT = 16  # blocks of columns


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
    """

    order: jax.Array
    counts: list[jax.Array]
    kinds: tuple[Kind, ...]
    words: jax.Array | None

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
        marks, like = 0, []
        if not problem.parts.plain:
            known = not isinstance(kinds, jax.core.Tracer)
            full = np.asarray(kinds) == FULL if known else np.ones(kinds.shape, bool)
            marks, like = problem.parts.alike(leaves, problem.lengths, sizes, full)
        order, *counts = listed(kinds, rows, marks, len(like))
        kinds = *(Kind(True, x) for x in like[::-1]), Kind(True), Kind(False)
        bits = None
        if mask is not None and not isinstance(order, jax.core.Tracer) and worth(mask):
            full, some = map(np.asarray, counts[-2:])
            shape = *order.shape[:3], int(np.max(some - full)), *sizes
            if 0 < math.prod(shape) // 8 <= problem.most_words:
                given = dict(most=shape[3], lengths=problem.lengths, sizes=sizes, rows=rows)
                mask, *_ = problem.parts.treedef.unflatten(leaves)
                bits = words(mask, order, full, **given)
        return cls(order, counts, kinds, bits)
