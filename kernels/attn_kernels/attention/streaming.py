"""Attention by tiles of queries and keys, in memory that grows with T + S, on any device.

The derivative is a formula, not a trace of the loop: given the final statistics, every tile adds a
linear term of its own, so nothing but the arguments, the output and the statistics is kept between
the passes. JAX transposes that formula for reverse mode and differentiates it for higher orders.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from attn_kernels.attention.normalizer import Stats
from attn_kernels.attention.tile import (
    Tile,
    accumulation_dtype,
    contract,
    empty_stats,
    masked_scores,
    silent_scores,
)
from attn_kernels.varying import varying_like

BLOCK = 512


def attend(tile: Tile, block_q: int | None = None, block_k: int | None = None):
    """The output `[B, H, T, Dv]` in float32 or better, and the statistics of the rows."""
    grid, leaves = _grid(tile, block_q, block_k)
    out, stats = _attend(grid, grid.cut(leaves))
    return grid.join(out), tuple(map(grid.join, stats))


def change(tile: Tile, dots: list[jax.Array | None], stats: Stats) -> tuple[jax.Array, Stats]:
    """What the keys of a tile add to the tangents of the output and of the statistics.

    It is linear in `dots`. Of all the keys together, `close` makes the tangents.

    Args:
      tile: some of the keys of its queries.
      dots: the tangents of the tile's leaves in float32 or better, None where nothing moves.
      stats: the final statistics `[B, H, T, n]` of the rows, over all keys.

    Returns:
      `sum_j dw_j v_j + w_j dv_j`, `[B, H, T, Dv]`, and for every statistic `sum_j (dL/ds_j) ds_j`.
    """
    grid, leaves = _grid(tile)
    rows = [_cut(x, 2, grid.rows, grid.block_q) for x in stats]
    return jax.tree.map(grid.join, _changes(grid, grid.cut(leaves), grid.cut(dots), rows))


def close(treedef, leaves, dots, out, stats: Stats, terms) -> tuple[jax.Array, Stats]:
    """The tangents of the output and of the statistics, from the sums that `change` describes.

    What is missing is the silent key, and how the output follows the statistics. Neither needs the
    keys: their leaves of the tile may be None.
    """
    (dout, dstats), normalizer = terms, treedef.unflatten(leaves).normalizer
    silent, dsilent = _jvp(treedef, silent_scores, leaves, dots)
    dsilent = jnp.where(silent == -jnp.inf, 0, dsilent)
    dstats = jax.tree.map(jnp.add, dstats, _spread(normalizer, stats, silent, dsilent))
    rescale = functools.partial(normalizer.rescale, stats)
    return dout + out * jax.jvp(rescale, (stats,), (dstats,))[1], dstats


def _grid(tile: Tile, block_q: int | None = None, block_k: int | None = None):
    """The grid of a tile and its leaves."""
    q_len, k_len = tile.q.shape[2], tile.k.shape[2]
    side = _side(tile)
    block_q, block_k = block_q or side, block_k or side
    leaves, treedef = jax.tree.flatten(tile)
    whole = 1 + len(jax.tree.leaves(tile.score))
    arrays = ((2, None), (None, 2), (None, 2), *[(None, None)] * whole)
    operands = [tuple(n if x.shape[n] > 1 else None for n in (2, 3)) for x in leaves[len(arrays) :]]
    axes = (*arrays, *operands)
    return Grid(q_len, k_len, min(block_q, q_len), min(block_k, k_len), treedef, axes), leaves


def _side(tile: Tile) -> int:
    """Keys and queries of a tile: more on accelerators, where every tile costs its launches."""
    batch, heads = tile.q.shape[:2]
    width = 1 if tile.score is None else tile.score.width
    side = BLOCK if jax.default_backend() == "cpu" else 4 * BLOCK
    while side > BLOCK and batch * heads * width * side**2 > 2**26:
        side //= 2
    return max(16, side // math.isqrt(width))


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the leaves of a `Tile` are cut into blocks, and how a tile is put together again.

    A leaf with a query axis gets a leading axis of query blocks, then one with a key axis a
    leading axis of key blocks, so that nested scans hand every tile its own slices.
    """

    q_len: int
    k_len: int
    block_q: int
    block_k: int
    treedef: jax.tree_util.PyTreeDef
    axes: tuple[tuple[int | None, int | None], ...]

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def columns(self) -> int:
        return -(-self.k_len // self.block_k)

    def cut(self, leaves):
        return [
            x
            if x is None
            else _cut(_cut(x, k_axis, self.columns, self.block_k), shifted, self.rows, self.block_q)
            for x, (q_axis, k_axis) in zip(leaves, self.axes)
            for shifted in [q_axis if q_axis is None or k_axis is None else q_axis + 1]
        ]

    def join(self, blocks):
        """`[rows, B, H, block_q, n]` to `[B, H, T, n]`."""
        _, batch, heads, _, n = blocks.shape
        return jnp.moveaxis(blocks, 0, 2).reshape(batch, heads, -1, n)[:, :, : self.q_len]

    def positions(self, tile, i, j):
        """Query and key positions of tile (i, j), and which keys exist (None: all)."""
        q_index = i * self.block_q + jnp.arange(self.block_q)
        k_index = j * self.block_k + jnp.arange(self.block_k)
        exists = k_index < self.k_len if self.k_len % self.block_k else None
        return *self._placed(tile, q_index, k_index), exists

    def _placed(self, tile, q_index, k_index):
        """The positions of queries and keys by their numbers in the arrays."""
        if tile.place is None:
            return q_index + (self.k_len - self.q_len), k_index
        return tile.place.queries(q_index), tile.place.keys(k_index)

    def visit(self, tile, i, j, function, carry):
        """`function(carry)`, or `carry` if the mask's bounds say that tile (i, j) is empty."""
        if tile.mask is None or self.rows * self.columns == 1:
            return function(carry)
        q_first, k_first = self._placed(tile, i * self.block_q, j * self.block_k)
        last = (i + 1) * self.block_q - 1, (j + 1) * self.block_k - 1
        q_last, k_last = self._placed(tile, *last)
        some, _ = tile.mask.tile(q_first, q_last, k_first, k_last)
        return function(carry) if some is True else jax.lax.cond(some, function, lambda c: c, carry)

    def sweep(self, leaves, axes, start, step, finish):
        """`finish(known, carry)` for every row of the grid, stacked.

        A row's carry begins as `start(known)`, where `known` are the leaves without the key axis,
        and goes through `step(i, j, leaves, carry)` for every tile of the row.
        """

        def on(q: bool, k: bool):
            return [
                x if (a is not None, b is not None) == (q, k) else None
                for x, (a, b) in zip(leaves, axes)
            ]

        shared, per_column = on(False, False), (jnp.arange(self.columns), on(False, True))

        @_remat
        def row(_, xs):
            i, per_row, per_tile = xs
            known = _merge(per_row, shared)

            @_remat
            def column(carry, xs):
                (j, per_column), pair = xs
                return step(i, j, _merge(known, per_column, pair), carry), None

            first = varying_like(start(known), leaves[: len(self.axes)])
            carry, _ = jax.lax.scan(column, first, (per_column, per_tile))
            return None, finish(known, carry)

        xs = jnp.arange(self.rows), on(True, False), on(True, True)
        return jax.lax.scan(row, None, xs)[1]


_remat = functools.partial(jax.checkpoint, prevent_cse=False)
ROW = (2, None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(grid: Grid, blocks):
    """The blocks of the output and of the statistics, by running statistics in every row."""
    value_dim = grid.treedef.unflatten(blocks).v.shape[-1]

    def start(known):
        tile = grid.treedef.unflatten(known)
        out = jnp.zeros((*tile.q.shape[:3], value_dim), accumulation_dtype(tile.q))
        return out, empty_stats(tile)

    def step(i, j, leaves, carry):
        tile = grid.treedef.unflatten(leaves)

        def add(carry):
            out, old = carry
            scores = masked_scores(tile, *grid.positions(tile, i, j))
            stats = tile.normalizer.combine(old, tile.normalizer.partial(scores))
            w = tile.normalizer.weight(scores, stats).astype(tile.v.dtype)
            kept = out * tile.normalizer.rescale(old, stats)
            return kept + contract(w, tile.v, transpose=False), stats

        return grid.visit(tile, i, j, add, carry)

    return grid.sweep(blocks, grid.axes, start, step, lambda _, carry: carry)


@_attend.defjvp
def _attend_jvp(grid: Grid, primals, tangents):
    """The linear map of the tangents, one term a tile, given the final statistics L.

    dL = sum_j (dL/ds_j) ds_j and dout = sum_j (dw_j v_j + w_j dv_j), L held, + out drescale(L).
    """
    (blocks,), (dots,) = primals, tangents
    out, stats = _attend(grid, blocks)
    dots = [
        dot.astype(out.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else None
        for x, dot in zip(blocks, dots)
    ]
    return (out, stats), _changes(grid, blocks, dots, stats, out)


def _changes(grid: Grid, blocks, dots, stats, out=None):
    """The sums of `change` for every row of the grid, closed if the output is given."""
    whole = grid.treedef.unflatten(blocks)
    shape = (*whole.q.shape[-4:-1], whole.v.shape[-1])
    dtype, count = accumulation_dtype(whole.q), len(blocks)
    rows = (*stats, *([] if out is None else [out]))

    def split(leaves):
        rest = leaves[2 * count :]
        return (
            leaves[:count],
            leaves[count : 2 * count],
            tuple(rest[: len(stats)]),
            rest[len(stats) :],
        )

    def start(known):
        return jnp.zeros(shape, dtype), tuple(map(jnp.zeros_like, split(known)[2]))

    def step(i, j, leaves, carry):
        primal, dots, stats, _ = split(leaves)

        def parts(tile):
            scores = masked_scores(tile, *grid.positions(tile, i, j))
            return scores, tile.normalizer.weight(scores, stats), tile.v

        def add(carry):
            dout, dstats = carry
            (scores, w, v), (dscores, dw, dv) = _jvp(grid.treedef, parts, primal, dots)
            terms = contract(dw, v, transpose=False) + contract(w, dv, transpose=False)
            spread = _spread(tile.normalizer, stats, scores, dscores)
            return dout + terms, jax.tree.map(jnp.add, dstats, spread)

        tile = grid.treedef.unflatten(primal)
        return grid.visit(tile, i, j, add, carry)

    def finish(known, carry):
        primal, dots, stats, last = split(known)
        return close(grid.treedef, primal, dots, *last, stats, carry) if last else carry

    axes = (*grid.axes, *grid.axes, *[ROW] * len(rows))
    return grid.sweep([*blocks, *dots, *rows], axes, start, step, finish)


def _jvp(treedef, function, leaves, dots):
    """`function(tile)` and its tangent, in the dtype of the tangents; absent leaves are None."""
    at = [n for n, dot in enumerate(dots) if dot is not None and leaves[n] is not None]

    def of_moving(moving):
        full = list(leaves)
        for n, x in zip(at, moving):
            full[n] = x
        return function(treedef.unflatten(full))

    moving = [leaves[n].astype(dots[n].dtype) for n in at]
    return jax.jvp(of_moving, (moving,), ([dots[n] for n in at],))


def _spread(normalizer, final: Stats, scores, dscores) -> Stats:
    """What changes of scores do to the final statistics."""
    return tuple(
        jnp.zeros_like(x) if slope is None else (slope * dscores).sum(-1, keepdims=True)
        for x, slope in zip(final, normalizer.influence(scores, final))
    )


def _cut(x, axis, count, block):
    """Splits `axis` into a leading axis of `count` blocks; None leaves `x` as it is.

    The last block is filled up with copies of the last entry, which stay harmless in any function.
    """
    if axis is None:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * block - x.shape[axis])
    x = jnp.pad(x, widths, mode="edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis, 0)


def _merge(*parts):
    """Puts lists together in which every place is filled at most once."""
    return [next((x for x in place if x is not None), None) for place in zip(*parts)]
