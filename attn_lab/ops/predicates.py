"""What patterns are made of: predicates over positions, with bounds over tiles.

A predicate is a hashable value with the two methods that `Mask` describes.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attn_kernels.attention import Mask


def library(*arrays):
    """NumPy, or jax.numpy if an array is one of JAX: bounds of known ranges stay known in jit."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


@dataclasses.dataclass(frozen=True)
class Window:
    """`i - j <= left` and `j - i <= right`; a negative number is no bound."""

    left: int
    right: int

    @property
    def window(self):
        return self.left, self.right

    def _limit(self, low, high):
        """Whether low <= left and high >= -right, where these are bounds."""
        below = low <= self.left if self.left >= 0 else True
        return (high >= -self.right) & below if self.right >= 0 else below

    def __call__(self, b, h, q_index, k_index):
        back = q_index - k_index
        return jnp.asarray(self._limit(back, back)) & jnp.ones_like(back, bool)

    def tile(self, q_first, q_last, k_first, k_last):
        nearest, farthest = q_first - k_last, q_last - k_first
        return self._limit(nearest, farthest), self._limit(farthest, nearest)


class Band:
    """`low <= j <= high` for the `ends` of a query.

    Both ends never decrease from one query to the next, and windows of neighbours leave no gap.
    """

    def ends(self, i):
        """The first and the last key of query i."""
        raise NotImplementedError

    def __call__(self, b, h, q_index, k_index):
        low, high = self.ends(q_index)
        return (low <= k_index) & (k_index <= high)

    def tile(self, q_first, q_last, k_first, k_last):
        (first_low, first_high), (last_low, last_high) = self.ends(q_first), self.ends(q_last)
        some = (first_low <= k_last) & (k_first <= last_high)
        return some, (last_low <= k_first) & (k_last <= first_high)


@dataclasses.dataclass(frozen=True)
class Offset(Band):
    """`j = i + offset`."""

    offset: int

    def ends(self, i):
        return i + self.offset, i + self.offset


@dataclasses.dataclass(frozen=True)
class Blocks(Band):
    """The block of the query, where blocks begin at `shift`, and `halo` keys on both sides."""

    size: int
    shift: int = 0
    halo: int = 0

    def ends(self, i):
        start = (i - self.shift) // self.size * self.size + self.shift
        return start - self.halo, start + (self.size - 1 + self.halo)


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """The `kernel` nearest keys of a query's leader among those of its residue mod `dilation`."""

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def _ends(self, a, length):
        """The first and the last key of coordinate `a` in a group of `length`."""
        xp = library(a, length)
        step = self.stride - 1 if self.causal else self.stride // 2
        lead = xp.minimum(a // self.stride * self.stride + step, length - 1)
        if self.causal:
            return xp.maximum(lead - (self.kernel - 1), 0), a
        start = xp.minimum(xp.maximum(lead - self.kernel // 2, 0), length - self.kernel)
        return start, start + (self.kernel - 1)

    def __call__(self, b, h, q_index, k_index):
        if self.dilation == 1:
            low, high = self._ends(q_index, self.length)
            return (low <= k_index) & (k_index <= high)
        group = q_index % self.dilation
        size = (self.length - group + self.dilation - 1) // self.dilation
        low, high = self._ends(q_index // self.dilation, size)
        key = k_index // self.dilation
        return (k_index % self.dilation == group) & (low <= key) & (key <= high)

    def tile(self, q_first, q_last, k_first, k_last):
        d = self.dilation
        low, first_high = self._ends(q_first // d, self.length // d)
        last_low, high = self._ends(q_last // d, -(-self.length // d))
        some = (low <= k_last // d) & (k_first // d <= high)
        return some, (last_low <= k_first) & (k_last <= first_high) if d == 1 else False


@dataclasses.dataclass(frozen=True)
class Below:
    """A position is below `count`: that of the key, or that of the query."""

    count: int
    of_query: bool = False

    def __call__(self, b, h, q_index, k_index):
        return (q_index if self.of_query else k_index) < self.count

    def tile(self, q_first, q_last, k_first, k_last):
        first, last = (q_first, q_last) if self.of_query else (k_first, k_last)
        return first < self.count, last < self.count


@dataclasses.dataclass(frozen=True)
class Multiple:
    """`i - j` is a multiple of `stride`."""

    stride: int

    def __call__(self, b, h, q_index, k_index):
        return (q_index - k_index) % self.stride == 0

    def tile(self, q_first, q_last, k_first, k_last):
        return _multiples(q_first - k_last, q_last - k_first, self.stride)


@dataclasses.dataclass(frozen=True)
class LastOfBlock:
    """Keys at the end of a block of `size`."""

    size: int

    def __call__(self, b, h, q_index, k_index):
        return k_index % self.size == self.size - 1

    def tile(self, q_first, q_last, k_first, k_last):
        return _multiples(k_first + 1, k_last + 1, self.size)


def _multiples(low, high, stride):
    some = high // stride * stride >= low
    return some, some & ((low == high) | (stride == 1))


@dataclasses.dataclass(frozen=True)
class PowerOfTwo:
    """The query's block is 1, 2, 4, ... blocks after the key's."""

    block: int = 1

    def __call__(self, b, h, q_index, k_index):
        return _is_power(q_index // self.block - k_index // self.block)

    def tile(self, q_first, q_last, k_first, k_last):
        low = q_first // self.block - k_last // self.block
        high = q_last // self.block - k_first // self.block
        filled = high
        for n in (1, 2, 4, 8, 16):
            filled = filled | filled >> n
        some = (high >= 1) & (filled - (filled >> 1) >= low)
        every = _is_power(low) & ((low == high) | ((low == 1) & (high == 2)))
        return some, every


def _is_power(n):
    return (n > 0) & (n & (n - 1) == 0)


@dataclasses.dataclass(frozen=True)
class Rolled:
    """A predicate on the positions of a sequence that has been rolled back by `shift`."""

    predicate: Callable
    shift: int
    length: int

    def __call__(self, b, h, q_index, k_index):
        i, j = ((x - self.shift) % self.length for x in (q_index, k_index))
        return self.predicate(b, h, i, j)

    def tile(self, q_first, q_last, k_first, k_last):
        q_range, k_range = self._range(q_first, q_last), self._range(k_first, k_last)
        return Mask(self.predicate).tile(*q_range, *k_range)

    def _range(self, first, last):
        """A range that holds the rolled one."""
        low, high = (first - self.shift) % self.length, (last - self.shift) % self.length
        whole, xp = high - low == last - first, library(low, high)
        return xp.where(whole, low, 0), xp.where(whole, high, self.length - 1)


def coordinates(index, shape, tile=()):
    """The coordinates of flat positions, the last fastest; the first is not bounded by `shape`.

    With a `tile`, of an extent along every axis that divides it, tokens are numbered tile by tile.
    """
    if tile:
        return _of_tiles(coordinates(index, _split(shape, tile)), tile)
    steps = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
    return [index // steps[0], *(index // step % n for step, n in zip(steps[1:], shape[1:]))]


def _split(shape, tile):
    """How many tiles there are along every axis, and their extents."""
    return *(n // size for n, size in zip(shape, tile)), *tile


def _of_tiles(split, tile):
    """Coordinates from those of the tile and those within it."""
    return [n * size + x for n, x, size in zip(split, split[len(tile) :], tile)]


@dataclasses.dataclass(frozen=True)
class Product:
    """One predicate for each axis of `shape`, all of which hold; tokens are as in `coordinates`."""

    predicates: tuple[Callable, ...]
    splits: tuple[int, ...]
    shape: tuple[int, ...]
    tile_shape: tuple[int, ...] = ()

    def __call__(self, b, h, q_index, k_index, *operands):
        allowed, at = True, 0
        ends = (coordinates(x, self.shape, self.tile_shape) for x in (q_index, k_index))
        for predicate, count, i, j in zip(self.predicates, self.splits, *ends):
            allowed = allowed & predicate(b, h, i, j, *operands[at : at + count])
            at += count
        return allowed

    def tile(self, q_first, q_last, k_first, k_last):
        some, every = True, True
        boxes = self._box(q_first, q_last), self._box(k_first, k_last)
        for predicate, q_range, k_range in zip(self.predicates, *boxes):
            bounds = Mask(predicate).tile(*q_range, *k_range)
            some, every = some & bounds[0], every & bounds[1]
        return some, every

    def _box(self, first, last):
        """Ranges of coordinates that hold those of a flat range."""
        shape = _split(self.shape, self.tile_shape) if self.tile_shape else self.shape
        xp, box, inner = library(first, last), [], math.prod(shape)
        for n, (low, high) in enumerate(zip(*(coordinates(x, shape) for x in (first, last)))):
            if n:
                whole = first // inner == last // inner
                low, high = xp.where(whole, low, 0), xp.where(whole, high, shape[n] - 1)
            inner //= shape[n]
            box.append((low, high))
        if not self.tile_shape:
            return box
        return list(zip(*(_of_tiles(ends, self.tile_shape) for ends in zip(*box))))


@dataclasses.dataclass(frozen=True)
class Heads:
    """The predicate whose number is the first operand of a head."""

    predicates: tuple[Callable, ...]
    splits: tuple[int, ...]

    def __call__(self, b, h, q_index, k_index, choice, *operands):
        allowed, at = False, 0
        for n, (predicate, count) in enumerate(zip(self.predicates, self.splits)):
            own = predicate(b, h, q_index, k_index, *operands[at : at + count])
            allowed = allowed | ((choice == n) & own)
            at += count
        return allowed

    def tile(self, *ranges):
        some, every = False, True
        for predicate in self.predicates:
            bounds = Mask(predicate).tile(*ranges)
            some, every = some | bounds[0], every & bounds[1]
        return some, every
