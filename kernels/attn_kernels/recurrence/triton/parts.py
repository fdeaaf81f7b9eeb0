"""Sequences cut into parts, for as many programs as a device has places.

What a part does to a state is affine, `S -> M S + N`: N is what it writes into no state, M scales
the rows of a state by the decays of the part, or, with the delta rule, is what it makes of the
identity. Parts are walked once for M and N, which are chained, and once more from the states that
are then known. The cotangent of a state goes through `M^T`.
"""

import functools

import jax
import jax.numpy as jnp

from attn_kernels import gpu
from attn_kernels.recurrence.decay import FORGOTTEN, matmul
from attn_kernels.recurrence.triton import walk
from attn_kernels.varying import varying

PROCESSORS = gpu.MULTIPROCESSORS  # of a device
WARPS = 8  # that a processor has registers for
SHORTEST = 1024  # steps of a part


def number(length: int, state, options) -> int:
    """Into how many parts sequences are cut; `options` are those of `walk`."""
    batch, heads, dim, width = state.shape
    block, warps, *_ = walk.blocks(dim, options.get("gates"))
    return dividing(length, batch * heads * -(-width // block), warps)


def dividing(length: int, programs: int, warps: int) -> int:
    """How many equal parts a length has, for as many programs as a device has places.

    They are walked twice, so that two would take as long as one.
    """
    places, parts = PROCESSORS * WARPS // warps // programs, 1
    while 2 * parts <= places and length % (2 * parts * SHORTEST) == 0:
        parts *= 2
    return parts if parts > 2 else 1


def forward(parts: int, q, k, v, state, scale: float, options, keep: bool):
    """`walk`, and M."""
    if parts == 1:
        return *walk.walk(q, k, v, state, scale=scale, keep=keep, **options), None
    q, k, v, options = cut(parts, (q, k, v, options))
    empty = nothing(parts, state)
    _, written, _, _ = walk.walk(None, k, v, empty, outputs=False, **options)
    change = _change(k, empty, options)
    state = chained(parts, _applied, change, written, state)
    found = walk.walk(q, k, v, state, scale=scale, keep=keep, **options)
    out, last, states, written = found
    last = last.reshape(-1, parts, *last.shape[1:])[:, -1]
    return joined(parts, out), last, joined(parts, states), joined(parts, written), change


def backward(parts: int, q, k, d_out, d_last, scale: float, options, change, shared: bool):
    """`walk_back`."""
    if parts == 1:
        return walk.walk_back(q, k, d_out, d_last, scale=scale, shared=shared, **options)
    q, k, d_out, options = cut(parts, (q, k, d_out, options))
    empty = nothing(parts, d_last)
    _, read, _ = walk.walk_back(q, k, d_out, empty, scale=scale, keep=False, **options)
    back = functools.partial(_applied, reverse=True)
    d_last = chained(parts, back, change, read, d_last, reverse=True)
    found = walk.walk_back(q, k, d_out, d_last, scale=scale, shared=shared, **options)
    dv, d_first, d_states = found
    d_first = d_first.reshape(-1, parts, *d_first.shape[1:])[:, 0]
    return joined(parts, dv), d_first, joined(parts, d_states)


def cut(parts, tree):
    """`[B, T, ...]` to `[B parts, T / parts, ...]`."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[1] // parts, *x.shape[2:]), tree)


def joined(parts, x):
    """The inverse of `cut`."""
    return None if x is None else x.reshape(-1, parts * x.shape[1], *x.shape[2:])


def nothing(parts, state):
    """No state, for every part."""
    return varying(jnp.zeros((parts * state.shape[0], *state.shape[1:]), state.dtype), state)


def _change(k, state, options):
    """M of every part: a number, `[B parts, H or 1, 1 or D, 1]`, or `[B parts, H, D, D]`."""
    dim = state.shape[2]
    if options.get("beta") is not None:
        identity = state[..., :1] + jnp.eye(dim, dtype=state.dtype)
        return walk.walk(None, k, None, identity, outputs=False, **options)[1]
    if options.get("totals") is not None:
        change = options["totals"].prod(1)[..., None]
    elif options.get("gates") is not None:
        change = jnp.exp(jnp.maximum(options["gates"], FORGOTTEN).sum(1))
        change = change[..., None, None]
    else:
        return jnp.ones((state.shape[0], 1, 1, 1), state.dtype)
    return jnp.repeat(change, state.shape[1] // change.shape[1], 1)


def _applied(change, state, reverse=False):
    if change.shape[-1] == 1:
        return change * state
    return matmul(change.mT if reverse else change, state)


def chained(parts, apply, change, found, state, reverse=False):
    """The states before all parts; in reverse, their cotangents behind all parts.

    Args:
      parts: how many.
      apply: `apply(change, state)` is M of a state, in reverse M^T.
      change: what says M, of every part.
      found: N, what a part makes of no state.
      state: before the first part; in reverse, the cotangent behind the last.
      reverse: whether it is.
    """

    def apart(x):
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def body(state, part):
        change, found = part
        return apply(change, state) + found, state

    found = apart(change), apart(found)
    # A loop waits for the host at every turn.
    _, states = jax.lax.scan(body, state, found, reverse=reverse, unroll=parts)
    return jnp.moveaxis(states, 0, 1).reshape(-1, *state.shape[1:])
