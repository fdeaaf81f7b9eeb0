"""Attention patterns: predicates over index pairs, with an algebra and block maps."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2
LEAF, SPLIT = 64, 8  # Open tiles are cut into SPLIT^2 parts, down to LEAF^2 pairs,
CHUNK = 2**10  # this many of them at once,
TOGETHER = 2**25  # and the predicate is evaluated on this many pairs at once,
ON_CPU = 2**18  # or so many where memory costs more than steps of a loop.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("operands",), meta_fields=("predicate",)
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """An attention pattern: `allowed(b, h, q_index, k_index, *operands) -> bool`.

    The predicate gets integer arrays that broadcast to `[B, H, T, S]`, and the tiles of its
    operands, and is traced into every implementation. Query `t` of `T` has `q_index = t + S - T`,
    so that the last query meets the last key; an operand's row `t` belongs to query `t`. Masks
    compose by `&`, `|` and `~` and are pytrees, so they may be arguments of jitted functions.

    Attributes:
      predicate: the function. If it has a method `tile(q_first, q_last, k_first, k_last)`, this
        returns `(some, every)` for the tile of these inclusive ranges: False if surely no pair is
        allowed, and True if surely every pair is. It gets integers, NumPy arrays or traced arrays,
        and ranges that end after the last position. Streaming skips what is surely empty. If it
        has an attribute `window`, see there.
      operands: arrays laid out by `operand`, for example segment ids along "bq" and "bk".
    """

    predicate: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...] = ()

    def __and__(self, other: "Mask") -> "Mask":
        return self._join(operator.and_, other)

    def __or__(self, other: "Mask") -> "Mask":
        return self._join(operator.or_, other)

    def __invert__(self) -> "Mask":
        return Mask(_Not(self.predicate), self.operands)

    def _join(self, op, other):
        if not isinstance(other, Mask):
            return NotImplemented
        joined = _Join(op, self.predicate, len(self.operands), other.predicate)
        return Mask(joined, self.operands + other.operands)

    @property
    def window(self) -> tuple[int, int] | None:
        """`(left, right)` of a band around the diagonal, which fixed kernels know; else None.

        It is the predicate's own: `q_index - k_index <= left` and `k_index - q_index <= right`,
        where a negative number is no bound.
        """
        return getattr(self.predicate, "window", None)

    def allowed(self, b, h, q_index, k_index, operands=None) -> jax.Array:
        """The predicate on the given indices, with (tiles of) the mask's operands."""
        operands = self.operands if operands is None else operands
        return self.predicate(b, h, q_index, k_index, *operands)

    def dense(self, q_len: int, k_len: int) -> jax.Array:
        """The pattern as bool `[T, S]`, `[H, T, S]` or `[B, H, T, S]`: no axis that it ignores."""
        lead = self._leading(q_len, k_len)
        b, h = (jnp.arange(n) for n in lead)
        q_index = jnp.arange(q_len)[:, None] + (k_len - q_len)
        indices = b[:, None, None, None], h[:, None, None], q_index, jnp.arange(k_len)
        allowed = jnp.broadcast_to(self.allowed(*indices), (*lead, q_len, k_len))
        return allowed.reshape(*_without_ones(lead), q_len, k_len)

    def count(self, q_len: int, k_len: int) -> np.ndarray | jax.Array:
        """The number of allowed pairs, with the leading axes of `dense`.

        It is exact, in int64; where operands are traced, it is in the default integers of JAX.
        """
        whole = (np.array([n]) for n in (0, q_len, 0, k_len))
        counts = self._pairs(q_len, k_len, *whole, exact=True)
        return counts[0].reshape(_without_ones(counts.shape[1:]))

    def block_map(self, q_len: int, k_len: int, block_q: int, block_k: int) -> jax.Array:
        """The state of every tile: 0 empty, 1 partial, 2 full, as int32.

        Args:
          q_len, k_len: the lengths T and S.
          block_q, block_k: the size of a tile; the last tiles may be smaller.

        Returns:
          `[..., ceil(T / block_q), ceil(S / block_k)]` with the leading axes of `dense`. Tiles
          whose state the bounds leave open are cut up until the bounds of the parts decide, and
          the predicate is evaluated on the smallest parts only.
        """
        q_first, k_first = np.arange(0, q_len, block_q), np.arange(0, k_len, block_k)
        q_stop, k_stop = (
            np.minimum(x + n, end)
            for x, n, end in ((q_first, block_q, q_len), (k_first, block_k, k_len))
        )
        state = np.empty((q_first.size, k_first.size), np.int8)
        step = max(1, CHUNK * SPLIT**2 // k_first.size)
        for n in range(0, len(state), step):
            rows = slice(n, n + step), None
            some, every = self._sure(q_len, k_len, q_first[rows], q_stop[rows], k_first, k_stop)
            state[n : n + step] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
        i, j = np.nonzero(state == PARTIAL)
        out = jnp.asarray(state, jnp.int32)
        if not len(i):
            return out
        tiles = q_first[i], q_stop[i], k_first[j], k_stop[j]
        counts = self._pairs(q_len, k_len, *tiles, exact=False)
        size = ((tiles[1] - tiles[0]) * (tiles[3] - tiles[2]))[:, None, None]
        found = jnp.where(counts == 0, EMPTY, jnp.where(counts == size, FULL, PARTIAL))
        axes = _without_ones(counts.shape[1:])
        found = jnp.moveaxis(found, 0, -1).reshape(*axes, len(i)).astype(jnp.int32)
        return jnp.broadcast_to(out, (*axes, *out.shape)).at[..., i, j].set(found)

    def tile(self, q_first, q_last, k_first, k_last):
        """`(some, every)` of the tile of these inclusive index ranges: see the class."""
        bounds = getattr(self.predicate, "tile", None)
        return (True, False) if bounds is None else bounds(q_first, q_last, k_first, k_last)

    def _leading(self, q_len, k_len):
        """The batch and heads that the operands tell apart; they must have these lengths."""
        for x in self.operands:
            if x.shape[2] not in (1, q_len) or x.shape[3] not in (1, k_len):
                raise ValueError(
                    f"the mask's operand of shape {x.shape} does not fit lengths {q_len}, {k_len}"
                )
        return tuple(max([1, *(x.shape[n] for x in self.operands)]) for n in (0, 1))

    def _sure(self, q_len, k_len, q_first, q_stop, k_first, k_stop):
        """The bounds of tiles as NumPy arrays; the queries are numbered from 0."""
        shift = k_len - q_len
        ranges = q_first + shift, q_stop + (shift - 1), k_first, k_stop - 1
        shape = np.broadcast_shapes(q_first.shape, k_first.shape)
        with jax.ensure_compile_time_eval():
            return [np.broadcast_to(np.asarray(x), shape) for x in self.tile(*ranges)]

    def _pairs(self, q_len, k_len, q_first, q_stop, k_first, k_stop, exact):
        """The allowed pairs in n tiles: int64 [n, B, H].

        If not `exact`, a tile that turns out to have pairs of both kinds may have any number
        between none and all.
        """
        lead = self._leading(q_len, k_len)
        stops, longest = (q_stop, k_stop), max((q_stop - q_first).max(), (k_stop - k_first).max())
        side = leaf = min(LEAF, 1 << (int(longest) - 1).bit_length())
        while side < longest:
            side *= SPLIT
        count = len(q_first)
        sure, lacking = np.zeros(count, np.int64), np.zeros(count, bool)
        found = np.zeros((count, *lead), np.int64)
        pending = [(side, np.arange(count), q_first, k_first)]
        while pending:
            side, of, *firsts = pending.pop()
            ends = [np.minimum(x + side, stop[of]) for x, stop in zip(firsts, stops)]
            some, every = self._sure(q_len, k_len, firsts[0], ends[0], firsts[1], ends[1])
            size = (ends[0] - firsts[0]) * (ends[1] - firsts[1])
            np.add.at(sure, of[every], size[every])
            lacking[of[~some]] = True
            open = some & ~every & (exact | (sure[of] == 0) | ~lacking[of])
            of, firsts, ends = of[open], [x[open] for x in firsts], [x[open] for x in ends]
            if side == leaf and len(of):
                found = self._evaluate(found, q_len, k_len, of, *firsts, *ends, leaf)
            for n in range(0, len(of) if side > leaf else 0, CHUNK):
                part = slice(n, n + CHUNK), None
                steps = np.indices((SPLIT, SPLIT)).reshape(2, -1) * (side // SPLIT)
                within = np.repeat(of[part], SPLIT**2)
                parts = [(x[part] + step).ravel() for x, step in zip(firsts, steps)]
                exist = (parts[0] < q_stop[within]) & (parts[1] < k_stop[within])
                pending.append((side // SPLIT, within[exist], *(x[exist] for x in parts)))
        return found + sure[:, None, None]

    def _evaluate(self, found, q_len, k_len, of, q_first, k_first, q_stop, k_stop, leaf):
        """`found` and the allowed pairs of small tiles, each added to the tile it is a part of."""
        # Few distinct numbers of tiles are few compilations.
        fill = (0, (1 << (len(of) - 1).bit_length()) - len(of))
        tiles = [np.pad(x, fill).astype(np.int32) for x in (q_first, k_first, q_stop, k_stop)]
        shape = *found.shape[1:], leaf, leaf
        counts = _count(self, np.int32(k_len - q_len), tiles, shape=shape)[: len(of)]
        if isinstance(counts, jax.core.Tracer):
            return jnp.asarray(found).at[of].add(counts)
        np.add.at(found, of, np.asarray(counts, np.int64))
        return found


@functools.partial(jax.jit, static_argnames="shape")
def _count(mask: Mask, shift, tiles, *, shape):
    """The allowed pairs in tiles that are given by their first and end positions."""
    batch, heads, block_q, block_k = shape
    b, h = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None, None]

    def one(tile):
        q_first, k_first, q_stop, k_stop = tile
        rows, columns = q_first + jnp.arange(block_q), k_first + jnp.arange(block_k)
        operands = mask.operands
        for axis, index in (2, rows), (3, columns):
            operands = [
                x if x.shape[axis] == 1 else jnp.take(x, index, axis, mode="clip") for x in operands
            ]
        allowed = mask.allowed(b, h, rows[:, None] + shift, columns, operands)
        allowed = allowed & (rows < q_stop)[:, None] & (columns < k_stop)
        return jnp.broadcast_to(allowed, shape).sum((2, 3), dtype=jnp.int32)

    together = ON_CPU if jax.default_backend() == "cpu" else TOGETHER
    return jax.lax.map(one, tiles, batch_size=max(1, together // math.prod(shape)))


@dataclasses.dataclass(frozen=True)
class _Join:
    op: Callable
    left: Callable
    split: int
    right: Callable

    def __call__(self, b, h, q_index, k_index, *operands):
        return self.op(
            self.left(b, h, q_index, k_index, *operands[: self.split]),
            self.right(b, h, q_index, k_index, *operands[self.split :]),
        )

    def tile(self, *ranges):
        left, right = Mask(self.left).tile(*ranges), Mask(self.right).tile(*ranges)
        return self.op(left[0], right[0]), self.op(left[1], right[1])

    @property
    def window(self):
        windows = Mask(self.left).window, Mask(self.right).window
        if self.op is not operator.and_ or None in windows:
            return None
        bounds = ([x for x in pair if x >= 0] for pair in zip(*windows))
        return tuple(min(pair, default=-1) for pair in bounds)


@dataclasses.dataclass(frozen=True)
class _Not:
    predicate: Callable

    def __call__(self, *args):
        return ~self.predicate(*args)

    def tile(self, *ranges):
        some, every = Mask(self.predicate).tile(*ranges)
        return _negated(every), _negated(some)


def _negated(x):
    """`not x`, for Python's bool, NumPy and JAX alike."""
    return not x if isinstance(x, bool) else ~x


def _without_ones(lead: tuple[int, int]) -> tuple[int, ...]:
    """The leading axes `[B, H]` that a pattern depends on."""
    return lead if lead[0] > 1 else lead[1:] if lead[1] > 1 else ()
