"""Blocks of the arrays of a head, and what kernels make of its gates."""

import triton
import triton.language as tl

from attn_kernels.recurrence import decay

SIZE = 64  # steps of a chunk
FORGOTTEN = tl.constexpr(decay.FORGOTTEN)


def padded(channels: int) -> int:
    """The channels that a program has for so many: tensor cores take 16 or more."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def tile(ref, row, stride, col, T: tl.constexpr, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """`[N, M]` from a row and a column on, 0 outside of `[T, D]`; rows are `stride` apart."""
    rows = tl.arange(0, N)
    cols = col + tl.arange(0, M)
    at = ref + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    if T % N == 0:
        if D % M == 0:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(cols < D)[None, :], other=0.0)
    elif D % M == 0:
        x = tl.load(at, mask=(row + rows < T)[:, None], other=0.0)
    else:
        x = tl.load(at, mask=(row + rows < T)[:, None] & (cols < D)[None, :], other=0.0)
    return x


@triton.jit
def put(
    ref, x, row, stride, col, T: tl.constexpr, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr
):
    """The inverse of `tile`."""
    rows = tl.arange(0, N)
    cols = col + tl.arange(0, M)
    at = ref + tl.cast(row, tl.int64) * stride + rows[:, None] * stride + cols[None, :]
    x = x.to(ref.dtype.element_ty)
    if T % N == 0:
        if D % M == 0:
            tl.store(at, x)
        else:
            tl.store(at, x, mask=(cols < D)[None, :])
    elif D % M == 0:
        tl.store(at, x, mask=(row + rows < T)[:, None])
    else:
        tl.store(at, x, mask=(row + rows < T)[:, None] & (cols < D)[None, :])


@triton.jit
def vector(ref, row, stride, T: tl.constexpr, C: tl.constexpr):
    """`[C]` from a row on, 0 beyond T; rows are `stride` apart."""
    rows = row + tl.arange(0, C)
    return tl.load(ref + tl.cast(rows, tl.int64) * stride, mask=rows < T, other=0.0)


@triton.jit
def put_vector(ref, x, row, stride, T: tl.constexpr, C: tl.constexpr):
    """The inverse of `vector`."""
    rows = row + tl.arange(0, C)
    tl.store(ref + tl.cast(rows, tl.int64) * stride, x, mask=rows < T)


@triton.jit
def sums_of_gates(ref, row, stride, T: tl.constexpr, C: tl.constexpr):
    """b of a chunk."""
    return tl.cumsum(tl.maximum(vector(ref, row, stride, T, C), FORGOTTEN), 0)


@triton.jit
def decay_between(b, C: tl.constexpr):
    """exp(b_t - b_s) for s <= t, else 0."""
    t = tl.arange(0, C)
    seen = t[:, None] >= t[None, :]
    return tl.where(seen, tl.exp(tl.where(seen, b[:, None] - b[None, :], 0.0)), 0.0)


@triton.jit
def last_of(b, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, b, 0.0), 0)


@triton.jit
def at_head(ref, b, h, T: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """Where an array `[B, T, HEADS, D]` has the first step of a head of H."""
    return ref + (b * T * HEADS + h // (H // HEADS)) * D


@triton.jit
def _exp_less_1(x):
    """`exp(x) - 1` for -0.5 <= x <= 0.5, where the difference of the two would lose digits."""
    total = 1.0 + x * (1.0 / 9)
    total = 1.0 + x * (1.0 / 8) * total
    total = 1.0 + x * (1.0 / 7) * total
    total = 1.0 + x * (1.0 / 6) * total
    total = 1.0 + x * (1.0 / 5) * total
    total = 1.0 + x * (1.0 / 4) * total
    total = 1.0 + x * (1.0 / 3) * total
    total = 1.0 + x * (1.0 / 2) * total
    return x * total


@triton.jit
def fade(gate):
    """`exp(gate)` as two numbers to be added once they are multiplied, as in `decay.decayed`."""
    tiny = (gate > -0.5) & (gate < 0.5)
    kept = tl.where(tiny, 1.0, tl.exp(gate))
    return kept, tl.where(tiny, _exp_less_1(tl.where(tiny, gate, 0.0)), 0.0)
