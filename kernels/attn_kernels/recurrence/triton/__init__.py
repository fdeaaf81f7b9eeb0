"""The recurrence in chunks on GPUs, by Triton: all writes and decays.

The equations are those of `chunked`. Chunks are prepared side by side, then a program walks a head
(`walk`); the derivative walks back, and what is left of it is again side by side (`delta`, and
`channels` for decay per channel).
"""

import functools

import jax
import jax.numpy as jnp

from attn_kernels.recurrence.triton import channels, delta, parts
from attn_kernels.recurrence.triton.tiles import SIZE
from attn_kernels.varying import varying

WIDEST = 512  # channels


def refusal(q, k, v, log_decay, beta, state, chunk_size: int) -> str | None:
    """Why the kernels cannot serve a call, None if they can."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"q, k and v are bfloat16 or float16, not {q.dtype}, {k.dtype}, {v.dtype}"
    if state.dtype != jnp.float32:
        return f"states are in float32, not {state.dtype}"
    if max(state.shape[2:]) > WIDEST:
        return f"D and Dv are up to {WIDEST}, they were {state.shape[2]} and {state.shape[3]}"
    if beta is not None and log_decay.shape[-1] > 1:
        return "it has no delta rule with decay per channel"
    if chunk_size != SIZE:
        return f"chunk_size is {SIZE}, it was {chunk_size}"
    return None


def chunked(q, k, v, log_decay, state, scale: float, beta=None):
    """The outputs and the last state, differentiable once in reverse mode.

    Args:
      q, k: `[B, T, heads, D]`, whose heads divide H.
      v: `[B, T, heads, Dv]`.
      log_decay: `[B, T, heads]`, `[B, T, heads, D]` or None.
      state: `[B, H, D, Dv]`.
      scale: a number.
      beta: `[B, T, heads]`, or None.
    """

    def whole(x):
        return None if x is None else jnp.broadcast_to(x, (q.shape[0], *x.shape[1:]))

    def wide(x):
        return x if x is None or x.ndim == 4 else x.astype(jnp.float32)

    args = q, k, v, wide(whole(log_decay)), wide(whole(beta)), state
    return _run(scale, *varying(args, args))


def _prepared(scale, q, k, gates, beta, heads):
    """What `walk` reads of q and k, its scale, and what else it reads."""
    if gates is not None and gates.ndim == 4:
        q, k, weights, totals = channels.prepare_channels(q, k, gates, heads, scale)
        return (q, k), 1.0, dict(weights=weights, totals=totals)
    if beta is None:
        return (q, k), scale, dict(gates=gates)
    inverse, weights = delta.prepare(q, k, beta, gates, heads, scale)
    return (q, k), scale, dict(inverse=inverse, weights=weights, beta=beta, gates=gates)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(scale, q, k, v, gates, beta, state):
    pair, scale, options = _prepared(scale, q, k, gates, beta, state.shape[1])
    count = parts.number(q.shape[1], state, options)
    out, last, *_ = parts.forward(count, *pair, v, state, scale, options, keep=False)
    return out, last


def _run_fwd(scale, q, k, v, gates, beta, state):
    pair, scale, options = _prepared(scale, q, k, gates, beta, state.shape[1])
    count = parts.number(q.shape[1], state, options)
    out, last, *kept = parts.forward(count, *pair, v, state, scale, options, keep=True)
    return (out, last), (q, k, v, gates, beta, pair, options, *kept)


def _run_bwd(scale, saved, cotangents):
    q, k, v, gates, beta, pair, options, states, written, change = saved
    d_out, d_last = cotangents
    per_channel = "totals" in options
    count = parts.number(q.shape[1], d_last, options)
    walk_scale = 1.0 if per_channel else scale
    shared = beta is None and v.shape[2] < d_last.shape[1]
    found = parts.backward(count, *pair, d_out, d_last, walk_scale, options, change, shared)
    dv, d_first, d_states = found
    d_beta = None
    if per_channel:
        prepared = *pair, options["totals"]
        dq, dk, d_gates = channels.local_channels(
            q, k, v, gates, *prepared, states, d_out, d_states, scale
        )
    elif beta is None:
        args = None, None, gates, None, d_out, states, d_states, v, None
        dq, dk, _, _, d_gates = delta.local(q, k, *args, scale)
    else:
        args = v, beta, gates, options["weights"], d_out, states, d_states, written, dv
        dq, dk, dv, d_beta, d_gates = delta.local(q, k, *args, scale)
    slopes = dq, dk, dv, d_gates, d_beta
    return *map(_collected, slopes, (q, k, v, gates, beta)), d_first


_run.defvjp(_run_fwd, _run_bwd)


def _collected(x, like):
    """The sum over the heads that read the same."""
    if x is None or x.shape == like.shape:
        return x
    x = x.astype(jnp.float32).reshape(*like.shape[:3], -1, *x.shape[3:])
    return x.sum(3).astype(like.dtype)
