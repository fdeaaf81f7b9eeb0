"""The recurrence in chunks: matrix products within a chunk, one scan over chunks for the state.

With `b_t` the sum of the log decays from the chunk's start, `A(x)_ts = sum_d x_td k_sd exp(b_td -
b_sd)` for s <= t, and S the state before the chunk, what step s writes is `k_s u_s^T`, where

    additive:    u = v
    delta rule:  (I + strictly_lower(beta A(k))) u = beta (v - (k exp(b)) S)

    o = (q exp(b)) S + A(q) u
    S <- exp(b_C) S + (k exp(b_C - b))^T u

The arrays are laid out as in `definition`.
"""

import functools

import jax
import jax.numpy as jnp

from attn_kernels.recurrence.decay import between, decayed, matmul, since_start, until_end
from attn_kernels.recurrence.triangular import unit_lower_inverse

AT_ONCE = 8  # chunks prepared side by side: their squares per channel are the largest arrays

_remat = functools.partial(jax.checkpoint, prevent_cse=False)


def chunked(q, k, v, log_decay, beta, state, chunk_size, sub_chunk_size):
    """The outputs and the last state; a derivative keeps one state a chunk."""
    length = q.shape[2]
    size = min(chunk_size, length)
    count = -(-length // size)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - length), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, size, x.shape[-1]), 2, 0)

    @_remat
    def prepare(q, k, v, log_decay, beta):
        """All that a chunk can compute before it knows its state."""
        product = functools.partial(decayed_product, k=k, log_decay=log_decay, base=sub_chunk_size)
        carried, reader = jnp.exp(since_start(log_decay)), None
        if beta is not None:
            inverse = unit_lower_inverse(beta * product(k))
            v, reader = matmul(inverse, beta * v), matmul(inverse, beta * k * carried)
        kept = k * jnp.exp(until_end(log_decay))
        return q * carried, product(q), kept, v, reader, log_decay.sum(-2)

    @_remat
    def body(state, chunk):
        q, weights, k, v, reader, log_decay = chunk
        if reader is not None:
            v = v - matmul(reader, state)
        out = matmul(q, state) + matmul(weights, v)
        return decayed(state, log_decay) + matmul(k.mT, v), out

    chunks = jax.lax.map(
        lambda chunk: prepare(*chunk),
        jax.tree.map(cut, (q, k, v, log_decay, beta)),
        batch_size=AT_ONCE,
    )
    state, out = jax.lax.scan(body, state, chunks)
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], count * size, -1)[:, :, :length], state


def decayed_product(x, k, log_decay, base):
    """`sum_d x_td k_sd exp(sum_{s < u <= t} log_decay_ud)` for s <= t, else 0.

    A decay per channel does not factor out of the sum, so the square is split in halves: the later
    steps see the earlier ones through the boundary, a matrix product whose factors only decay, and
    the two halves are squares again. Squares of `base` steps are summed outright.

    Args:
      x, k: `[N, ..., C, D]`.
      log_decay: `[N, ..., C, D]` or `[N, ..., C, 1]`.
      base: the largest square that is summed outright.

    Returns:
      `[N, ..., C, C]`.
    """
    size = k.shape[-2]
    if log_decay.shape[-1] == 1:
        return matmul(x, k.mT) * jnp.exp(between(log_decay))[..., 0]
    if size <= base:
        return (x[..., :, None, :] * k[..., None, :, :] * jnp.exp(between(log_decay))).sum(-1)
    half = -(-size // 2)

    def halves(y):
        y = jnp.pad(y, [(0, 0)] * (y.ndim - 2) + [(0, 2 * half - size), (0, 0)])
        return y[..., :half, :], y[..., half:, :]

    pairs = halves(x), halves(k), halves(log_decay)
    squares = decayed_product(*(jnp.concatenate(pair) for pair in pairs), base)
    first, second = jnp.split(squares, 2)
    (_, later), (earlier, _), (g_first, g_second) = pairs
    later = later * jnp.exp(since_start(g_second))
    earlier = earlier * jnp.exp(until_end(g_first))
    rows = (
        jnp.concatenate([first, jnp.zeros_like(first)], -1),
        jnp.concatenate([matmul(later, earlier.mT), second], -1),
    )
    return jnp.concatenate(rows, -2)[..., :size, :size]
