"""A head from chunk to chunk, its state or the cotangent of it in registers.

With the names of `chunked`, T = (I + strictly_lower(beta A(k)))^-1, and S' the cotangent of the
state behind a chunk,

    v' = v, or T beta (v - (k exp(b)) S) for the delta rule
    o  = scale ((q exp(b)) S + A(q) v')
    S <- exp(b_C) S + (k exp(b_C - b))^T v'

    x  = dv', or T^T dv' for the delta rule, where dv' = scale A(q)^T do + (k exp(b_C - b)) S'
    S' <- exp(b_C) S' + scale (q exp(b))^T do, less (k exp(b))^T beta x for the delta rule

A program has all channels of the keys and a block of those of the values, which are independent.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from attn_kernels import gpu
from attn_kernels.recurrence.triton.call import launch
from attn_kernels.recurrence.triton.tiles import (
    SIZE,
    at_head,
    decay_between,
    last_of,
    padded,
    put,
    sums_of_gates,
    tile,
    vector,
)

# Of a program, by how many channels keys have at most: channels of values, warps, and chunks being
# loaded, in `walk` and in `walk_back`.
HOPPER = {64: (64, 4, 3, 3), 128: (128, 8, 3, 3), 256: (64, 4, 1, 2), 512: (16, 8, 1, 1)}
HOPPER_GATED = HOPPER | {128: (64, 4, 2, 2)}  # a gate a head takes registers
OTHERS = {64: (64, 4, 2, 2), 128: (64, 8, 2, 2), 256: (32, 8, 2, 2), 512: (16, 8, 1, 1)}
# Up to so many channels of keys, Hopper GPUs have states transposed: their products take them from
# registers, where a program of few warps has no place for more.
FLIPPED = 256


def blocks(dim: int, gates) -> tuple[int, int, int, int]:
    """What a program has, as in the tables; `gates` is None without a gate a head."""
    hopper = HOPPER if gates is None else HOPPER_GATED
    return (hopper if gpu.hopper() else OTHERS)[max(64, padded(dim))]


def walk(
    q,
    k,
    v,
    state,
    *,
    inverse=None,
    beta=None,
    gates=None,
    weights=None,
    totals=None,
    scale: float = 1.0,
    outputs: bool = True,
    keep: bool = False,
):
    """The recurrence from chunk to chunk.

    Arrays of steps may have fewer heads than H, which they divide. With `totals`, the decays are
    per channel and in the arrays already: q is `scale q exp(b)`, k is `k exp(b_C - b)`.

    Args:
      q, k: `[B, T, heads, D]`; q is None where no outputs are wanted.
      v: `[B, T, heads, Dv]`; None is 0.
      state: `[B, H, D, Dv]`, float32.
      inverse: T, `[B, T, heads, C]`, for the delta rule.
      beta: `[B, T, heads]`, float32, likewise.
      gates: log decays `[B, T, heads]`, float32.
      weights: `scale A(q)`, `[B, T, heads, C]`; None computes them.
      totals: `exp(b_C)`, `[B, N, heads, D]`, float32.
      scale: of the outputs.
      outputs: whether they are wanted.
      keep: whether what the derivative needs is wanted.

    Returns:
      The outputs `[B, T, H, Dv]`, the last state, and with `keep` the states before the N chunks
      `[B, N, H, D, Dv]` and, with beta, v' `[B, T, H, Dv]`; None for what is not wanted.
    """
    batch, heads, dim, width = state.shape
    length = k.shape[1]
    count = -(-length // SIZE)
    block, warps, stages, _ = blocks(dim, gates)
    block = min(block, padded(width))
    steps = jax.ShapeDtypeStruct((batch, length, heads, width), k.dtype)
    states = jax.ShapeDtypeStruct((batch, count, heads, dim, width), k.dtype)
    return launch(
        _walk,
        (q if outputs else None, k, v, inverse, beta, gates, weights, totals, state),
        (
            steps if outputs else None,
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            states if keep else None,
            steps if keep and beta is not None else None,
        ),
        (heads, -(-width // block)),
        warps=warps,
        stages=stages,
        READ=outputs,
        WRITE=v is not None,
        KEEP=keep,
        **_constants(
            (length, heads, dim, width, block),
            dict(Q=q, K=k, V=v, B=beta, T=inverse, G=gates, A=weights, E=totals),
            scale,
        ),
    )


def walk_back(
    q,
    k,
    d_out,
    d_last,
    *,
    inverse=None,
    beta=None,
    gates=None,
    weights=None,
    totals=None,
    scale: float = 1.0,
    keep: bool = True,
    shared: bool = False,
):
    """The cotangents of states, from the last chunk to the first.

    Args:
      q, k, inverse, beta, gates, weights, totals, scale: as of `walk`.
      d_out: `[B, T, H, Dv]`.
      d_last: `[B, H, D, Dv]`, float32.
      keep: whether more than the cotangent of the first state is wanted.
      shared: whether x is to be summed over heads: it is in float32 then.

    Returns:
      x `[B, T, H, Dv]` (the cotangent of v, without beta), that of the first state, and those of
      the states behind all chunks `[B, N, H, D, Dv]`; None for what is not wanted.
    """
    batch, heads, dim, width = d_last.shape
    length = k.shape[1]
    count = -(-length // SIZE)
    block, warps, _, stages = blocks(dim, gates)
    block = min(block, padded(width))
    dtype = jnp.float32 if shared else k.dtype
    steps = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    states = jax.ShapeDtypeStruct((batch, count, heads, dim, width), k.dtype)
    return launch(
        _walk_back,
        (q, k, d_out, inverse, beta, gates, weights, totals, d_last),
        (
            steps if keep else None,
            jax.ShapeDtypeStruct(d_last.shape, jnp.float32),
            states if keep else None,
        ),
        (heads, -(-width // block)),
        warps=warps,
        stages=stages,
        KEEP=keep,
        **_constants(
            (length, heads, dim, width, block),
            dict(Q=q, K=k, V=d_out, B=beta, T=inverse, G=gates, A=weights, E=totals),
            scale,
        ),
    )


def _constants(sizes, arrays, scale):
    length, heads, dim, width, block = sizes
    return dict(
        {f"H{name}": heads if x is None else x.shape[2] for name, x in arrays.items()},
        T=length,
        H=heads,
        D=dim,
        DV=width,
        C=SIZE,
        BD=padded(dim),
        BV=block,
        SCALE=scale,
        DELTA=arrays["B"] is not None,
        GATED=arrays["G"] is not None,
        WEIGHTED=arrays["A"] is not None,
        PER_CHANNEL=arrays["E"] is not None,
        FLIP=gpu.hopper() and padded(dim) <= FLIPPED,
    )


@triton.jit
def oriented(x, FLIP: tl.constexpr):
    """What has channels of values, with them on its first axis if flipped, and back."""
    if FLIP:
        x = tl.trans(x)
    return x


@triton.jit
def along(x, FLIP: tl.constexpr):
    """A vector beside the channels of values."""
    if FLIP:
        x = x[None, :]
    else:
        x = x[:, None]
    return x


@triton.jit
def product(a, x, acc, FLIP: tl.constexpr):
    """`a x`, added to acc if there is one, for an oriented x."""
    if FLIP:
        x = tl.dot(x, tl.trans(a), acc)
    else:
        x = tl.dot(a, x, acc)
    return x


@triton.jit
def _walk(
    q_ref,
    k_ref,
    v_ref,
    inverse_ref,
    beta_ref,
    gates_ref,
    weights_ref,
    totals_ref,
    first_ref,
    out_ref,
    last_ref,
    states_ref,
    written_ref,
    T: tl.constexpr,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    HB: tl.constexpr,
    HT: tl.constexpr,
    HG: tl.constexpr,
    HA: tl.constexpr,
    HE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
    DELTA: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    FLIP: tl.constexpr,
):
    N: tl.constexpr = (T + C - 1) // C
    dtype = k_ref.dtype.element_ty
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.program_id(0) % H
    col = tl.program_id(1) * BV
    k_ref = at_head(k_ref, b, h, T, H, HK, D)
    if READ:
        q_ref = at_head(q_ref, b, h, T, H, HQ, D)
        out_ref = at_head(out_ref, b, h, T, H, H, DV)
    if WRITE:
        v_ref = at_head(v_ref, b, h, T, H, HV, DV)
    if DELTA:
        inverse_ref = at_head(inverse_ref, b, h, T, H, HT, C)
        beta_ref = at_head(beta_ref, b, h, T, H, HB, 1)
    if GATED:
        gates_ref = at_head(gates_ref, b, h, T, H, HG, 1)
    if WEIGHTED:
        weights_ref = at_head(weights_ref, b, h, T, H, HA, C)
    if PER_CHANNEL:
        totals_ref = at_head(totals_ref, b, h, N, H, HE, D)
    if KEEP:
        states_ref = at_head(states_ref, b, h, N, H, H, D * DV)
        written_ref = at_head(written_ref, b, h, T, H, H, DV)
    place = (b * H + h) * D * DV
    state = oriented(tile(first_ref + place, 0, DV, col, D, DV, BD, BV), FLIP)

    for n in range(0, N):
        row = n * C
        narrow = state.to(dtype)
        if KEEP:
            at = states_ref + tl.cast(n, tl.int64) * H * D * DV
            put(at, oriented(narrow, FLIP), 0, DV, col, D, DV, BD, BV)
        k = tile(k_ref, row, HK * D, 0, T, D, C, BD)
        if GATED:
            sums = sums_of_gates(gates_ref, row, HG, T, C)
            total = last_of(sums, C)
        if READ:
            q = tile(q_ref, row, HQ * D, 0, T, D, C, BD)
            if WEIGHTED:
                pairs = tile(weights_ref, row, HA * C, 0, T, C, C, C)
            else:
                pairs = tl.dot(q, tl.trans(k)) * SCALE
                if GATED:
                    pairs *= decay_between(sums, C)
                t = tl.arange(0, C)
                pairs = tl.where(t[:, None] >= t[None, :], pairs, 0.0).to(dtype)
        if WRITE:
            v = oriented(tile(v_ref, row, HV * DV, col, T, DV, C, BV), FLIP)
        else:
            v = oriented(tl.zeros([C, BV], dtype), FLIP)
        if DELTA:
            inverse = tile(inverse_ref, row, HT * C, 0, T, C, C, C)
            beta = vector(beta_ref, row, HB, T, C)
            known = product(k, narrow, None, FLIP)
            if GATED:
                known *= along(tl.exp(sums), FLIP)
            v = ((v.to(tl.float32) - known) * along(beta, FLIP)).to(dtype)
            v = product(inverse, v, None, FLIP).to(dtype)
            if KEEP:
                put(written_ref, oriented(v, FLIP), row, H * DV, col, T, DV, C, BV)
        if READ:
            out = product(q, narrow, None, FLIP) * SCALE
            if GATED:
                out *= along(tl.exp(sums), FLIP)
            out = product(pairs, v, out, FLIP)
            put(out_ref, oriented(out, FLIP), row, H * DV, col, T, DV, C, BV)
        if GATED:
            v = (v.to(tl.float32) * along(tl.exp(total - sums), FLIP)).to(dtype)
            state *= tl.exp(total)
        if PER_CHANNEL:
            d = tl.arange(0, BD)
            kept = tl.load(totals_ref + tl.cast(n, tl.int64) * HE * D + d, mask=d < D, other=0.0)
            state *= along(kept, FLIP)
        state = product(tl.trans(k), v, state, FLIP)

    put(last_ref + place, oriented(state, FLIP), 0, DV, col, D, DV, BD, BV)


@triton.jit
def _walk_back(
    q_ref,
    k_ref,
    do_ref,
    inverse_ref,
    beta_ref,
    gates_ref,
    weights_ref,
    totals_ref,
    d_last_ref,
    dv_ref,
    d_first_ref,
    d_states_ref,
    T: tl.constexpr,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    HB: tl.constexpr,
    HT: tl.constexpr,
    HG: tl.constexpr,
    HA: tl.constexpr,
    HE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    KEEP: tl.constexpr,
    DELTA: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    FLIP: tl.constexpr,
):
    N: tl.constexpr = (T + C - 1) // C
    dtype = k_ref.dtype.element_ty
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.program_id(0) % H
    col = tl.program_id(1) * BV
    q_ref = at_head(q_ref, b, h, T, H, HQ, D)
    k_ref = at_head(k_ref, b, h, T, H, HK, D)
    do_ref = at_head(do_ref, b, h, T, H, HV, DV)
    if DELTA:
        inverse_ref = at_head(inverse_ref, b, h, T, H, HT, C)
        beta_ref = at_head(beta_ref, b, h, T, H, HB, 1)
    if GATED:
        gates_ref = at_head(gates_ref, b, h, T, H, HG, 1)
    if WEIGHTED:
        weights_ref = at_head(weights_ref, b, h, T, H, HA, C)
    if PER_CHANNEL:
        totals_ref = at_head(totals_ref, b, h, N, H, HE, D)
    if KEEP:
        dv_ref = at_head(dv_ref, b, h, T, H, H, DV)
        d_states_ref = at_head(d_states_ref, b, h, N, H, H, D * DV)
    place = (b * H + h) * D * DV
    d_state = oriented(tile(d_last_ref + place, 0, DV, col, D, DV, BD, BV), FLIP)

    for m in range(0, N):
        n = N - 1 - m
        row = n * C
        if KEEP or DELTA:
            narrow = d_state.to(dtype)
        if KEEP:
            at = d_states_ref + tl.cast(n, tl.int64) * H * D * DV
            put(at, oriented(narrow, FLIP), 0, DV, col, D, DV, BD, BV)
        q = tile(q_ref, row, HQ * D, 0, T, D, C, BD)
        do = oriented(tile(do_ref, row, HV * DV, col, T, DV, C, BV), FLIP)
        if GATED:
            sums = sums_of_gates(gates_ref, row, HG, T, C)
            total = last_of(sums, C)
        if KEEP or DELTA:
            k = tile(k_ref, row, HK * D, 0, T, D, C, BD)
            dv = product(k, narrow, None, FLIP)
            if GATED:
                dv *= along(tl.exp(total - sums), FLIP)
            if WEIGHTED:
                pairs = tile(weights_ref, row, HA * C, 0, T, C, C, C)
            else:
                pairs = tl.dot(q, tl.trans(k)) * SCALE
                if GATED:
                    pairs *= decay_between(sums, C)
                t = tl.arange(0, C)
                pairs = tl.where(t[:, None] >= t[None, :], pairs, 0.0).to(dtype)
            dv = product(tl.trans(pairs), do, dv, FLIP)
            if DELTA:
                inverse = tile(inverse_ref, row, HT * C, 0, T, C, C, C)
                dv = product(tl.trans(inverse), dv.to(dtype), None, FLIP).to(dtype)
            if KEEP:
                put(dv_ref, oriented(dv, FLIP), row, H * DV, col, T, DV, C, BV)
        if GATED:
            do = (do.to(tl.float32) * along(tl.exp(sums) * SCALE, FLIP)).to(dtype)
            d_state *= tl.exp(total)
        elif SCALE != 1.0:
            do = (do.to(tl.float32) * SCALE).to(dtype)
        if PER_CHANNEL:
            d = tl.arange(0, BD)
            kept = tl.load(totals_ref + tl.cast(n, tl.int64) * HE * D + d, mask=d < D, other=0.0)
            d_state *= along(kept, FLIP)
        d_state = product(tl.trans(q), do, d_state, FLIP)
        if DELTA:
            strength = -vector(beta_ref, row, HB, T, C)
            if GATED:
                strength *= tl.exp(sums)
            dv = (dv.to(tl.float32) * along(strength, FLIP)).to(dtype)
            d_state = product(tl.trans(k), dv, d_state, FLIP)

    put(d_first_ref + place, oriented(d_state, FLIP), 0, DV, col, D, DV, BD, BV)
