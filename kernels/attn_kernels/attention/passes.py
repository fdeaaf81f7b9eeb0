"""Normalisers that pass over the scores more than once, and what a pass can reduce.

Every reduction is itself an attention: a weight for each score, and values of one. So it runs by
the same implementation, in its memory, and has its derivatives of every order.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attn_kernels.attention.mask import Mask
from attn_kernels.attention.normalizer import Normalizer, Softmax, Stats
from attn_kernels.attention.score_mod import ScoreMod
from attn_kernels.attention.tile import Tile, accumulation_dtype


class MultiPass(Normalizer):
    """A normaliser whose statistics come from several reductions: `w(s, statistics)`.

    `weight` sees allowed scores alone; the weights of others are 0.

    Attributes:
      implicit: whether statistics solve equations, whose derivative takes forward mode.
    """

    implicit = False

    def statistics(self, rows: "Rows") -> Stats:
        """Arrays `[B|1, H|1, T|1, S|1]` that `weight` needs: of rows, or of columns."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Rows:
    """The scores of attention, to be reduced over the allowed keys of every row.

    Results are `[B, H, T, 1]` in float32 or better; operands are arrays `[B|1, H|1, T|1, S|1]`.
    Functions are elementwise and may not close over traced arrays.

    Attributes:
      tile: the scores' queries, keys, mask and modification.
      attend: the implementation that reduces.
    """

    tile: Tile
    attend: Callable[[Tile], tuple[jax.Array, Stats]]

    @property
    def shape(self) -> tuple[int, int]:
        """T and S, whether allowed or not."""
        return self.tile.q.shape[2], self.tile.k.shape[2]

    def reduce(self, normalizer: Normalizer) -> tuple[jax.Array, Stats]:
        """The sum of the weights of a normaliser, and its statistics."""
        batch, _, length, _ = self.tile.k.shape
        ones = jnp.ones((batch, 1, length, 1), accumulation_dtype(self.tile.q))
        return self.attend(dataclasses.replace(self.tile, v=ones, normalizer=normalizer))

    def sum(self, function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
        """`sum_j function(s_j, *operands)`."""
        return self.reduce(_Sum(function, operands))[0]

    def count(self) -> jax.Array:
        """The number of allowed keys."""
        return self.sum(jnp.ones_like)

    def softmax(self) -> Stats:
        """The maximum m, which has no derivative, and `sum_j exp(s_j - m)`; 0 and 1 without keys.

        The log-sum-exp `m + log(sum)` alone would round scores of 10^4 by 10^-3.
        """
        top, total = self.reduce(Softmax())[1]
        some = total > 0
        return jax.lax.stop_gradient(jnp.where(some, top, 0)), jnp.where(some, total, 1)

    def largest(self, count: int) -> jax.Array:
        """The largest `count` scores, in order: `[B, H, T, count]`, -inf where there are fewer."""
        return jax.lax.stop_gradient(self.reduce(_Largest(count))[1][0])

    def plus(self, operand: jax.Array) -> "Rows":
        """The rows of `s + operand`."""
        return self.modified(_add, operand)

    def modified(self, function: Callable[..., jax.Array], *operands: jax.Array) -> "Rows":
        """The rows after one more score modification `function(s, b, h, q, k, *operands)`."""
        first, then = self.tile.score_mod, ScoreMod(function, operands)
        score_mod = then if first is None else first.then(then)
        return dataclasses.replace(self, tile=dataclasses.replace(self.tile, score_mod=score_mod))

    def transpose(self) -> "Rows":
        """The columns as rows: operands and results are `[B|1, H|1, S|1, T|1]`."""
        tile = self.tile
        shift = tile.k.shape[2] - tile.q.shape[2]
        keys = jnp.repeat(tile.k, tile.q.shape[1] // tile.k.shape[1], 1)

        score, mask, score_mod = tile.score, tile.mask, tile.score_mod
        if score is not None:
            turned = _ScoreOfColumns(score.function, shift)
            score = dataclasses.replace(score, function=turned)
        if mask is not None:
            turned = _MaskOfColumns(mask.predicate, shift)
            mask = Mask(turned, tuple(map(transposed, mask.operands)))
        if score_mod is not None:
            turned = _ModOfColumns(score_mod.function, shift)
            score_mod = ScoreMod(turned, tuple(map(transposed, score_mod.operands)))
        tile = dataclasses.replace(
            tile,
            q=keys,
            k=tile.q,
            score=score,
            mask=mask,
            score_mod=score_mod,
        )
        return dataclasses.replace(self, tile=tile)


def transposed(operand: jax.Array) -> jax.Array:
    """An operand or a result of rows as one of columns, and back."""
    return jnp.swapaxes(operand, 2, 3)


def settle(
    tile: Tile, attend: Callable[[Tile], tuple[jax.Array, Stats]], finish: Callable | None = None
):
    """What `finish`, by default `attend`, makes of a tile once all but its last pass are done.

    Of a normaliser of several passes the statistics are those of the tile, not of the last pass.
    """
    if not isinstance(tile.normalizer, MultiPass):
        return (finish or attend)(tile)
    stats = tile.normalizer.statistics(Rows(tile, attend))
    last = dataclasses.replace(tile, normalizer=_Settled(tile.normalizer, stats))
    return finish(last) if finish else (attend(last)[0], stats)


def of_allowed(function: Callable[..., jax.Array], scores: jax.Array, *operands) -> jax.Array:
    """`function(scores, *operands)` where scores are finite or NaN; 0, with no slope, at -inf."""
    allowed = scores != -jnp.inf
    return jnp.where(allowed, function(jnp.where(allowed, scores, 0), *operands), 0)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("normalizer", "stats"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class _Settled(Normalizer):
    """The last pass: pointwise weights, given the statistics."""

    normalizer: MultiPass
    stats: Stats

    def weight(self, scores, stats):
        return of_allowed(lambda s: self.normalizer.weight(s, self.stats), scores)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("operands",), meta_fields=("function",)
)
@dataclasses.dataclass(frozen=True)
class _Sum(Normalizer):
    function: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]

    def weight(self, scores, stats):
        return of_allowed(self.function, scores, *self.operands)


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("number",))
@dataclasses.dataclass(frozen=True)
class _Largest(Normalizer):
    number: int

    def partial(self, scores):
        missing = max(self.number - scores.shape[-1], 0)
        scores = jnp.pad(scores, [(0, 0)] * 3 + [(0, missing)], constant_values=-jnp.inf)
        return (jax.lax.top_k(jax.lax.stop_gradient(scores), self.number)[0],)

    def combine(self, a, b):
        return self.partial(jnp.concatenate([a[0], b[0]], -1))

    def weight(self, scores, stats):
        return jnp.zeros_like(scores)

    def influence(self, scores, stats):
        return (None,)


def _add(score, b, h, q_index, k_index, operand):
    return score + operand


@dataclasses.dataclass(frozen=True)
class _MaskOfColumns:
    """A predicate whose queries and keys have changed places; they align at their ends."""

    function: Callable
    shift: int

    def __call__(self, b, h, q_index, k_index, *operands):
        operands = map(transposed, operands)
        turned = self.function(b, h, *self._indices(q_index, k_index), *operands)
        return transposed(jnp.broadcast_to(turned, jnp.broadcast_shapes(turned.shape, (1,) * 4)))

    def _indices(self, q_index, k_index):
        """Positions as the function knows them, with queries along the last axis but one."""
        return tuple(jnp.swapaxes(x, -1, -2) + self.shift for x in _pair(k_index, q_index))

    def tile(self, q_first, q_last, k_first, k_last):
        bounds = k_first, k_last, q_first, q_last
        return Mask(self.function).tile(*(x + self.shift for x in bounds))


@dataclasses.dataclass(frozen=True)
class _ModOfColumns(_MaskOfColumns):
    def __call__(self, score, b, h, q_index, k_index, *operands):
        operands = map(transposed, operands)
        indices = self._indices(q_index, k_index)
        turned = self.function(transposed(score), b, h, *indices, *operands)
        return transposed(turned)


@dataclasses.dataclass(frozen=True)
class _ScoreOfColumns:
    function: Callable
    shift: int

    def __call__(self, q, k, q_index, k_index, *operands):
        scores = self.function(k, q, k_index + self.shift, q_index + self.shift, *operands)
        return transposed(scores)


def _pair(*indices):
    """Positions with at least two axes."""
    return (jnp.atleast_2d(x) for x in indices)
