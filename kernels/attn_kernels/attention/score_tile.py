"""What kernels for GPUs compute of the scores of a tile."""

import dataclasses
import math

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from attn_kernels.attention.elementwise import over
from attn_kernels.attention.warpgroups import COLUMNS, ROWS, WGMMA, lead
from attn_kernels.attention.words import SIZE

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a tile when a program is traced.

    Attributes:
      whole: whether every pair is allowed.
      like: positions of a query and a key, if all comparisons of positions come out as of these.
    """

    whole: bool
    like: tuple[int, int] | None = None


class ScoreTile:
    """The tile of scores of a computing warpgroup: positions, operands and functions of them.

    Args:
      problem: what is known of the call.
      blocks: of the kernel.
      program: of the warpgroup.
      n: the number of the block that was fetched.
      refs: the leaves.
      pairs: the slots of those leaves that are fetched.
      q_axis: along which of its two axes queries are; programs have their rows along the first.
      kind: of the tile.
      moving: the leaves whose derivatives are wanted.
      half: which half of its columns it is, None for the whole.
    """

    def __init__(
        self, problem, blocks, program, n, refs, pairs, q_axis: int, kind, moving=(), half=None
    ):
        self.problem, self.parts, self.refs = problem, problem.parts, refs
        self.kind, self.moving, self.rows = kind, moving, "qk"[q_axis]
        self.b, self.h, self.slot = program.b, program.h, program.slot(n)
        self.n, self.program = n, program
        columns, half = (blocks.columns, 0) if half is None else (blocks.columns // 2, half)
        self.shape = blocks.rows, columns
        self.first, self._first_word = half * columns, half * (columns // SIZE)
        some = program.words is not None and not kind.whole
        self._count_words = columns // SIZE if some else 0
        self._to_read = [] if kind.like else program.stored
        along = pl.ds(self.first, columns)
        at = (slice(None), along)[:: -1 if q_axis else 1]
        self.pairs = {m: x.at[self.slot, program.wg, *at] for m, x in zip(problem.pairs, pairs)}
        self.axis = {"q": q_axis, "k": 1 - q_axis}
        self.whole = (blocks.held, blocks.columns)[:: -1 if q_axis else 1]
        starts = program.start, program.block(n) * blocks.columns + self.first
        self.starts = {name: starts[axis] for name, axis in self.axis.items()}

    @property
    def at(self):
        """Where the tile is in an array whose last axes are laid out like it."""
        axes = sorted(self.axis, key=self.axis.get)
        return tuple(pl.ds(self.starts[a], n) for a, n in zip(axes, self.shape))

    def _vector(self, ref, along: str, own):
        """Numbers of a row of the reference at the tile's queries or keys."""
        axis = self.axis[along]
        ref = ref.at[(*own, pl.ds(self.starts[along], self.shape[axis]))]
        x = plgpu.load(ref, layout=(ROWS, COLUMNS)[axis], optimized=False)
        return lax.broadcast_in_dim(x, self.shape, [1]) if axis else x

    def load(self):
        """What a tile needs of memory, while products are computed: see `take`."""
        leaves = [self._leaf(n) for n in range(self.parts.of_mask, len(self.refs))]
        words = [self._word(n) for n in range(self._count_words)]
        return leaves, words, [self._stored(ref) for ref in self._to_read]

    def take(self, found):
        leaves, self.words, self.stored = found
        self.leaves = [*self._zeros(0, self.parts.of_mask), *leaves]

    def _zeros(self, *numbers):
        """They stand for leaves that are not read."""
        return [jnp.zeros((), ref.dtype) for ref in self.refs[slice(*numbers)]]

    def _leaf(self, n):
        if n in self.pairs:
            ref = self.pairs[n]
            return plgpu.load(ref.T if self.axis["q"] else ref, layout=WGMMA)
        ref, axes = self.refs[n], self.parts.axes[n]
        own = lead(ref, self.b, self.h)
        if axes == "qk":
            return plgpu.load(ref.at[(*own, *self.at)], layout=WGMMA, optimized=False)
        if axes:
            return self._vector(ref, axes, own)
        return ref[own]

    def _stored(self, ref):
        offsets, first = self.program.offsets, self.program.wg * self.shape[0]
        offset = self.starts["q"] - first - (self.starts["k"] - self.first)
        number = lax.div(offset - offsets.start, jnp.int32(offsets.step))
        own = pl.ds(first, self.shape[0]), pl.ds(self.first, self.shape[1])
        at = *lead(ref, self.b, self.h), number, *own
        return plgpu.load(ref.at[at], layout=WGMMA, optimized=False)

    def index(self, along: str):
        iota = plgpu.broadcasted_iota(jnp.int32, self.shape, self.axis[along], layout=WGMMA)
        return iota + self.starts[along]

    @property
    def place(self):
        shift = self.problem.lengths[1] - self.problem.lengths[0]
        return self.b, self.h, self.index("q") + shift, self.index("k")

    def allowed(self):
        """Conditions that all hold for the pairs that count: none beyond the end does."""
        if self.words:
            return [self._bits()]
        found = []
        for along, length, size in zip("qk", self.problem.lengths, self.whole):
            if length % size:
                found.append(self.index(along) < length)
        if self.parts.masked:
            count = self.parts.of_mask
            leaves = [*(self._leaf(n) for n in range(count)), *self._zeros(count, None)]
            found += self.parts.allowed(self.place, leaves)
        return [over(x, self.shape) for x in found]

    def _word(self, number):
        first = self.program.kinds[-2][1]
        rows = pl.ds(self.program.wg * self.shape[0], self.shape[0])
        ref = self.program.words.at[self.n - first, self._first_word + number, rows]
        return plgpu.load(ref, layout=ROWS, optimized=False)

    def _bits(self):
        """Those of the pairs: see `words`."""
        # A thread has columns 8 i + 2 t and 8 i + 2 t + 1, t being its number in a row: by t alone
        # words are shifted, so that which bits are wanted is known when this is compiled.
        column = plgpu.broadcasted_iota(jnp.int32, self.shape, 1, layout=WGMMA)
        found = None
        for n, word in enumerate(self.words):
            word = lax.shift_right_logical(over(word, self.shape), column & 6)
            found = jnp.where(column < n * SIZE, found, word) if n else word
        return found & jnp.left_shift(jnp.int32(1), column & (SIZE - 7)) != 0

    def value(self, scores):
        """The modified scores if softmax normalises, else the weights."""
        return self.parts.value(scores, self.place, self.leaves, self.kind.like, self.stored)

    def weights(self, products, scale, lse):
        """The weights of pairs.

        Args:
          products: of queries and keys.
          scale: what makes scores of them.
          lse: of softmax, log2 of the denominator.
        """
        if self.parts.plain:
            found = jnp.exp2(products * (scale * LOG2E) - lse)
        elif self.parts.softmax:
            found = jnp.exp2(self.value(products * scale) * LOG2E - lse)
        else:
            found = self.value(products * scale)
        return self.clear(found)

    def slopes(self, products, scale, weights, weight_slopes, lost):
        """The weights, the derivatives of the scores, and those of the leaves `moving`.

        Of leaves that have no other axis than the rows they are vectors, sums over the columns.

        Args:
          products, scale: as in `weights`.
          weights: from there, of softmax.
          weight_slopes: the derivatives of the weights; None for 0.
          lost: what they lose, of softmax or where they are None.
        """
        if weight_slopes is None:
            weight_slopes = -lost
        elif self.parts.softmax:
            weight_slopes = weight_slopes - lost
        if self.parts.softmax:
            weight_slopes = weights * weight_slopes
        else:
            weight_slopes = self.clear(weight_slopes)
        if self.parts.plain:
            return weights, weight_slopes
        value, slopes, *found = self.parts.slopes(
            products * scale,
            weight_slopes,
            self.place,
            self.leaves,
            self.moving,
            self.rows,
            self._summed,
            self.kind.like,
        )
        # What a modification makes of a slope of 0 may be NaN.
        found = [x if x.ndim == 1 else self.clear(x) for x in found]
        return weights if self.parts.softmax else self.clear(value), self.clear(slopes), *found

    def _summed(self, x):
        """The sums of its rows, of pairs that are allowed."""
        if isinstance(x, float | np.ndarray) and not np.any(x):
            return x
        return self.clear(over(x, self.shape)).sum(axis=1)

    def clear(self, x, other=0.0):
        """The other number in place of pairs that are not allowed."""
        # Of conditions that are joined first, compilers keep those of all pairs.
        for allowed in () if self.kind.whole else self.allowed():
            x = jnp.where(allowed, x, other)
        return x
