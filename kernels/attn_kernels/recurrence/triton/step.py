"""One step of the recurrence, for decoding: the state is read and written once."""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from attn_kernels.recurrence import definition
from attn_kernels.recurrence.triton.call import launch
from attn_kernels.recurrence.triton.tiles import fade

NUMBERS = 8192  # of the state that a program has
WARPS = 4


@triton.jit
def _step(
    state_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, beta_ptr, out_ptr, last_ptr,
    heads: tl.constexpr, q_heads: tl.constexpr, k_heads: tl.constexpr, v_heads: tl.constexpr,
    gate_heads: tl.constexpr, beta_heads: tl.constexpr, dim: tl.constexpr, width: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr, per_head: tl.constexpr, per_channel: tl.constexpr,
    delta: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    d = tl.arange(0, rows)
    e = tl.program_id(1) * columns + tl.arange(0, columns)
    in_d, in_e = d < dim, e < width
    q_at = b * q_heads + h // (heads // q_heads)
    k_at = b * k_heads + h // (heads // k_heads)
    v_at = b * v_heads + h // (heads // v_heads)
    at = row * dim * width + d[:, None] * width + e[None, :]
    inside = in_d[:, None] & in_e[None, :]
    state = tl.load(state_ptr + at, mask=inside, other=0.0)
    q = tl.load(q_ptr + q_at * dim + d, mask=in_d, other=0.0).to(tl.float32) * scale
    k = tl.load(k_ptr + k_at * dim + d, mask=in_d, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + v_at * width + e, mask=in_e, other=0.0).to(tl.float32)
    if per_head or per_channel:
        gate_at = b * gate_heads + h // (heads // gate_heads)
        if per_channel:
            gate = tl.load(gate_ptr + gate_at * dim + d, mask=in_d, other=0.0).to(tl.float32)
        else:
            gate = tl.load(gate_ptr + gate_at).to(tl.float32) + tl.zeros([rows], tl.float32)
        kept, change = fade(gate)
        state = kept[:, None] * state + change[:, None] * state
    if delta:
        beta_at = b * beta_heads + h // (heads // beta_heads)
        beta = tl.load(beta_ptr + beta_at).to(tl.float32)
        v = beta * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * v[None, :]
    out = tl.sum(state * q[:, None], 0)
    tl.store(out_ptr + row * width + e, out.to(out_ptr.dtype.element_ty), mask=in_e)
    tl.store(last_ptr + at, state, mask=inside)


@functools.partial(jax.custom_jvp, nondiff_argnums=(6,))
def step(state, q, k, v, log_decay, beta, scale: float):
    """The output and the state after a step; its derivatives are those of the definition.

    Args:
      state: `[B, H, D, Dv]`, float32.
      q, k: `[B, heads, D]`, whose heads divide H, as do all others.
      v: `[B, heads, Dv]`.
      log_decay: `[B, heads]`, `[B, heads, D]` or None.
      beta: `[B, heads]` or None.
      scale: a number.

    Returns:
      `[B, H, Dv]` in the dtype of v, and the state.
    """
    batch, heads, dim, width = state.shape
    gate, strength = (q if x is None else x for x in (log_decay, beta))
    arrays = dict(q=q, k=k, v=v, gate=gate, beta=strength)
    rows, columns = _block(dim, width)
    out, last = launch(
        _step,
        (state, *arrays.values()),
        (jax.ShapeDtypeStruct((batch, heads, width), v.dtype), state),
        (heads, triton.cdiv(width, columns)),
        warps=WARPS,
        aliases={0: 1},
        **{f"{name}_heads": x.shape[1] for name, x in arrays.items()},
        heads=heads,
        dim=dim,
        width=width,
        rows=rows,
        columns=columns,
        per_head=log_decay is not None and log_decay.ndim == 2,
        per_channel=log_decay is not None and log_decay.ndim == 3,
        delta=beta is not None,
        scale=scale,
    )
    return out, last


def _block(dim, width):
    """Key and value channels of a program."""
    rows = triton.next_power_of_2(dim)
    return rows, max(8, min(NUMBERS // rows, triton.next_power_of_2(width)))


@step.defjvp
def _step_jvp(scale, primals, tangents):
    def defined(state, q, k, v, log_decay, beta):
        heads = state.shape[1]

        def matched(x, rank):
            x = jnp.repeat(x.astype(jnp.float32), heads // x.shape[1], 1)
            return x[..., None] if x.ndim < rank else x

        if log_decay is None:
            log_decay = jnp.zeros((1, 1))
        out, last = definition.update(
            state,
            matched(q, 3) * scale,
            matched(k, 3),
            matched(v, 3),
            matched(log_decay, 3),
            None if beta is None else matched(beta, 3),
        )
        return out.astype(v.dtype), last

    return jax.jvp(defined, primals, tangents)
