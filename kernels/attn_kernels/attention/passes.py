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
from attn_kernels.varying import varying_like


class MultiPass(Normalizer):
    """A normaliser whose statistics come from several reductions: `w(s, statistics)`.

    `weight` sees allowed scores alone; the weights of others are 0.
    """

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
      forward_mode: whether it has derivatives in forward mode, beside those in reverse.
    """

    tile: Tile
    attend: Callable[[Tile], tuple[jax.Array, Stats]]
    forward_mode: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """T and S, whether allowed or not."""
        return self.tile.q.shape[2], self.tile.k.shape[2]

    def reduce(self, normalizer: Normalizer) -> tuple[jax.Array, Stats]:
        """The sum of the weights of a normaliser, and its statistics."""
        batch, _, length, _ = self.tile.k.shape
        ones = jnp.ones((batch, 1, length, 1), accumulation_dtype(self.tile.q))
        part = dict(v=ones, normalizer=normalizer, summing=True)
        return self.attend(dataclasses.replace(self.tile, **part))

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

    def root(
        self,
        function: Callable[..., jax.Array],
        *operands: jax.Array,
        bracket: tuple[jax.Array, jax.Array],
        num_iters: int,
    ) -> jax.Array:
        """The x in a bracket with `sum_j function(s_j, *operands, x) = 1`; its end without keys.

        Its derivatives are those of the equation.

        Args:
          function: one that falls as x grows.
          operands: arrays that the function needs.
          bracket: the least x, and how far beyond it the greatest is.
          num_iters: how often the bracket is halved.
        """

        def excess(given, x):
            tile, operands = given
            return dataclasses.replace(self, tile=tile).sum(function, *operands, x) - 1

        given = self.tile, operands
        shape, dtype = (*self.tile.q.shape[:3], 1), accumulation_dtype(self.tile.q)
        low, width = (
            jnp.broadcast_to(jnp.asarray(x, dtype), shape) for x in jax.lax.stop_gradient(bracket)
        )
        low = varying_like(low, given)
        if not self.forward_mode:
            return _root(excess, num_iters, given, low, width)

        def halve(excess, low):
            return _halve(excess, num_iters, low, width)

        def solve(slope, y):
            return _over_slope(y, slope(jnp.ones_like(y)))

        return jax.lax.custom_root(functools.partial(excess, given), low, halve, solve)

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


def _halve(excess, num_iters, low, width):
    def step(n, low):
        middle = low + width * 0.5 ** (n + 1.0)
        return jnp.where(excess(middle) >= 0, middle, low)

    return jax.lax.fori_loop(0, num_iters, step, low)


def _over_slope(y, slope):
    """`y / slope`; 0 for a row without keys, whose slope is 0."""
    some = slope != 0
    return jnp.where(some, y / jnp.where(some, slope, 1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _root(excess, num_iters, given, low, width):
    return _halve(functools.partial(excess, given), num_iters, low, width)


def _root_fwd(excess, num_iters, given, low, width):
    x = _root(excess, num_iters, given, low, width)
    return x, (given, x)


def _root_bwd(excess, num_iters, saved, cotangent):
    given, x = saved
    _, of_x = jax.vjp(functools.partial(excess, given), x)
    _, of_given = jax.vjp(lambda given: excess(given, x), given)
    (slope,) = of_x(jnp.ones_like(x))
    return *of_given(-_over_slope(cotangent, slope)), jnp.zeros_like(x), jnp.zeros_like(x)


_root.defvjp(_root_fwd, _root_bwd)


def transposed(operand: jax.Array) -> jax.Array:
    """An operand or a result of rows as one of columns, and back."""
    return jnp.swapaxes(operand, 2, 3)


def settle(
    tile: Tile,
    attend: Callable[[Tile], tuple[jax.Array, Stats]],
    finish: Callable | None = None,
    forward_mode: bool = True,
):
    """What `finish`, by default `attend`, makes of a tile once all but its last pass are done.

    Of a normaliser of several passes the statistics are those of the tile, not of the last pass.
    `forward_mode` is whether `attend` has it.
    """
    if not isinstance(tile.normalizer, MultiPass):
        return (finish or attend)(tile)
    stats = tile.normalizer.statistics(Rows(tile, attend, forward_mode))
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
