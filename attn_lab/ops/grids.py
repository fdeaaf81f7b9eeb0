"""Patterns on grids of tokens: conditions on every axis, and unions of such products.

Tokens are numbered row-major, the last axis fastest; T = S is the number of tokens. Kernels work on
blocks of consecutive tokens: a neighbourhood touches fewer of them if tokens are numbered tile by
tile.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask
from attn_lab.ops.masks import causal_mask, sliding_window_mask
from attn_lab.ops.predicates import Below, Blocks, Multiple, Neighborhood, Product, coordinates

__all__ = [
    "axial_mask",
    "block_local_mask",
    "from_tiles",
    "halo_mask",
    "inward_window_mask",
    "neighborhood_mask",
    "product_mask",
    "radial_mask",
    "shifted_window_mask",
    "to_tiles",
]

Axes = int | Sequence[int]


def to_tiles(x: jax.Array, shape: Axes, tile: Axes) -> jax.Array:
    """Tokens of a grid tile by tile, within a tile and between tiles row-major.

    Args:
      x: `[B, prod(shape), ...]`, numbered row-major.
      shape: the lengths of the axes.
      tile: the extents of a tile, which divide them, one value or one for each axis.

    Returns:
      `[B, prod(shape), ...]`: blocks of `prod(tile)` consecutive tokens are tiles.

    Raises:
      ValueError: if a tile does not divide its axis, or `x` has another number of tokens.
    """
    shape = _shape(shape)
    tile, n = _tile(tile, shape), len(shape)
    split = [size for pair in zip((a // b for a, b in zip(shape, tile)), tile) for size in pair]
    return _reordered(x, split, [*range(0, 2 * n, 2), *range(1, 2 * n, 2)])


def from_tiles(x: jax.Array, shape: Axes, tile: Axes) -> jax.Array:
    """Undoes `to_tiles`, of which it takes the arguments and raises the errors."""
    shape = _shape(shape)
    tile, n = _tile(tile, shape), len(shape)
    split = [*(a // b for a, b in zip(shape, tile)), *tile]
    return _reordered(x, split, [axis for pair in zip(range(n), range(n, 2 * n)) for axis in pair])


def _reordered(x, split, order):
    if x.ndim < 2 or x.shape[1] != math.prod(split):
        raise ValueError(f"x must be [B, {math.prod(split)}, ...], got shape {x.shape}")
    parts = x.reshape(x.shape[0], *split, *x.shape[2:])
    rest = range(1 + len(split), parts.ndim)
    return parts.transpose(0, *(1 + axis for axis in order), *rest).reshape(x.shape)


def product_mask(*masks: Mask, shape: Axes, tile: Axes | None = None) -> Mask:
    """An n-dimensional pattern from one along each axis: `allowed(i, j) = AND_x m_x(i_x, j_x)`.

    Args:
      masks: one `Mask` for each axis, over the coordinates of that axis.
      shape: the lengths of the axes.
      tile: the extents of a tile if tokens are in the order of `to_tiles`.

    Returns:
      A Mask over the `prod(shape)` tokens, numbered row-major or tile by tile.

    Raises:
      ValueError: if there is not one mask for each axis, an operand does not fit its axis, or a
        tile does not divide its axis.
    """
    shape = _shape(shape)
    tile = () if tile is None else _tile(tile, shape)
    if len(masks) != len(shape):
        raise ValueError(f"masks must be one for each axis of {shape}, got {len(masks)}")
    splits = tuple(len(m.operands) for m in masks)
    product = Product(tuple(m.predicate for m in masks), splits, shape, tile)
    operands, axes = [], coordinates(jnp.arange(math.prod(shape)), shape, tile)
    for mask, length, coordinate in zip(masks, shape, axes):
        for x in mask.operands:
            for axis in (2, 3):
                if x.shape[axis] not in (1, length):
                    raise ValueError(f"an operand of shape {x.shape} does not fit length {length}")
                x = jnp.take(x, coordinate, axis) if x.shape[axis] > 1 else x
            operands.append(x)
    return Mask(product, tuple(operands))


def neighborhood_mask(
    shape: Axes,
    kernel: Axes,
    stride: Axes = 1,
    dilation: Axes = 1,
    causal: bool | Sequence[bool] = False,
    tile: Axes | None = None,
) -> Mask:
    """The nearest tokens along every axis; at borders windows move inwards and keep their size.

    On an axis of length L, in the coordinates a, b of i, j among the positions that are equal to i
    mod `dilation`, n in number: `lead = min(a // s * s + s // 2, n - 1)`,
    `start = clip(lead - w // 2, 0, n - w)` and `start <= b < start + w`. On a causal axis
    `lead = min(a // s * s + s - 1, n - 1)` and `max(lead - w + 1, 0) <= b <= a`.

    Args:
      shape: the lengths of the axes.
      kernel: w, at least 2, with `w * dilation <= L`.
      stride: s, from 1 to w; the queries of a group of s share the window of their leader.
      dilation: the distance of the tokens that see each other.
      causal: whether an axis is causal.
        All four are one value, or one for each axis.
      tile: as in `product_mask`.

    Raises:
      ValueError: if a setting is out of its range or not one for each axis, or a tile does not
        divide its axis.

    Source: Hassani et al., NATTEN, 2022, arXiv 2204.07143; dilation 2209.15001; stride 2504.16922.
    """
    shape = _shape(shape)
    settings = dict(kernel=kernel, stride=stride, dilation=dilation, causal=causal)
    rows = [_each(name, value, shape) for name, value in settings.items()]
    for length, w, s, d, _ in zip(shape, *rows):
        if w < 2 or d < 1 or w * d > length:
            raise ValueError(
                f"kernel must be at least 2 and, times dilation, at most the length {length}, "
                f"got kernel {w} with dilation {d}"
            )
        if not 1 <= s <= w:
            raise ValueError(f"stride must be from 1 to the kernel {w}, got {s}")
    axes = [Mask(Neighborhood(*axis)) for axis in zip(shape, *rows)]
    return product_mask(*axes, shape=shape, tile=tile)


def inward_window_mask(shape: Axes, radius: Axes) -> Mask:
    """Windows of a radius around the query that move inwards at borders: a neighbourhood.

    Args:
      shape: the lengths of the axes.
      radius: d of a window of `2 d + 1` tokens, one value or one for each axis; -1 is a whole axis.

    Raises:
      ValueError: if a radius is below -1.

    Source: FreeSwim, 2025.
    """
    shape = _shape(shape)
    radii = _each("radius", radius, shape, least=-1)
    kernels = [n if d < 0 else min(2 * d + 1, n) for n, d in zip(shape, radii)]
    axes = [Mask(Neighborhood(*axis)) for axis in zip(shape, kernels)]
    return product_mask(*axes, shape=shape)


def block_local_mask(shape: Axes, block: Axes) -> Mask:
    """Windows that do not overlap: `i // block == j // block` on every axis.

    Args:
      shape: the lengths of the axes.
      block: the size of a window, one value or one for each axis; the last one may be smaller.

    Source: Liu et al., Swin Transformer, 2021, arXiv 2103.14030.
    """
    return halo_mask(shape, block, 0)


def halo_mask(shape: Axes, block: Axes, halo: Axes) -> Mask:
    """The block of the query and a margin around it: `c b - h <= j < (c + 1) b + h`, `c = i // b`.

    Tokens beyond the borders do not exist: they take no part in the softmax.

    Args:
      shape: the lengths of the axes.
      block: b, the size of a block, one value or one for each axis; the last one may be smaller.
      halo: h, the width of the margin on every side, likewise.

    Raises:
      ValueError: if a block is not positive or a halo negative.

    Source: Vaswani et al., HaloNet, 2021, arXiv 2103.12731.
    """
    shape = _shape(shape)
    blocks, halos = _each("block", block, shape, least=1), _each("halo", halo, shape, least=0)
    axes = [Mask(Blocks(b, 0, h)) for b, h in zip(blocks, halos)]
    return product_mask(*axes, shape=shape)


def shifted_window_mask(shape: Axes, window: Axes, shift: Axes) -> Mask:
    """Windows whose borders are moved: `(i - shift) // window == (j - shift) // window`.

    This is what the cyclic roll with a mask of regions amounts to: nothing wraps around.

    Args:
      shape: the lengths of the axes, multiples of the window.
      window: the size of a window, one value or one for each axis.
      shift: from 0 to `window - 1`, usually `window // 2`, likewise.

    Raises:
      ValueError: if a window does not divide its axis or a shift is out of its range.

    Source: Liu et al., Swin Transformer, 2021, arXiv 2103.14030.
    """
    shape = _shape(shape)
    windows, shifts = _each("window", window, shape, least=1), _each("shift", shift, shape, least=0)
    for length, w, s in zip(shape, windows, shifts):
        if length % w or s >= w:
            raise ValueError(
                f"window must divide the length {length} and shift be less than it, got {w} and {s}"
            )
    axes = [Mask(Blocks(w, s)) for w, s in zip(windows, shifts)]
    return product_mask(*axes, shape=shape)


def axial_mask(shape: Axes, causal: bool = False) -> Mask:
    """The tokens that differ from the query in at most one coordinate.

    Args:
      shape: the lengths of the axes.
      causal: whether to keep only `j <= i`, in the order of the numbers.
    """
    shape = _shape(shape)
    lines = [
        product_mask(*(_anywhere() if m == n else _near(0) for m in range(len(shape))), shape=shape)
        for n in range(len(shape))
    ]
    mask = functools.reduce(operator.or_, lines)
    return mask & causal_mask() if causal else mask


def radial_mask(
    frames: int, tokens: int, decay: float = 0.5, block: int = 128, sink_frame: bool = True
) -> Mask:
    """Video: the window within a frame halves each time that the distance of frames doubles.

    Frames at distance `d <= 1` see each other. At others, with g the number of bits of d and
    `base = 2^bits(tokens) / 2^g`, a token sees those whose number in the frame differs by at most
    `max(decay base, block)`; if `base < block` only where d is a multiple of `floor(block / base)`.

    Args:
      frames: the number of frames.
      tokens: the number of tokens in a frame; they follow each other.
      decay: how fast windows shrink.
      block: the least width of a window.
      sink_frame: whether all see the first frame.

    Raises:
      ValueError: if `frames`, `tokens` or `block` is not positive, or `decay` negative.

    Source: Li et al., Radial Attention, 2025, arXiv 2506.19852.
    """
    if min(frames, tokens, block) < 1 or decay < 0:
        raise ValueError(
            "frames, tokens and block must be at least 1 and decay at least 0, "
            f"got {frames}, {tokens}, {block} and {decay}"
        )
    parts = [(_near(1), _anywhere())]
    if sink_frame:
        parts.append((Mask(Below(1)), _anywhere()))
    for bits in range(2, (frames - 1).bit_length() + 1):
        base = 2.0 ** (tokens.bit_length() - bits)
        distance = _near(2**bits - 1) & ~_near(2 ** (bits - 1) - 1)
        if base < block:
            distance = distance & Mask(Multiple(int(block / base)))
        parts.append((distance, _near(math.floor(max(decay * base, block)))))
    products = [product_mask(*part, shape=(frames, tokens)) for part in parts]
    return functools.reduce(operator.or_, products)


def _near(distance: int) -> Mask:
    return sliding_window_mask(distance, distance)


def _anywhere() -> Mask:
    return sliding_window_mask(-1, -1)


def _shape(shape: Axes) -> tuple[int, ...]:
    shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must be the lengths of the axes, at least 1 each, got {shape}")
    return shape


def _tile(tile: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    tile = _each("tile", tile, shape, least=1)
    if any(n % size for n, size in zip(shape, tile)):
        raise ValueError(f"tile must divide the axes {shape}, got {tile}")
    return tile


def _each(name: str, value, shape: tuple[int, ...], least: int | None = None) -> tuple[int, ...]:
    """`value`, or one for each axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(shape)
    if len(values) != len(shape) or (least is not None and min(values) < least):
        at_least = "" if least is None else f" of at least {least}"
        raise ValueError(
            f"{name} must be one value{at_least}, or one for each axis of {shape}, got {value!r}"
        )
    return values
