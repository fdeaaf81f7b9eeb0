"""Diagonal recurrences: a program walks some channels from step to step, their states in registers.

Some steps are loaded together, and the derivative keeps the state before every so many. With d_t
the cotangent of the state h_t, walking back,

    d_t = read_t dy_t + exp(log_decay_{t+1}) d_{t+1}

Kernels have a kind for decays, writes and reads: 0 for ones, 1 if they are constant in time, 2 if
they vary.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from attn_kernels.recurrence.decay import decayed
from attn_kernels.recurrence.triton import parts
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
    y, last, *_ = _forward((x, log_decay, write, read), state, keep=False)
    return y, last


def _run_fwd(*args):
    *arrays, state = args
    y, last, *kept = _forward(arrays, state, keep=True)
    return (y, last), (arrays, *kept)


def _number(arrays, state):
    """Into how many parts sequences are cut."""
    (batch, length, channels), numbers = arrays[0].shape, state.shape[-1]
    programs = batch * triton.cdiv(channels, _block(numbers))
    return parts.dividing(length, programs, _warps(numbers))


def _cut(count, arrays):
    """Every part of a sequence as a row; what is constant in time stays."""
    return [parts.cut(count, x) if x is not None and x.ndim > 2 else x for x in arrays]


def _forward(arrays, state, keep):
    """The outputs, the last state, the states kept, and what parts make of states."""
    count, change = _number(arrays, state), None
    if count > 1:
        arrays = _cut(count, arrays)
        empty = parts.nothing(count, state)
        _, written, _ = _walked(arrays, empty, outputs=False)
        change = _change(arrays, empty)
        state = parts.chained(count, _faded, change, written, state)
    y, last, kept = _walked(arrays, state, keep=keep)
    if count > 1:
        y, last = parts.joined(count, y), last.reshape(-1, count, *last.shape[1:])[:, -1]
    return y, last, kept, change


def _change(arrays, state):
    """The log decay over a part, `[B parts, C, N]`."""
    x, log_decay, *_ = arrays
    log_decay = log_decay.astype(jnp.float32)
    total = log_decay.sum(1) if log_decay.ndim > 2 else log_decay * x.shape[1]
    return jnp.broadcast_to(total, state.shape)


def _faded(log_decay, state):
    return decayed(state[..., None], log_decay)[..., 0]


def _run_bwd(saved, cotangents):
    given, kept, change = saved
    dy, d_last = cotangents
    arrays, count = given, _number(given, d_last)
    if count > 1:
        *arrays, dy = _cut(count, (*given, dy))
        *_, read = _walked_back(arrays, kept, dy, parts.nothing(count, d_last), slopes=False)
        d_last = parts.chained(count, _faded, change, read, d_last, reverse=True)
    *slopes, d_first = _walked_back(arrays, kept, dy, d_last)
    if count > 1:
        slopes = [
            d if x is None or x.ndim < 3 else parts.joined(count, d) for d, x in zip(slopes, given)
        ]
        d_first = d_first.reshape(-1, count, *d_first.shape[1:])[:, 0]
    slopes = [
        d if x is None or x.ndim > 2 else d.sum(0).astype(x.dtype) for d, x in zip(slopes, given)
    ]
    return *slopes, d_first


_run.defvjp(_run_fwd, _run_bwd)


def _walked(arrays, state, outputs=True, keep=False):
    """`_walk`: the outputs, the last state, and those before every few steps."""
    x = arrays[0]
    count = triton.cdiv(x.shape[1], STEPS)
    kept = jax.ShapeDtypeStruct((state.shape[0], count, *state.shape[1:]), jnp.float32)
    return launch(
        _walk,
        (*map(_of_rows, arrays), state),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype) if outputs else None,
            jax.ShapeDtypeStruct(state.shape, jnp.float32),
            kept if keep else None,
        ),
        OUTPUTS=outputs,
        KEEP=keep,
        **_sizes(arrays, state.shape[-1]),
    )


def _walked_back(arrays, kept, dy, d_last, slopes=True):
    """`_walk_back`: the slopes of the arrays, and the cotangent of the first state.

    Those of what is constant in time are sums over the steps of a row, `[B, C, N]`.
    """
    total = jax.ShapeDtypeStruct(d_last.shape, jnp.float32)

    def slope(x):
        if x is None or not slopes:
            return None
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if x.ndim > 2 else total

    return launch(
        _walk_back,
        (*map(_of_rows, arrays), kept, dy, d_last),
        (*map(slope, arrays), total),
        SLOPES=slopes,
        **_sizes(arrays, d_last.shape[-1]),
    )


def _of_rows(a):
    """With an axis of rows, if only one for all of them."""
    return a if a is None or a.ndim > 2 else a[None]


def _block(numbers):
    """Channels of a program."""
    return max(1, LANES // triton.next_power_of_2(numbers))


def _warps(numbers):
    """Of a program."""
    return max(1, triton.next_power_of_2(numbers) // LANES)


def _sizes(arrays, numbers):
    """The grid and the constants of a call."""
    batch, length, channels = arrays[0].shape
    block = _block(numbers)
    kinds = [0 if a is None else 2 if a.ndim > 2 else 1 for a in arrays[1:]]
    return dict(zip(("DECAY", "WRITE", "READ"), kinds)) | dict(
        grid=(triton.cdiv(channels, block),),
        warps=_warps(numbers),
        ROWS=batch,
        T=length,
        C=channels,
        N=numbers,
        BLOCK=block,
        PADDED=triton.next_power_of_2(numbers),
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
    return row, row // ROWS * C * N + place, c, c < C, place, (c < C)[:, None] & (n < N)[None, :]


@triton.jit
def _always(ref, at, inside, KIND: tl.constexpr):
    """Numbers that are the same at every step; others are not read."""
    if KIND == 1:
        x = _load(ref, at, inside)
    else:
        x = 1.0
    return x


@triton.jit
def _now(ref, at, inside, always, KIND: tl.constexpr):
    """Numbers of a step."""
    if KIND == 2:
        x = _load(ref, at, inside)
    else:
        x = always
    return x


@triton.jit
def _total(x, inside, N: tl.constexpr, PADDED: tl.constexpr):
    """The sums over the numbers of channels."""
    if PADDED > N:
        x = tl.where(inside, x, 0.0)
    return tl.sum(x, 1)


@triton.jit
def _walk(
    x_ptr, decay_ptr, write_ptr, read_ptr, state_ptr, y_ptr, last_ptr, kept_ptr,
    DECAY: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr,
    OUTPUTS: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row, constants, c, in_c, place, inside = _program(ROWS, C, N, BLOCK, PADDED)
    state = _load(state_ptr, row * C * N + place, inside)
    decay = _always(decay_ptr, constants, inside, DECAY)
    write = _always(write_ptr, constants, inside, WRITE)
    read = _always(read_ptr, constants, inside, READ)
    count: tl.constexpr = (T + S - 1) // S
    for block in range(0, count):
        if KEEP:
            tl.store(kept_ptr + (row * count + block) * C * N + place, state, mask=inside)
        xs, decays, writes, reads = (), (), (), ()
        for i in tl.static_range(S):
            t = block * S + i
            at, there = (row * T + t) * C * N + place, inside & (t < T)
            xs += (_load(x_ptr, (row * T + t) * C + c, in_c & (t < T))[:, None],)
            decays += (_now(decay_ptr, at, there, decay, DECAY),)
            writes += (_now(write_ptr, at, there, write, WRITE),)
            if OUTPUTS:
                reads += (_now(read_ptr, at, there, read, READ),)
        for i in tl.static_range(S):
            t = block * S + i
            kept, change = fade(decays[i])
            now = kept * state + (change * state + xs[i] * writes[i])
            if T % S:  # beyond the end nothing decays
                now = tl.where(t < T, now, state)
            state = now
            if OUTPUTS:
                y = _total(state * reads[i], inside, N, PADDED).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + (row * T + t) * C + c, y, mask=in_c & (t < T))
    tl.store(last_ptr + row * C * N + place, state, mask=inside)


@triton.jit
def _walk_back(
    x_ptr, decay_ptr, write_ptr, read_ptr, kept_ptr, dy_ptr, d_last_ptr,
    dx_ptr, d_decay_ptr, d_write_ptr, d_read_ptr, d_first_ptr,
    DECAY: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr, SLOPES: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, PADDED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    row, constants, c, in_c, place, inside = _program(ROWS, C, N, BLOCK, PADDED)
    d_state = _load(d_last_ptr, row * C * N + place, inside)
    decay = _always(decay_ptr, constants, inside, DECAY)
    write = _always(write_ptr, constants, inside, WRITE)
    read = _always(read_ptr, constants, inside, READ)
    d_decay = tl.zeros([BLOCK, PADDED], tl.float32)
    d_write = tl.zeros([BLOCK, PADDED], tl.float32)
    d_read = tl.zeros([BLOCK, PADDED], tl.float32)
    count: tl.constexpr = (T + S - 1) // S
    for back in range(0, count):
        block = count - 1 - back
        xs, dys, decays, writes, reads, faded = (), (), (), (), (), ()
        for i in tl.static_range(S):
            t = block * S + i
            at, there = (row * T + t) * C * N + place, inside & (t < T)
            dys += (_load(dy_ptr, (row * T + t) * C + c, in_c & (t < T))[:, None],)
            decays += (_now(decay_ptr, at, there, decay, DECAY),)
            reads += (_now(read_ptr, at, there, read, READ),)
            if SLOPES:
                xs += (_load(x_ptr, (row * T + t) * C + c, in_c & (t < T))[:, None],)
                writes += (_now(write_ptr, at, there, write, WRITE),)
        if SLOPES:
            state = _load(kept_ptr, (row * count + block) * C * N + place, inside)
            for i in tl.static_range(S):
                kept, change = fade(decays[i])
                faded += (kept * state + change * state,)
                state = faded[i] + xs[i] * writes[i]
        for i in tl.static_range(S - 1, -1, -1):
            t = block * S + i
            at, there = (row * T + t) * C * N + place, inside & (t < T)
            d_state += reads[i] * dys[i]
            if SLOPES:
                dx = _total(d_state * writes[i], inside, N, PADDED).to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + (row * T + t) * C + c, dx, mask=in_c & (t < T))
                slope = d_state * faded[i]
                if DECAY == 2:
                    tl.store(d_decay_ptr + at, slope, mask=there)
                else:
                    d_decay += tl.where(t < T, slope, 0.0)
                slope = d_state * xs[i]
                if WRITE == 2:
                    tl.store(d_write_ptr + at, slope, mask=there)
                else:
                    d_write += slope
                slope = dys[i] * (faded[i] + xs[i] * writes[i])
                if READ == 2:
                    tl.store(d_read_ptr + at, slope, mask=there)
                else:
                    d_read += slope
            kept, change = fade(decays[i])
            earlier = kept * d_state + change * d_state
            if T % S:
                earlier = tl.where(t < T, earlier, d_state)
            d_state = earlier
    at = row * C * N + place
    tl.store(d_first_ptr + at, d_state, mask=inside)
    if SLOPES and DECAY == 1:
        tl.store(d_decay_ptr + at, d_decay, mask=inside)
    if SLOPES and WRITE == 1:
        tl.store(d_write_ptr + at, d_write, mask=inside)
    if SLOPES and READ == 1:
        tl.store(d_read_ptr + at, d_read, mask=inside)
