"""The recurrence as it is defined: step by step, and as one matrix over all pairs of steps.

Arrays have their heads first: q, k `[B, H, T, D]`, v `[B, H, T, Dv]`, log_decay `[B, H, T, D]` or
`[B, H, T, 1]` (broadcastable), beta `[B, H, T, 1]` or None, state `[B, H, D, Dv]`.
"""

import jax
import jax.numpy as jnp

from attn_kernels.recurrence.decay import between, decayed, matmul, since_start, until_end
from attn_kernels.recurrence.triangular import unit_lower_inverse


def update(state, q, k, v, log_decay, beta):
    """One step: decay, erase, write, read; the arrays are those of one step, without T."""
    state = decayed(state, log_decay)
    if beta is not None:
        v = beta * (v - _read(state, k))
    state = state + k[..., :, None] * v[..., None, :]
    return _read(state, q), state


def recurrent(q, k, v, log_decay, beta, state):
    """A scan over the steps. O(1) memory in T forward; its derivative keeps all T states."""
    steps = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (q, k, v, log_decay, beta))

    def body(state, step):
        out, state = update(state, *step)
        return state, out

    state, out = jax.lax.scan(body, state, steps)
    return jnp.moveaxis(out, 0, 2), state


def parallel(q, k, v, log_decay, beta, state):
    """One lower triangular `[T, T]` matrix, `[T, T, D]` with decay per channel; for small T."""
    decay = jnp.exp(between(log_decay))

    def product(x):
        if decay.shape[-1] == 1:
            return matmul(x, k.mT) * decay[..., 0]
        return (x[..., :, None, :] * k[..., None, :, :] * decay).sum(-1)

    carried = jnp.exp(since_start(log_decay))
    if beta is not None:
        errors = beta * (v - matmul(k * carried, state))
        v = matmul(unit_lower_inverse(beta * product(k)), errors)
    out = matmul(q * carried, state) + matmul(product(q), v)
    written = matmul((k * jnp.exp(until_end(log_decay))).mT, v)
    return out, decayed(state, log_decay.sum(-2)) + written


def _read(state, key):
    return matmul(key[..., None, :], state)[..., 0, :]
