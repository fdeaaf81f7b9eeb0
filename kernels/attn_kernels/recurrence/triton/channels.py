"""Decay per channel: what a chunk computes before it has its state, and the derivatives within it.

With `b_t` the sum of the log decays of a chunk up to step t, the weights of its pairs of steps are
`A_ts = scale sum_d q_td k_sd exp(b_td - b_sd)` for s <= t. Where no channel of a block decays much,
they are one product of `q exp(b)` and `k exp(-b)`. Elsewhere the chunk is halved again and again,
down to single steps: the later half sees the earlier one through the boundary between them, a
product whose factors only decay.

All sums of log decays are products with matrices of 0 and 1, over the steps in between.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from attn_kernels.recurrence.triton.call import launch, slope_dtype
from attn_kernels.recurrence.triton.tiles import FORGOTTEN, SIZE, padded

LOG2E = tl.constexpr(1.4426950408889634)
LOG_MILD = tl.constexpr(-60.0)  # of a chunk's decay that is far from 0, as is its inverse
MILD = tl.constexpr(math.exp(-60.0))

COLUMNS = 128, 64  # of values: up to so many at once, else so many at a time
CHANNELS = {"prepare": 64, "local": 32}  # of a block
WARPS = {"prepare": 4, "local": 4}
STAGES = {"prepare": 2, "local": 2}


@triton.jit
def _exp(x):
    """What the device computes without care for results that are not normal."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _wide(ptrs, inside):
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rows(ptrs, e, present, width: tl.constexpr):
    """Steps that are present, and their columns e, of which there are `width` in all."""
    inside = present[:, None] & (e < width)[None, :]
    return tl.load(ptrs + e[None, :], mask=inside, other=0.0)


@triton.jit
def _parts(x, coarse: tl.constexpr, part: tl.constexpr):
    """Two numbers that products can have, whose sum is x; one where x is coarse."""
    high = x.to(part)
    if coarse:
        return high, high
    else:
        return high, (x - high.to(tl.float32)).to(part)


@triton.jit
def _sums(matrix, high, low, coarse: tl.constexpr):
    """`matrix (high + low)`, the matrix of 0 and 1."""
    matrix = matrix.to(high.dtype)
    sums = tl.dot(matrix, high, input_precision="ieee")
    if not coarse:
        sums = tl.dot(matrix, low, sums, input_precision="ieee")
    return sums


@triton.jit
def _halves(t, u, half):
    """Whose product with log decays is their sum between a step and the middle of its block."""
    middle = (t | (2 * half - 1)) - half
    return tl.where((u > tl.minimum(t, middle)) & (u <= tl.maximum(t, middle)), 1.0, 0.0)


@triton.jit
def _prepare(
    q_ptr, k_ptr, gates_ptr, carried_ptr, kept_ptr, weights_ptr, total_ptr,
    length: tl.constexpr, heads: tl.constexpr, q_heads: tl.constexpr, k_heads: tl.constexpr,
    gate_heads: tl.constexpr, dim: tl.constexpr, size: tl.constexpr, levels: tl.constexpr,
    channels: tl.constexpr, scale: tl.constexpr, coarse: tl.constexpr, part: tl.constexpr,
    factor: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    n = tl.program_id(1)
    step = tl.arange(0, size)
    t, u = step[:, None], step[None, :]
    present = n * size + step < length
    row = b * length + n * size
    q_ptr += (row * q_heads + h // (heads // q_heads)) * dim
    k_ptr += (row * k_heads + h // (heads // k_heads)) * dim
    gates_ptr += (row * gate_heads + h // (heads // gate_heads)) * dim
    carried_ptr += (row * heads + h) * dim
    kept_ptr += (row * heads + h) * dim
    weights_ptr += (row * heads + h) * size
    total_ptr += ((b * tl.cdiv(length, size) + n) * heads + h) * dim
    weights = tl.zeros([size, size], tl.float32)
    for start in tl.range(0, dim, channels, disable_licm=True):
        d = start + tl.arange(0, channels)
        inside = present[:, None] & (d < dim)[None, :]
        gates = _wide(gates_ptr + (t * (gate_heads * dim) + d[None, :]), inside)
        q = _wide(q_ptr + (t * (q_heads * dim) + d[None, :]), inside) * scale
        k = _wide(k_ptr + (t * (k_heads * dim) + d[None, :]), inside)
        gates = tl.maximum(gates, FORGOTTEN)
        high, low = _parts(gates, coarse, part)
        sums = _sums(tl.where(u <= t, 1.0, 0.0), high, low, coarse)
        decay = _exp(sums)
        carried = q * decay
        kept = k * _exp(_sums(tl.where(u > t, 1.0, 0.0), high, low, coarse))
        place = t * (heads * dim) + d[None, :]
        tl.store(carried_ptr + place, carried.to(carried_ptr.dtype.element_ty), mask=inside)
        tl.store(kept_ptr + place, kept.to(kept_ptr.dtype.element_ty), mask=inside)
        last = (t == size - 1) & (d < dim)[None, :]  # whose decay is that of the chunk
        tl.store(total_ptr + (d[None, :] + 0 * t), decay, mask=last)
        if tl.min(tl.min(sums, 1), 0) > LOG_MILD:
            queries, keys = carried.to(factor), (k * _exp(-sums)).to(factor)
            weights = tl.dot(queries, tl.trans(keys), weights, input_precision=precision)
        else:
            pairs = tl.dot(q.to(factor), tl.trans(k.to(factor)), input_precision=precision)
            weights += tl.where(t == u, pairs, 0.0)
            for level in tl.range(levels, disable_licm=True):
                half = size >> (level + 1)
                decay = _exp(_sums(_halves(t, u, half), high, low, coarse))
                later = (t & half) != 0
                queries = tl.where(later, q * decay, 0.0).to(factor)
                keys = tl.where(later, 0.0, k * decay).to(factor)
                pairs = tl.dot(queries, tl.trans(keys), input_precision=precision)
                weights += tl.where((t ^ u) < 2 * half, pairs, 0.0)
    weights = tl.where(u <= t, weights, 0.0).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + (t * (heads * size) + u), weights, mask=present[:, None])


@triton.jit
def _local(
    q_ptr, k_ptr, v_ptr, gates_ptr, carried_ptr, kept_ptr, total_ptr,
    states_ptr, d_out_ptr, d_states_ptr,
    dq_ptr, dk_ptr, d_gates_ptr,
    length: tl.constexpr, heads: tl.constexpr, q_heads: tl.constexpr, k_heads: tl.constexpr,
    v_heads: tl.constexpr, gate_heads: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
    size: tl.constexpr, levels: tl.constexpr, channels: tl.constexpr, columns: tl.constexpr,
    scale: tl.constexpr, coarse: tl.constexpr, part: tl.constexpr, factor: tl.constexpr,
    precision: tl.constexpr, direct: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    n = tl.program_id(1)
    step = tl.arange(0, size)
    t, u = step[:, None], step[None, :]
    present = n * size + step < length
    row = b * length + n * size
    q_ptr += (row * q_heads + h // (heads // q_heads)) * dim
    k_ptr += (row * k_heads + h // (heads // k_heads)) * dim
    v_ptr += (row * v_heads + h // (heads // v_heads)) * width
    gates_ptr += (row * gate_heads + h // (heads // gate_heads)) * dim
    d_out_ptr += (row * heads + h) * width
    carried_ptr += (row * heads + h) * dim
    kept_ptr += (row * heads + h) * dim
    dq_ptr += (row * heads + h) * dim
    dk_ptr += (row * heads + h) * dim
    d_gates_ptr += (row * heads + h) * dim
    chunk = (b * tl.cdiv(length, size) + n) * heads + h
    total_ptr += chunk * dim
    states_ptr += chunk * dim * width
    d_states_ptr += chunk * dim * width

    at_once: tl.constexpr = width <= columns  # d_out and v are read once
    d_out_at, v_at = d_out_ptr + t * (heads * width), v_ptr + t * (v_heads * width)
    if at_once:
        e = tl.arange(0, columns)
        d_out = _rows(d_out_at, e, present, width)
        v = _rows(v_at, e, present, width)
    pairs = tl.zeros([size, size], tl.float32)
    for start in range(0, width, columns):
        if not at_once:
            e = start + tl.arange(0, columns)
            d_out = _rows(d_out_at, e, present, width)
            v = _rows(v_at, e, present, width)
        pairs = tl.dot(d_out, tl.trans(v), pairs, input_precision=precision)
    pairs = tl.where(u <= t, pairs, 0.0)
    own = tl.sum(tl.where(t == u, pairs, 0.0), 1)[:, None]
    pairs = pairs.to(factor)

    for start in tl.range(0, dim, channels, num_stages=1, disable_licm=True):
        d = start + tl.arange(0, channels)
        in_d = d < dim
        inside = present[:, None] & in_d[None, :]
        at = t * (heads * dim) + d[None, :]
        # What follows the products is under way while they are made.
        gates_at = gates_ptr + (t * (gate_heads * dim) + d[None, :])
        gates = tl.load(gates_at, mask=inside, other=0.0)
        total = tl.load(total_ptr + d, mask=in_d, other=1.0)
        if direct:
            carried = tl.load(carried_ptr + at, mask=inside, other=0.0)
            kept = tl.load(kept_ptr + at, mask=inside, other=0.0)
        dq = tl.zeros([size, channels], tl.float32)
        dk = tl.zeros([size, channels], tl.float32)
        inner = tl.zeros([channels], tl.float32)
        for first in range(0, width, columns):
            e = first + tl.arange(0, columns)
            if not at_once:
                d_out = _rows(d_out_at, e, present, width)
                v = _rows(v_at, e, present, width)
            state = _rows(states_ptr + d[:, None] * width, e, in_d, width)
            d_state = _rows(d_states_ptr + d[:, None] * width, e, in_d, width)
            dq = tl.dot(d_out, tl.trans(state), dq, input_precision=precision)
            dk = tl.dot(v, tl.trans(d_state), dk, input_precision=precision)
            inner += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)

        gates = tl.maximum(gates.to(tl.float32), FORGOTTEN)
        high, low = _parts(gates, coarse, part)
        sums = _sums(tl.where(u <= t, 1.0, 0.0), high, low, coarse)
        after = _exp(sums)
        if tl.min(total, 0) > MILD:
            before = _exp(-sums) * total[None, :]
            if not direct:
                q = _wide(q_ptr + (t * (q_heads * dim) + d[None, :]), inside) * scale
                k = _wide(k_ptr + (t * (k_heads * dim) + d[None, :]), inside)
                carried, kept = q * after, k * before
            more = (1 / total)[None, :]
            through = kept.to(tl.float32) * dk
            found = tl.dot(pairs, kept.to(factor), input_precision=precision)
            dq += found * more
            found = tl.dot(tl.trans(pairs), carried.to(factor), input_precision=precision)
            dk += found * more
            change = carried.to(tl.float32) * dq - kept.to(tl.float32) * dk
            dq *= after
            dk *= before
        else:
            q = _wide(q_ptr + (t * (q_heads * dim) + d[None, :]), inside) * scale
            k = _wide(k_ptr + (t * (k_heads * dim) + d[None, :]), inside)
            dq *= after
            dk *= _exp(_sums(tl.where(u > t, 1.0, 0.0), high, low, coarse))
            through = k * dk
            dq += own * k
            dk += own * q
            for level in tl.range(levels, disable_licm=True):
                half = size >> (level + 1)
                decay = _exp(_sums(_halves(t, u, half), high, low, coarse))
                later = (t & half) != 0
                queries = tl.where(later, q * decay, 0.0).to(factor)
                keys = tl.where(later, 0.0, k * decay).to(factor)
                same = tl.where((t ^ u) < 2 * half, pairs, 0.0).to(factor)
                found = tl.dot(same, keys, input_precision=precision)
                dq += tl.where(later, decay * found, 0.0)
                found = tl.dot(tl.trans(same), queries, input_precision=precision)
                dk += tl.where(later, 0.0, decay * found)
            change = q * dq - k * dk
        # b_t is in what step t reads and, with the other sign, in what it writes; b_C is in what
        # all steps write and in what is left of the state.
        whole = inner * total + tl.sum(through + change, 0)
        high, low = _parts(change, False, part)
        earlier = _sums(tl.where(u <= t, 1.0, 0.0), high, low, False) - change
        d_gates = tl.where(gates > FORGOTTEN, whole[None, :] - earlier, 0.0)
        tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=inside)
        tl.store(d_gates_ptr + at, d_gates.to(d_gates_ptr.dtype.element_ty), mask=inside)


def _constants(kernel, q, log_decay, heads, scale):
    """Of both kernels.

    Factors that grow do not fit into float16; TF32 has its precision and the range of float32.
    """
    dtype, dim = q.dtype, q.shape[3]
    parts = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    factors = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
    return dict(
        length=q.shape[1],
        heads=heads,
        q_heads=q.shape[2],
        gate_heads=log_decay.shape[2],
        dim=dim,
        size=SIZE,
        levels=SIZE.bit_length() - 1,
        channels=min(CHANNELS[kernel], padded(dim)),
        scale=scale,
        coarse=log_decay.dtype == parts,
        part=getattr(tl, jnp.dtype(parts).name),
        factor=getattr(tl, jnp.dtype(factors).name),
        precision="ieee" if dtype == jnp.float32 else "tf32",
        warps=WARPS[kernel],
        stages=STAGES[kernel],
    )


def columns(width: int) -> int:
    """Of values at a time."""
    return padded(width) if width <= COLUMNS[0] else COLUMNS[1]


def prepare_channels(q, k, log_decay, heads: int, scale: float):
    """What the walk over chunks reads.

    Args:
      q, k: `[B, T, heads, D]`, whose heads divide H.
      log_decay: `[B, T, heads, D]`.
      heads: H.
      scale: a number.

    Returns:
      `scale q exp(b)` and `k exp(b_C - b)` `[B, T, H, D]`, A `[B, T, H, C]`, and `exp(b_C)`
      `[B, chunks, H, D]` in float32.
    """
    batch, length, _, dim = q.shape
    count = -(-length // SIZE)
    return launch(
        _prepare,
        (q, k, log_decay),
        (
            jax.ShapeDtypeStruct((batch, length, heads, dim), q.dtype),
            jax.ShapeDtypeStruct((batch, length, heads, dim), k.dtype),
            jax.ShapeDtypeStruct((batch, length, heads, SIZE), q.dtype),
            jax.ShapeDtypeStruct((batch, count, heads, dim), jnp.float32),
        ),
        (heads, count),
        k_heads=k.shape[2],
        **_constants("prepare", q, log_decay, heads, scale),
    )


def local_channels(
    q, k, v, log_decay, carried, kept, totals, states, d_out, d_states, scale: float
):
    """The derivatives of queries, keys and log decays.

    Args:
      q, k, v: `[B, T, heads, ...]`, whose heads divide H.
      log_decay: `[B, T, heads, D]`.
      carried, kept, totals: `scale q exp(b)`, `k exp(b_C - b)` and `exp(b_C)`, as prepared.
      states: before chunks, `[B, chunks, H, D, Dv]`.
      d_out: `[B, T, H, Dv]`.
      d_states: the cotangents of the states behind chunks, `[B, chunks, H, D, Dv]`.
      scale: a number.

    Returns:
      Those of q, k and log_decay, `[B, T, H, D]`, in `slope_dtype`.
    """
    batch, length, heads, width = d_out.shape

    def slope(x):
        return jax.ShapeDtypeStruct((batch, length, heads, q.shape[3]), slope_dtype(x, heads))

    return launch(
        _local,
        (q, k, v, log_decay, carried, kept, totals, states, d_out, d_states),
        (slope(q), slope(k), slope(log_decay)),
        (heads, states.shape[1]),
        k_heads=k.shape[2],
        v_heads=v.shape[2],
        width=width,
        columns=columns(width),
        direct=q.dtype != jnp.float16,  # which may be too narrow for `kept`
        **_constants("local", q, log_decay, heads, scale),
    )
