"""The recurrence in chunks as a Pallas kernel for TPUs.

A chunk is one pure function of a state and its steps. The forward kernel walks the chunks of a
head with the state in VMEM; the backward kernel walks them from the last to the first, each from
the state before it, by `jax.vjp` of that function, with the cotangent of the state in VMEM.

Sums of log decays are products with matrices of 0 and 1, each over the steps in between. The
equations are those of `chunked`, the arrays are laid out as in `definition`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attn_kernels import tpu
from attn_kernels.recurrence.decay import matmul
from attn_kernels.varying import varying

WIDEST = 256  # channels of a key or a value: chunks and states of more do not fit into VMEM
LANES = 32  # channels are padded to a multiple
FORGOTTEN = -200.0  # exp is 0 in float32, and 0 times it is not NaN


def refusal(state, chunk_size: int) -> str | None:
    """Why the kernel cannot serve a call, None if it can."""
    if state.dtype != jnp.float32:
        return f"sums are in float32, the arguments are {state.dtype}"
    if max(state.shape[2:]) > WIDEST:
        return f"D and Dv are at most {WIDEST}, the state is {list(state.shape)}"
    if not 8 <= chunk_size <= 128 or chunk_size & (chunk_size - 1):
        return f"chunk_size is a power of two from 8 to 128, it was {chunk_size}"
    return None


def chunked(q, k, v, log_decay, beta, state, chunk_size: int):
    """The outputs and the last state, differentiable once in reverse mode."""
    length, dim, width = *k.shape[2:], v.shape[3]
    log_decay = jnp.broadcast_to(log_decay, (*k.shape[:3], log_decay.shape[-1]))
    zeros = (0, 0), (0, 0), (0, -length % chunk_size)

    def pad(x):
        return jnp.pad(x, (*zeros, (0, -x.shape[-1] % LANES)))

    def pad_steps(x):
        return jnp.pad(x, (*zeros, (0, 0)))

    q, k, v = pad(q), pad(k), pad(v)
    log_decay = pad_steps(log_decay) if log_decay.shape[-1] == 1 else pad(log_decay)
    beta = None if beta is None else pad_steps(beta)
    state = jnp.pad(state, ((0, 0), (0, 0), (0, -dim % LANES), (0, -width % LANES)))
    args = (q, k, v, log_decay, beta), state
    out, last = _run(*varying(args, args), chunk_size)
    return out[:, :, :length, :width], last[:, :, :dim, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _run(arrays, state, size):
    out, last = _forward(arrays, state, size, keep=False)
    return out, last


def _run_fwd(arrays, state, size):
    out, last, states = _forward(arrays, state, size, keep=True)
    return (out, last), (arrays, states)


def _run_bwd(size, residuals, cotangents):
    return _backward(*residuals, *cotangents, size)


_run.defvjp(_run_fwd, _run_bwd)


def _chunk(state, arrays):
    """The state after a chunk and its outputs: state `[D, Dv]`, arrays `[C, ...]`."""
    q, k, v, log_decay, beta = arrays
    size = k.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    log_decay = jnp.maximum(log_decay, FORGOTTEN)
    wide = jnp.broadcast_to(log_decay, k.shape)

    def ones(where):
        return jnp.where(where, 1.0, 0.0).astype(k.dtype)

    levels = range(size.bit_length() - 1)
    apart = row ^ column

    def parted(level):
        """Pairs of steps in the later and the earlier half of a block of `2 ** (level + 1)`."""
        return (jax.lax.shift_right_logical(apart, level) == 1) & (row > column)

    if log_decay.shape[1] == 1:
        later = jnp.where(row > column, jnp.broadcast_to(log_decay, (size, size)), 0.0)
        sums = matmul(ones(row >= column), later)
        weights = jnp.where(row >= column, jnp.exp(sums), 0.0)

        def product(x):
            return _outer(x, k) * weights

    else:
        factors = []
        for level in levels:
            same = jax.lax.shift_right_logical(apart, level) == 0
            after = jnp.exp(matmul(ones(same & (row >= column)), wide))
            before = jnp.exp(matmul(ones(same & (row < column)), wide))
            factors.append((parted(level), after, before * k))

        def product(x):
            total = jnp.where(row == column, (x * k).sum(1, keepdims=True), 0.0)
            for pairs, after, earlier in factors:
                total = total + jnp.where(pairs, _outer(x * after, earlier), 0.0)
            return total

    carried = jnp.exp(matmul(ones(row >= column), wide))
    kept = k * jnp.exp(matmul(ones(row < column), wide))
    if beta is not None:
        below = jnp.where(row > column, beta * product(k), 0.0)
        inverse = ones(row == column)
        for level in levels:
            step = matmul(matmul(inverse, jnp.where(parted(level), below, 0.0)), inverse)
            inverse = inverse - step
        v = matmul(inverse, beta * (v - matmul(k * carried, state)))
    out = matmul(q * carried, state) + matmul(product(q), v)
    sums = _inner(wide, jnp.ones_like(v))
    half = jnp.tanh(jnp.maximum(sums, -1.0) / 2)
    change = 2 * half / (1 - half)  # expm1
    tiny = sums > -0.5
    state = jnp.where(tiny, 1.0, jnp.exp(sums)) * state + jnp.where(tiny, change, 0.0) * state
    return state + _inner(kept, v), out


def _contract(x, y, axis):
    return jax.lax.dot_general(
        x, y, (((axis,), (axis,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )


_inner = functools.partial(_contract, axis=0)
_outer = functools.partial(_contract, axis=1)


def _forward(arrays, state, size, keep):
    batch, heads, dim, width = state.shape
    length = arrays[0].shape[2]
    count = length // size
    flat, tree = jax.tree.flatten(arrays)

    def kernel(*refs):
        inputs, first, out, last, *states, scratch = refs[: len(flat)], *refs[len(flat) :]

        @pl.when(pl.program_id(2) == 0)
        def _():
            scratch[...] = first[...]

        if keep:
            states[0][...] = scratch[...]
        after, out[...] = _chunk(scratch[...], tree.unflatten([x[...] for x in inputs]))
        scratch[...] = after

        @pl.when(pl.program_id(2) == count - 1)
        def _():
            last[...] = after

    step, whole, each = _specs(size, dim, width, lambda n: n)
    shapes = [(batch, heads, length, width), state.shape, (batch, heads, count, dim, width)]
    specs = [step(width), whole, each]
    return _call(
        kernel,
        (*flat, state),
        [*(step(x.shape[3]) for x in flat), whole],
        shapes[: 2 + keep],
        specs[: 2 + keep],
        (batch, heads, count),
        (dim, width),
    )


def _backward(arrays, states, d_out, d_last, size):
    batch, heads, count, dim, width = states.shape
    flat, tree = jax.tree.flatten(arrays)

    def kernel(*refs):
        inputs, (before, d_out, d_last) = refs[: len(flat)], refs[len(flat) : len(flat) + 3]
        *slopes, first, scratch = refs[len(flat) + 3 :]

        @pl.when(pl.program_id(2) == 0)
        def _():
            scratch[...] = d_last[...]

        _, pull = jax.vjp(_chunk, before[...], tree.unflatten([x[...] for x in inputs]))
        d_before, d_arrays = pull((scratch[...], d_out[...]))
        for slope, x in zip(slopes, jax.tree.leaves(d_arrays), strict=True):
            slope[...] = x
        scratch[...] = d_before

        @pl.when(pl.program_id(2) == count - 1)
        def _():
            first[...] = d_before

    step, whole, each = _specs(size, dim, width, lambda n: count - 1 - n)
    steps = [step(x.shape[3]) for x in flat]
    *slopes, first = _call(
        kernel,
        (*flat, states, d_out, d_last),
        [*steps, each, step(width), whole],
        [*(x.shape for x in flat), d_last.shape],
        [*steps, whole],
        (batch, heads, count),
        (dim, width),
    )
    return tree.unflatten(slopes), first


def _specs(size, dim, width, place):
    """Blocks of a chunk's steps, of a head's state, and of the state before a chunk."""

    def step(channels):
        return pl.BlockSpec((None, None, size, channels), lambda b, h, n: (b, h, place(n), 0))

    whole = pl.BlockSpec((None, None, dim, width), lambda b, h, n: (b, h, 0, 0))
    each = pl.BlockSpec((None, None, None, dim, width), lambda b, h, n: (b, h, place(n), 0, 0))
    return step, whole, each


def _call(kernel, arrays, in_specs, shapes, out_specs, grid, scratch):
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=0,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[pltpu.VMEM(scratch, jnp.float32)],
    )
    return tpu.run(kernel, arrays, results, grid=spec)
