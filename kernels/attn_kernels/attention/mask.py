"""Attention patterns: predicates over index pairs, with an algebra and block maps."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2


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
        allowed, and True if surely every pair is. Streaming skips what is surely empty.
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

    def allowed(self, b, h, q_index, k_index, operands=None) -> jax.Array:
        """The predicate on the given indices, with (tiles of) the mask's operands."""
        operands = self.operands if operands is None else operands
        return self.predicate(b, h, q_index, k_index, *operands)

    def dense(self, q_len: int, k_len: int) -> jax.Array:
        """The pattern as bool `[T, S]`, `[H, T, S]` or `[B, H, T, S]`: no axis that it ignores."""
        allowed = self._strip(q_len, k_len, 0, q_len)
        return allowed.reshape(_leading(allowed) + allowed.shape[2:])

    def count(self, q_len: int, k_len: int) -> np.ndarray | jax.Array:
        """The number of allowed pairs, with the leading axes of `dense`."""
        counts = self._tile_counts(q_len, k_len, min(q_len, 512), min(k_len, 512))
        if isinstance(counts, jax.core.Tracer):
            return counts.sum((-1, -2))
        return np.asarray(counts, np.int64).sum((-1, -2))

    def block_map(self, q_len: int, k_len: int, block_q: int, block_k: int) -> jax.Array:
        """The state of every tile: 0 empty, 1 partial, 2 full, as int32.

        Args:
          q_len, k_len: the lengths T and S.
          block_q, block_k: the size of a tile; the last tiles may be smaller.

        Returns:
          `[..., ceil(T / block_q), ceil(S / block_k)]` with the leading axes of `dense`. The
          predicate is evaluated a strip of `block_q` rows at a time, and only on tiles whose
          state its bounds leave open.
        """
        counts = self._tile_counts(q_len, k_len, block_q, block_k)
        size = _extent(q_len, block_q)[:, None] * _extent(k_len, block_k)
        state = jnp.where(counts == 0, EMPTY, jnp.where(counts == size, FULL, PARTIAL))
        return state.astype(jnp.int32)

    def tile(self, q_first, q_last, k_first, k_last):
        """`(some, every)` of the tile of these inclusive index ranges: see the class."""
        bounds = getattr(self.predicate, "tile", None)
        return (True, False) if bounds is None else bounds(q_first, q_last, k_first, k_last)

    def _strip(self, q_len, k_len, start, rows):
        """The predicate on `rows` query rows from `start`: bool [B|1, H|1, rows, S]."""
        batch = max([1, *(x.shape[0] for x in self.operands)])
        heads = max([1, *(x.shape[1] for x in self.operands)])
        for x in self.operands:
            if x.shape[2] not in (1, q_len) or x.shape[3] not in (1, k_len):
                raise ValueError(
                    f"the mask's operand of shape {x.shape} does not fit lengths {q_len}, {k_len}"
                )
        operands = tuple(
            jax.lax.dynamic_slice_in_dim(x, start, rows, 2) if x.shape[2] > 1 else x
            for x in self.operands
        )
        b, h = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None, None]
        q_index = start + jnp.arange(rows)[:, None] + (k_len - q_len)
        allowed = self.allowed(b, h, q_index, jnp.arange(k_len), operands)
        shape = np.broadcast_shapes(jnp.shape(allowed), (1, 1, rows, k_len))
        return jnp.broadcast_to(allowed, shape)

    def _tile_counts(self, q_len, k_len, block_q, block_k):
        """Allowed pairs in every tile: int32 [..., nq, nk]."""
        rows, columns = -(-q_len // block_q), -(-k_len // block_k)
        pad = columns * block_k - k_len
        q_first, k_first = np.arange(rows) * block_q, np.arange(columns) * block_k
        q_last = np.minimum(q_first + block_q, q_len) - 1
        k_last = np.minimum(k_first + block_k, k_len) - 1
        shift = k_len - q_len
        some, every = self.tile(q_first[:, None] + shift, q_last[:, None] + shift, k_first, k_last)

        def strip(i):
            start = jnp.minimum(i * block_q, q_len - min(block_q, q_len))
            allowed = self._strip(q_len, k_len, start, min(block_q, q_len))
            fresh = start + jnp.arange(allowed.shape[2])[:, None] >= i * block_q
            allowed = jnp.pad(allowed & fresh, ((0, 0), (0, 0), (0, 0), (0, pad)))
            tiles = allowed.reshape(*allowed.shape[:3], columns, block_k)
            counts = tiles.sum((2, 4), dtype=jnp.int32)
            return counts.reshape(*_leading(allowed), columns)

        if self.operands:
            return jnp.moveaxis(jax.lax.map(strip, jnp.arange(rows)), 0, -2)
        size = _extent(q_len, block_q)[:, None] * _extent(k_len, block_k)
        some, every = np.broadcast_to(some, size.shape), np.broadcast_to(every, size.shape)
        if (every | ~some).all():
            return np.where(every, size, 0)
        open_rows = np.flatnonzero((some & ~every).any(1))
        strips = jnp.moveaxis(jax.lax.map(strip, open_rows), 0, -2)
        sure = np.broadcast_to(np.where(every, size, 0), (*strips.shape[:-2], rows, columns))
        return jnp.asarray(sure, jnp.int32).at[..., open_rows, :].set(strips)


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


@dataclasses.dataclass(frozen=True)
class _Not:
    predicate: Callable

    def __call__(self, *args):
        return ~self.predicate(*args)

    def tile(self, *ranges):
        some, every = Mask(self.predicate).tile(*ranges)
        return jnp.logical_not(every), jnp.logical_not(some)


def _extent(length: int, block: int) -> np.ndarray:
    """The sizes of the blocks that cut up `length`."""
    first = np.arange(-(-length // block)) * block
    return np.minimum(first + block, length) - first


def _leading(allowed: jax.Array) -> tuple[int, ...]:
    """The shape of the leading axes [B, H] that a pattern depends on."""
    batch, heads = allowed.shape[:2]
    return (batch, heads) if batch > 1 else (heads,) if heads > 1 else ()
