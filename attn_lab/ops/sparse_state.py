"""States of several partitions, of which a token writes and reads the few that it belongs to."""

import jax
import jax.numpy as jnp

from attn_kernels import recurrence as engine

__all__ = ["row_sparse_key", "sparse_state_expansion"]


def row_sparse_key(k_logits: jax.Array, *, top_k: int) -> jax.Array:
    """Keys that write few rows of a state: the `top_k` largest entries of a softmax, others 0.

    The entries keep their values and are not normalised again; of equal ones the first win.

    Args:
      k_logits: `[..., D]`.
      top_k: how many channels a key keeps.

    Returns:
      The shape and dtype of `k_logits`.

    Raises:
      ValueError: if `top_k` is not between 1 and D.

    Source: Scaling Linear Attention with Sparse State Expansion, 2025, arXiv 2507.16577.
    """
    k = jax.nn.softmax(k_logits.astype(jnp.result_type(k_logits, jnp.float32)), -1)
    return jnp.where(_largest(k, top_k, "top_k"), k, 0).astype(k_logits.dtype)


def sparse_state_expansion(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    router_logits: jax.Array,
    *,
    num_write: int = 1,
    num_read: int = 1,
    gate_write: bool = True,
    gate_read: bool = True,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    beta: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Gated linear attention over N states, of which a router picks those to write and to read.

    With `e_t = softmax(router_logits_t)` and the indicators w_t and r_t of its largest entries:

        S^n_t = exp(w_tn g_t) S^n_{t-1} + w_tn e_tn k_t v_t^T
        o_t = scale sum_n r_tn e_tn (S^n_t)^T q_t

    A state that is not picked neither decays nor is written. Of equal entries the first are picked.

    Args:
      q, k, v, log_decay: as in `gated_linear_attention`.
      router_logits: `[B, T, N]`, for all heads.
      num_write, num_read: how many states a token writes and reads.
      gate_write, gate_read: whether e multiplies what is written and what is read.
      scale: by default `1 / sqrt(D)`.
      initial_state: `[B, N, H, D, Dv]`, by default 0.
      return_state: whether to return the last states as well.
      beta: write strengths `[B, T, H]` of the gated delta rule, which erases with the masked key
        `w_tn e_tn k_t` before it writes; None writes additively.
      segment_ids: see `attn_kernels.recurrence.linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the states `[B, N, H, D, Dv]`, in
      float32 or better.

    Raises:
      ValueError: if shapes do not fit, or a number is not between 1 and N.

    Source: Scaling Linear Attention with Sparse State Expansion, 2025, arXiv 2507.16577.
    """
    batch, length, dtype = *q.shape[:2], v.dtype
    if router_logits.ndim != 3 or router_logits.shape[:2] != (batch, length):
        raise ValueError(
            f"router_logits must be [B, T, N] with the batch and length of q {q.shape}, "
            f"got {list(router_logits.shape)}"
        )
    wide = jnp.result_type(jnp.float32, q, k, v, log_decay, router_logits)
    shares = jax.nn.softmax(router_logits.astype(wide), -1)
    partitions = shares.shape[-1]
    written, read = (
        _largest(shares, count, name)
        for count, name in ((num_write, "num_write"), (num_read, "num_read"))
    )
    q, k, v, log_decay, beta = engine.match_heads(
        *(None if x is None else x.astype(wide) for x in (q, k, v, log_decay, beta))
    )

    def split(x, picked, gated=False):
        """`[B, T, H, ...]` to `[B, T, H N, ...]`, 0 in the states that are not picked."""
        shape = batch, length, 1, partitions, *(1,) * (x.ndim - 3)
        factor = shares.reshape(shape) if gated else 1
        parts = jnp.where(picked.reshape(shape), factor * x[:, :, :, None], 0)
        return parts.reshape(batch, length, -1, *x.shape[3:])

    heads, dims = v.shape[2], (q.shape[-1], v.shape[-1])
    if initial_state is not None:
        if initial_state.shape != (batch, partitions, heads, *dims):
            raise ValueError(
                f"initial_state must be [B, N, H, D, Dv] = {[batch, partitions, heads, *dims]}, "
                f"got {list(initial_state.shape)}"
            )
        initial_state = jnp.swapaxes(initial_state, 1, 2).reshape(batch, -1, *dims)
    out, state = engine.linear_attention(
        split(q, read, gate_read),
        split(k, written, gate_write),
        v,
        log_decay=split(log_decay, written),
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        return_state=True,
        segment_ids=segment_ids,
    )
    out = out.reshape(batch, length, heads, partitions, -1).sum(3).astype(dtype)
    state = jnp.swapaxes(state.reshape(batch, heads, partitions, *dims), 1, 2)
    return (out, state) if return_state else out


def _largest(x, count, name):
    """Whether an entry is among the `count` largest of the last axis; the first of equal ones."""
    if not 1 <= count <= x.shape[-1]:
        raise ValueError(f"{name} must be between 1 and {x.shape[-1]}, got {count}")
    picked = jax.lax.top_k(jax.lax.stop_gradient(x), count)[1]
    return jax.nn.one_hot(picked, x.shape[-1], dtype=bool).any(-2)
