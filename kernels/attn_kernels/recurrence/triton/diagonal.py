"""Diagonal recurrences: a program walks some channels from step to step, their states in registers.

Some steps are loaded together, and the derivative keeps the state before every so many. With d_t
the cotangent of the state h_t, walking back,

    d_t = read_t dy_t + exp(log_decay_{t+1}) d_{t+1}
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from attn_kernels.recurrence.triton.call import launch
from attn_kernels.recurrence.triton.tiles import fade
from attn_kernels.varying import varying

STEPS = 16  # that are loaded together
LANES = 32  # numbers of states of a warp
WIDEST = 256  # numbers of a channel
DTYPES = jnp.bfloat16, jnp.float16, jnp.float32


def refusal(x, state, numbers: int) -> str | None:
    """Why the kernels cannot serve a call, None if they can; sums have the dtype of `state`."""
    if x.dtype not in DTYPES:
        return f"x is bfloat16, float16 or float32, not {x.dtype}"
    if state.dtype != jnp.float32:
        return f"states are in float32, not {state.dtype}"
    if numbers > WIDEST:
        return f"a channel has up to {WIDEST} numbers, it had {numbers}"
    return None


def walk(x, log_decay, write, read, state):
    """The outputs `[B, T, C]` and the last state, differentiable once in reverse mode.

    Args:
      x: `[B, T, C]`.
      log_decay, write, read: `[C, N]` or `[B, T, C, N]`; the last two may be None.
      state: `[B, C, N]`, float32.
    """
    args = x, log_decay, write, read, state
    return _run(*varying(args, args))


@jax.custom_vjp
def _run(x, log_decay, write, read, state):
    y, last, _ = _forward(x, log_decay, write, read, state, keep=False)
    return y, last


def _run_fwd(x, log_decay, write, read, state):
    y, last, kept = _forward(x, log_decay, write, read, state, keep=True)
    return (y, last), (x, log_decay, write, read, kept)


def _forward(x, log_decay, write, read, state, keep):
    batch, length, _ = x.shape
    count = triton.cdiv(length, STEPS)
    kept = jax.ShapeDtypeStruct((batch, count, *state.shape[1:]), jnp.float32)
    given = dict(DECAY=log_decay, WRITE=write, READ=read)
    return launch(
        _walk,
        (x, *map(_of_rows, given.values()), state),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            kept if keep else None,
        ),
        KEEP=keep,
        **_sizes(x, state.shape[-1], given),
    )


def _run_bwd(saved, cotangents):
    x, log_decay, write, read, kept = saved
    dy, d_last = cotangents
    given = dict(DECAY=log_decay, WRITE=write, READ=read)
    shape = x.shape[0], *kept.shape[2:]

    def slope(a):
        """Of what is constant in time, the sum over the steps of a row."""
        if a is None:
            return None
        return jax.ShapeDtypeStruct(*((a.shape, a.dtype) if a.ndim > 2 else (shape, jnp.float32)))

    dx, *slopes, d_first = launch(
        _walk_back,
        (x, *map(_of_rows, given.values()), kept, dy, d_last),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *map(slope, given.values()),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        **_sizes(x, kept.shape[-1], given),
    )
    slopes = (
        d if d is None or a.ndim > 2 else d.sum(0).astype(a.dtype)
        for d, a in zip(slopes, given.values())
    )
    return dx, *slopes, d_first


_run.defvjp(_run_fwd, _run_bwd)


def _of_rows(a):
    """With an axis of rows, if only one for all of them."""
    return a if a is None or a.ndim > 2 else a[None]


def _sizes(x, numbers, given):
    """The grid and the constants of a call."""
    batch, length, channels = x.shape
    padded = triton.next_power_of_2(numbers)
    block = max(1, LANES // padded)
    kinds = {name: 0 if a is None else 2 if a.ndim > 2 else 1 for name, a in given.items()}
    blocks = triton.cdiv(channels, block)
    return kinds | dict(
        grid=(blocks,),
        warps=max(1, padded // LANES),
        ROWS=batch,
        T=length,
        C=channels,
        N=numbers,
        BLOCK=block,
        PADDED=padded,
        S=STEPS,
    )


@triton.jit
def _load(ref, at, inside):
    return tl.load(ref + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _program(
    ROWS: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    """The row, whose constants are in row 0 if one call has them, and the channels."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, PADDED)
    place = c[:, None] * N + n[None, :]
    return row, row // ROWS, c, c < C, place, (c < C)[:, None] & (n < N)[None, :]


@triton.jit
def _walk(
    x_ptr, decay_ptr, write_ptr, read_ptr, state_ptr, y_ptr, last_ptr, kept_ptr,
    DECAY: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row, call, c, in_c, place, inside = _program(ROWS, C, N, BLOCK, PADDED)
    state = _load(state_ptr, row * C * N + place, inside)
    if DECAY == 1:
        kept, change = fade(_load(decay_ptr, call * C * N + place, inside))
    if WRITE == 1:
        write = _load(write_ptr, call * C * N + place, inside)
    if READ == 1:
        read = _load(read_ptr, call * C * N + place, inside)
    for block in range(0, (T + S - 1) // S):
        if KEEP:
            at = (row * ((T + S - 1) // S) + block) * C * N + place
            tl.store(kept_ptr + at, state, mask=inside)
        xs, decays, writes, reads = (), (), (), ()
        for i in tl.static_range(S):
            t = block * S + i
            step = row * T + t
            xs += (_load(x_ptr, step * C + c, in_c & (t < T)),)
            if DECAY == 2:
                decays += (_load(decay_ptr, step * C * N + place, inside & (t < T)),)
            if WRITE == 2:
                writes += (_load(write_ptr, step * C * N + place, inside & (t < T)),)
            if READ == 2:
                reads += (_load(read_ptr, step * C * N + place, inside & (t < T)),)
        for i in tl.static_range(S):
            t = block * S + i
            if DECAY == 2:
                kept, change = fade(decays[i])
            written = xs[i][:, None]
            if WRITE == 2:
                written = written * writes[i]
            elif WRITE == 1:
                written = written * write
            now = kept * state + (change * state + written)
            if T % S:  # beyond the end nothing decays
                now = tl.where(t < T, now, state)
            state = now
            seen = state
            if READ == 2:
                seen = seen * reads[i]
            elif READ == 1:
                seen = seen * read
            if PADDED > N:
                seen = tl.where(inside, seen, 0.0)
            y = tl.sum(seen, 1).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + (row * T + t) * C + c, y, mask=in_c & (t < T))
    tl.store(last_ptr + row * C * N + place, state, mask=inside)


@triton.jit
def _walk_back(
    x_ptr, decay_ptr, write_ptr, read_ptr, kept_ptr, dy_ptr, d_last_ptr,
    dx_ptr, d_decay_ptr, d_write_ptr, d_read_ptr, d_first_ptr,
    DECAY: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row, call, c, in_c, place, inside = _program(ROWS, C, N, BLOCK, PADDED)
    d_state = _load(d_last_ptr, row * C * N + place, inside)
    d_decay = tl.zeros([BLOCK, PADDED], tl.float32)
    d_write = tl.zeros([BLOCK, PADDED], tl.float32)
    d_read = tl.zeros([BLOCK, PADDED], tl.float32)
    if DECAY == 1:
        kept, change = fade(_load(decay_ptr, call * C * N + place, inside))
    if WRITE == 1:
        write = _load(write_ptr, call * C * N + place, inside)
    if READ == 1:
        read = _load(read_ptr, call * C * N + place, inside)
    count: tl.constexpr = (T + S - 1) // S
    for back in range(0, count):
        block = count - 1 - back
        state = _load(kept_ptr, (row * count + block) * C * N + place, inside)
        xs, dys, factors, writes, reads, faded = (), (), (), (), (), ()
        for i in tl.static_range(S):
            t = block * S + i
            step = row * T + t
            xs += (_load(x_ptr, step * C + c, in_c & (t < T))[:, None],)
            dys += (_load(dy_ptr, step * C + c, in_c & (t < T))[:, None],)
            if DECAY == 2:
                factors += (_load(decay_ptr, step * C * N + place, inside & (t < T)),)
            if WRITE == 2:
                writes += (_load(write_ptr, step * C * N + place, inside & (t < T)),)
            if READ == 2:
                reads += (_load(read_ptr, step * C * N + place, inside & (t < T)),)
        for i in tl.static_range(S):
            if DECAY == 2:
                kept, change = fade(factors[i])
            faded += (kept * state + change * state,)
            written = xs[i]
            if WRITE == 2:
                written = written * writes[i]
            elif WRITE == 1:
                written = written * write
            state = faded[i] + written
        for i in tl.static_range(S - 1, -1, -1):
            t = block * S + i
            exists = t < T
            at = (row * T + t) * C * N + place
            state = faded[i]
            if WRITE == 2:
                state += xs[i] * writes[i]
            elif WRITE == 1:
                state += xs[i] * write
            else:
                state += xs[i]
            if READ == 2:
                d_state += reads[i] * dys[i]
                tl.store(d_read_ptr + at, dys[i] * state, mask=inside & exists)
            elif READ == 1:
                d_state += read * dys[i]
                d_read += dys[i] * state
            else:
                d_state += dys[i]
            d_x = d_state
            if WRITE == 2:
                d_x = d_x * writes[i]
                tl.store(d_write_ptr + at, d_state * xs[i], mask=inside & exists)
            elif WRITE == 1:
                d_x = d_x * write
                d_write += d_state * xs[i]
            if PADDED > N:
                d_x = tl.where(inside, d_x, 0.0)
            d_x = tl.sum(d_x, 1).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + (row * T + t) * C + c, d_x, mask=in_c & exists)
            slope = d_state * faded[i]
            if DECAY == 2:
                kept, change = fade(factors[i])
                tl.store(d_decay_ptr + at, slope, mask=inside & exists)
            else:
                d_decay += tl.where(exists, slope, 0.0)
            earlier = kept * d_state + change * d_state
            if T % S:
                earlier = tl.where(exists, earlier, d_state)
            d_state = earlier
    at = row * C * N + place
    tl.store(d_first_ptr + at, d_state, mask=inside)
    if DECAY == 1:
        tl.store(d_decay_ptr + at, d_decay, mask=inside)
    if WRITE == 1:
        tl.store(d_write_ptr + at, d_write, mask=inside)
    if READ == 1:
        tl.store(d_read_ptr + at, d_read, mask=inside)
