"""Diagonal recurrences: a program walks some channels from step to step, their states in registers.

Some steps are loaded together, and the derivative keeps the state before every so many. With d_t
the cotangent of the state h_t, walking back,

    d_t = read_t dy_t + exp(log_decay_{t+1}) d_{t+1}
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from attn_kernels import gpu
from attn_kernels.recurrence.decay import decayed
from attn_kernels.recurrence.triton import parts
from attn_kernels.recurrence.triton.call import launch
from attn_kernels.recurrence.triton.tiles import fade
from attn_kernels.varying import varying

STEPS = 16  # that are loaded together
LANES = 32  # numbers of states of a warp
WIDEST = 256  # numbers of a channel
PROGRAMS = 8 * gpu.MULTIPROCESSORS  # that a device has places for
SHORTEST = 1024  # steps of a part
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
    """Into how many parts sequences are cut, for as many programs as a device has places."""
    x, numbers = arrays[0], state.shape[-1]
    programs = x.shape[0] * triton.cdiv(x.shape[2], _block(numbers))
    count = 1
    while 2 * count * programs <= PROGRAMS and x.shape[1] % (2 * count * SHORTEST) == 0:
        count *= 2
    return count


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


def _sizes(arrays, numbers):
    """The grid and the constants of a call."""
    batch, length, channels = arrays[0].shape
    block, padded = _block(numbers), triton.next_power_of_2(numbers)
    kinds = [0 if a is None else 2 if a.ndim > 2 else 1 for a in arrays[1:]]
    return dict(zip(("DECAY", "WRITE", "READ"), kinds)) | dict(
        grid=(triton.cdiv(channels, block),),
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
    DECAY: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr,
    OUTPUTS: tl.constexpr, KEEP: tl.constexpr,
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
            if OUTPUTS and READ == 2:
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
            if OUTPUTS:
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
    DECAY: tl.constexpr, WRITE: tl.constexpr, READ: tl.constexpr, SLOPES: tl.constexpr,
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
        xs, dys, decays, writes, reads, faded = (), (), (), (), (), ()
        for i in tl.static_range(S):
            t = block * S + i
            step = row * T + t
            dys += (_load(dy_ptr, step * C + c, in_c & (t < T))[:, None],)
            if SLOPES:
                xs += (_load(x_ptr, step * C + c, in_c & (t < T))[:, None],)
            if DECAY == 2:
                decays += (_load(decay_ptr, step * C * N + place, inside & (t < T)),)
            if SLOPES and WRITE == 2:
                writes += (_load(write_ptr, step * C * N + place, inside & (t < T)),)
            if READ == 2:
                reads += (_load(read_ptr, step * C * N + place, inside & (t < T)),)
        if SLOPES:
            state = _load(kept_ptr, (row * count + block) * C * N + place, inside)
            for i in tl.static_range(S):
                if DECAY == 2:
                    kept, change = fade(decays[i])
                faded += (kept * state + change * state,)
                state = faded[i]
                if WRITE == 2:
                    state += xs[i] * writes[i]
                elif WRITE == 1:
                    state += xs[i] * write
                else:
                    state += xs[i]
        for i in tl.static_range(S - 1, -1, -1):
            t = block * S + i
            exists = t < T
            at = (row * T + t) * C * N + place
            if READ == 2:
                d_state += reads[i] * dys[i]
            elif READ == 1:
                d_state += read * dys[i]
            else:
                d_state += dys[i]
            if SLOPES:
                d_x = d_state
                state = faded[i]
                if WRITE == 2:
                    state += xs[i] * writes[i]
                    d_x = d_x * writes[i]
                    tl.store(d_write_ptr + at, d_state * xs[i], mask=inside & exists)
                elif WRITE == 1:
                    state += xs[i] * write
                    d_x = d_x * write
                    d_write += d_state * xs[i]
                else:
                    state += xs[i]
                if READ == 2:
                    tl.store(d_read_ptr + at, dys[i] * state, mask=inside & exists)
                elif READ == 1:
                    d_read += dys[i] * state
                if PADDED > N:
                    d_x = tl.where(inside, d_x, 0.0)
                d_x = tl.sum(d_x, 1).to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + (row * T + t) * C + c, d_x, mask=in_c & exists)
                slope = d_state * faded[i]
                if DECAY == 2:
                    tl.store(d_decay_ptr + at, slope, mask=inside & exists)
                else:
                    d_decay += tl.where(exists, slope, 0.0)
            if DECAY == 2:
                kept, change = fade(decays[i])
            earlier = kept * d_state + change * d_state
            if T % S:
                earlier = tl.where(exists, earlier, d_state)
            d_state = earlier
    at = row * C * N + place
    tl.store(d_first_ptr + at, d_state, mask=inside)
    if SLOPES and DECAY == 1:
        tl.store(d_decay_ptr + at, d_decay, mask=inside)
    if SLOPES and WRITE == 1:
        tl.store(d_write_ptr + at, d_write, mask=inside)
    if SLOPES and READ == 1:
        tl.store(d_read_ptr + at, d_read, mask=inside)
