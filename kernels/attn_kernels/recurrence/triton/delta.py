"""What a chunk needs alone: before the states are known, and after, for the derivatives.

The equations are those of `walk`. With W = exp(b_t - b_s) for s <= t,

    dq = scale (exp(b) do S^T + (do v'^T W) k)
    dk = scale (do v'^T W)^T q + exp(b_C - b) v' S'^T - beta exp(b) x S^T + (P + P^T) k
    dv = beta x
    dbeta = x v - exp(b) (x S^T) k - strictly_lower(x v'^T W) (k k^T)

where P = -strictly_lower(beta x v'^T W); without the delta rule the terms of x are not there. A
gate is in the weights of all pairs around it, and in what the state passes through it.
"""

import jax
import triton
import triton.language as tl

from attn_kernels.recurrence.triton.call import launch, slope_dtype
from attn_kernels.recurrence.triton.tiles import (
    FORGOTTEN,
    SIZE,
    at_head,
    decay_between,
    last_of,
    padded,
    put,
    put_vector,
    sums_of_gates,
    tile,
    vector,
)

# Channels of keys (and of values) at a time, warps, and blocks being loaded.
PREPARE = (64, 4, 2)
LOCAL = (32, 128, 4, 2)
LOCAL_GATED = (32, 128, 4, 3)
LOCAL_WIDE = (64, 64, 4, 2)  # of more channels of values than these have
BASE = 8  # steps whose inverse is found row by row
PRECISION = tl.constexpr("tf32")  # of the products of inverses


def prepare(q, k, beta, gates, heads: int, scale: float):
    """`T = (I + strictly_lower(beta A(k)))^-1` and `scale A(q)` of every chunk.

    Args:
      q, k: `[B, T, heads, D]`, whose heads divide H.
      beta: `[B, T, heads]`, float32.
      gates: log decays `[B, T, heads]`, float32, or None.
      heads: H.
      scale: a number.

    Returns:
      Twice `[B, T, H, C]`, row t of a chunk at its step.
    """
    batch, length, _, dim = k.shape
    dims, warps, stages = PREPARE
    square = jax.ShapeDtypeStruct((batch, length, heads, SIZE), k.dtype)
    return launch(
        _prepare,
        (q, k, beta, gates),
        (square, square),
        (heads, -(-length // SIZE)),
        warps=warps,
        stages=stages,
        T=length,
        H=heads,
        HQ=q.shape[2],
        HK=k.shape[2],
        HB=beta.shape[2],
        HG=heads if gates is None else gates.shape[2],
        D=dim,
        C=SIZE,
        BD=min(dims, padded(dim)),
        BASE=BASE,
        SCALE=scale,
        GATED=gates is not None,
    )


def local(q, k, v, beta, gates, weights, d_out, states, d_states, written, x, scale):
    """The derivatives that a chunk has once the states around it and their cotangents are known.

    Args:
      q, k, v, beta, gates, weights: as of `walk`; v, beta and weights are None without the delta
        rule.
      d_out: `[B, T, H, Dv]`.
      states: before the chunks, `[B, N, H, D, Dv]`.
      d_states: their cotangents behind the chunks.
      written: v', `[B, T, heads, Dv]`.
      x: of `walk_back`, `[B, T, H, Dv]`, None without the delta rule.
      scale: a number.

    Returns:
      The derivatives of q, k, v, beta and the gates, with H heads each, in `slope_dtype`; None
      for what is None.
    """
    batch, _, heads, dim, width = states.shape
    length = k.shape[1]
    blocks = LOCAL if gates is None else LOCAL_GATED
    dims, widths, warps, stages = blocks if width <= blocks[1] else LOCAL_WIDE
    steps = batch, length, heads

    def of(x, *shape):
        return x if x is None else jax.ShapeDtypeStruct((*steps, *shape), slope_dtype(x, heads))

    def count(x):
        return heads if x is None else x.shape[2]

    return launch(
        _local,
        (q, k, v, beta, gates, weights, d_out, states, d_states, written, x),
        (
            of(q, dim),
            of(k, dim),
            of(v, width),
            of(beta),
            of(gates),
        ),
        (heads, -(-length // SIZE)),
        warps=warps,
        stages=stages,
        T=length,
        H=heads,
        HQ=count(q),
        HK=count(k),
        HV=count(v),
        HB=count(beta),
        HG=count(gates),
        HA=count(weights),
        HU=count(written),
        D=dim,
        DV=width,
        C=SIZE,
        BD=min(dims, padded(dim)),
        BV=min(widths, padded(width)),
        SCALE=scale,
        DELTA=beta is not None,
        GATED=gates is not None,
    )


@triton.jit
def unit_lower_inverse(a, C: tl.constexpr, BASE: tl.constexpr):
    """`(I + a)^-1` for a strictly lower `[C, C]`.

    Blocks on the diagonal by rows; with X their inverses and G = X (a without them), which as many
    blocks make nilpotent, the inverse is (I - G) (I + G^2) (I + G^4) ... X.
    """
    R: tl.constexpr = C // BASE
    blocks = tl.reshape(a, [R, BASE, R, BASE])
    r = tl.arange(0, R)
    same = (r[:, None] == r[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(same, blocks, 0.0), 2)
    i = tl.arange(0, BASE)
    x = tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, tl.zeros([R, BASE, BASE], tl.float32))
    for n in range(1, BASE):
        at_row = (i == n)[None, :, None]
        row = tl.sum(tl.where(at_row, blocks, 0.0), 1)
        found = tl.sum(row[:, :, None] * x, 1)
        x = tl.where(at_row, x - found[:, None, :], x)
    x = tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [C, C])
    t = tl.arange(0, C)
    below = tl.where((t // BASE)[:, None] > (t // BASE)[None, :], a, 0.0)
    power = tl.dot(x, below, input_precision=PRECISION)
    found = tl.where(t[:, None] == t[None, :], 1.0, 0.0) - power
    power = tl.dot(power, power, input_precision=PRECISION)
    found += tl.dot(found, power, input_precision=PRECISION)
    if R > 4:
        power = tl.dot(power, power, input_precision=PRECISION)
        found += tl.dot(found, power, input_precision=PRECISION)
    return tl.dot(found, x, input_precision=PRECISION)


@triton.jit
def _prepare(
    q_ref,
    k_ref,
    beta_ref,
    gates_ref,
    inverse_ref,
    weights_ref,
    T: tl.constexpr,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HB: tl.constexpr,
    HG: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BASE: tl.constexpr,
    SCALE: tl.constexpr,
    GATED: tl.constexpr,
):
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.program_id(0) % H
    row = tl.program_id(1) * C
    q_ref = at_head(q_ref, b, h, T, H, HQ, D)
    k_ref = at_head(k_ref, b, h, T, H, HK, D)
    beta = vector(at_head(beta_ref, b, h, T, H, HB, 1), row, HB, T, C)
    squares = tl.zeros([C, C], tl.float32)
    pairs = tl.zeros([C, C], tl.float32)
    for col in range(0, D, BD):
        k = tile(k_ref, row, HK * D, col, T, D, C, BD)
        squares = tl.dot(k, tl.trans(k), squares)
        q = tile(q_ref, row, HQ * D, col, T, D, C, BD)
        pairs = tl.dot(q, tl.trans(k), pairs)
    pairs *= SCALE
    squares *= beta[:, None]
    if GATED:
        sums = sums_of_gates(at_head(gates_ref, b, h, T, H, HG, 1), row, HG, T, C)
        between = decay_between(sums, C)
        pairs *= between
        squares *= between
    t = tl.arange(0, C)
    pairs = tl.where(t[:, None] >= t[None, :], pairs, 0.0)
    put(at_head(weights_ref, b, h, T, H, H, C), pairs, row, H * C, 0, T, C, C, C)
    inverse = unit_lower_inverse(tl.where(t[:, None] > t[None, :], squares, 0.0), C, BASE)
    put(at_head(inverse_ref, b, h, T, H, H, C), inverse, row, H * C, 0, T, C, C, C)


@triton.jit
def _local(
    q_ref,
    k_ref,
    v_ref,
    beta_ref,
    gates_ref,
    weights_ref,
    do_ref,
    states_ref,
    d_states_ref,
    written_ref,
    x_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dbeta_ref,
    dgates_ref,
    T: tl.constexpr,
    H: tl.constexpr,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    HB: tl.constexpr,
    HG: tl.constexpr,
    HA: tl.constexpr,
    HU: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    SCALE: tl.constexpr,
    DELTA: tl.constexpr,
    GATED: tl.constexpr,
):
    N: tl.constexpr = (T + C - 1) // C
    WHOLE: tl.constexpr = DV <= BV  # what has channels of values is read once
    dtype = k_ref.dtype.element_ty
    b = tl.cast(tl.program_id(0) // H, tl.int64)
    h = tl.program_id(0) % H
    row = tl.program_id(1) * C
    q_ref = at_head(q_ref, b, h, T, H, HQ, D)
    k_ref = at_head(k_ref, b, h, T, H, HK, D)
    do_ref = at_head(do_ref, b, h, T, H, H, DV)
    dq_ref = at_head(dq_ref, b, h, T, H, H, D)
    dk_ref = at_head(dk_ref, b, h, T, H, H, D)
    written_ref = at_head(written_ref, b, h, T, H, HU, DV)
    place = ((b * N + tl.program_id(1)) * H + h) * D * DV
    states_ref += place
    d_states_ref += place
    t = tl.arange(0, C)
    if DELTA:
        v_ref = at_head(v_ref, b, h, T, H, HV, DV)
        dv_ref = at_head(dv_ref, b, h, T, H, H, DV)
        x_ref = at_head(x_ref, b, h, T, H, H, DV)
        beta = vector(at_head(beta_ref, b, h, T, H, HB, 1), row, HB, T, C)
        d_beta = tl.zeros([C], tl.float32)
        erased = tl.zeros([C, C], tl.float32)

    if WHOLE:
        do = tile(do_ref, row, H * DV, 0, T, DV, C, BV)
        written = tile(written_ref, row, HU * DV, 0, T, DV, C, BV)
        if DELTA:
            x = tile(x_ref, row, H * DV, 0, T, DV, C, BV)
    read = tl.zeros([C, C], tl.float32)
    for col in range(0, DV, BV):
        if not WHOLE:
            do = tile(do_ref, row, H * DV, col, T, DV, C, BV)
            written = tile(written_ref, row, HU * DV, col, T, DV, C, BV)
        read = tl.dot(do, tl.trans(written), read)
        if DELTA:
            if not WHOLE:
                x = tile(x_ref, row, H * DV, col, T, DV, C, BV)
            erased = tl.dot(x, tl.trans(written), erased)
            v = tile(v_ref, row, HV * DV, col, T, DV, C, BV)
            d_beta += tl.sum(x.to(tl.float32) * v.to(tl.float32), 1)
            dv = x.to(tl.float32) * beta[:, None]
            put(dv_ref, dv, row, H * DV, col, T, DV, C, BV)

    if GATED:
        sums = sums_of_gates(at_head(gates_ref, b, h, T, H, HG, 1), row, HG, T, C)
        total = last_of(sums, C)
        carried = tl.exp(sums)
        kept = tl.exp(total - sums)
        by_state = tl.zeros([C], tl.float32)
        inner = tl.zeros([BD], tl.float32)
        if DELTA:
            weights = at_head(weights_ref, b, h, T, H, HA, C)
            products = read * tile(weights, row, HA * C, 0, T, C, C, C).to(tl.float32)
        between = decay_between(sums, C)
        read *= between
        if DELTA:
            erased *= between
    read = tl.where(t[:, None] >= t[None, :], read * SCALE, 0.0).to(dtype)
    if DELTA:
        erased = tl.where(t[:, None] > t[None, :], -erased, 0.0).to(dtype)
        squares = tl.zeros([C, C], tl.float32)
        for col in range(0, D, BD):
            k = tile(k_ref, row, HK * D, col, T, D, C, BD)
            squares = tl.dot(k, tl.trans(k), squares)
        squares *= erased.to(tl.float32)
        d_beta += tl.sum(squares, 1)
        if GATED:
            products += squares * beta[:, None]
    elif GATED:
        products = tl.zeros([C, C], tl.float32)
        for col in range(0, D, BD):
            q = tile(q_ref, row, HQ * D, col, T, D, C, BD)
            k = tile(k_ref, row, HK * D, col, T, D, C, BD)
            products = tl.dot(q, tl.trans(k), products)
        products *= read.to(tl.float32)
    if GATED:
        products = tl.where(t[:, None] > t[None, :], products, 0.0)
        by_step = tl.sum(products, 1) - tl.sum(products, 0)
    if DELTA:
        erased = (erased.to(tl.float32) * beta[:, None]).to(dtype)
        erased += tl.trans(erased)
        strength = beta
        if GATED:
            strength = beta * carried

    for i in range(0, D, BD):
        dq = tl.zeros([C, BD], tl.float32)
        dk = tl.zeros([C, BD], tl.float32)
        y = tl.zeros([C, BD], tl.float32)
        for col in range(0, DV, BV):
            if not WHOLE:
                do = tile(do_ref, row, H * DV, col, T, DV, C, BV)
                written = tile(written_ref, row, HU * DV, col, T, DV, C, BV)
            state = tile(states_ref, i, DV, col, D, DV, BD, BV)
            d_state = tile(d_states_ref, i, DV, col, D, DV, BD, BV)
            dq = tl.dot(do, tl.trans(state), dq)
            dk = tl.dot(written, tl.trans(d_state), dk)
            if DELTA:
                if not WHOLE:
                    x = tile(x_ref, row, H * DV, col, T, DV, C, BV)
                y = tl.dot(x, tl.trans(state), y)
            if GATED:
                inner += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        q = tile(q_ref, row, HQ * D, i, T, D, C, BD)
        k = tile(k_ref, row, HK * D, i, T, D, C, BD)
        dq *= SCALE
        if GATED:
            dq *= carried[:, None]
            dk *= kept[:, None]
            by_step += tl.sum(dq * q.to(tl.float32), 1)
            by_state += tl.sum(dk * k.to(tl.float32), 1)
        if DELTA:
            by_key = tl.sum(y * k.to(tl.float32), 1)
            if GATED:
                by_step -= by_key * strength
                d_beta -= by_key * carried
            else:
                d_beta -= by_key
            dk -= y * strength[:, None]
            dk = tl.dot(erased, k, dk)
        dq = tl.dot(read, k, dq)
        dk = tl.dot(tl.trans(read), q, dk)
        put(dq_ref, dq, row, H * D, i, T, D, C, BD)
        put(dk_ref, dk, row, H * D, i, T, D, C, BD)

    if DELTA:
        put_vector(at_head(dbeta_ref, b, h, T, H, H, 1), d_beta, row, H, T, C)
    if GATED:
        found = tl.sum(tl.where(t[:, None] >= t[None, :], by_step[:, None], by_state[:, None]), 0)
        found += tl.sum(inner, 0) * tl.exp(total)
        gates = vector(at_head(gates_ref, b, h, T, H, HG, 1), row, HG, T, C)
        found = tl.where(gates > FORGOTTEN, found, 0.0)
        put_vector(at_head(dgates_ref, b, h, T, H, H, 1), found, row, H, T, C)
