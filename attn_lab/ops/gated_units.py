"""Attention of gated units: one head, squared rectified weights within chunks, linear beyond."""

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_lab.ops.masks import causal_mask

__all__ = ["attentive_gate", "mixed_chunk_attention"]

relu_squared = engine.Pointwise(lambda scores: jax.nn.relu(scores) ** 2)


def mixed_chunk_attention(
    q_quad: jax.Array,
    k_quad: jax.Array,
    q_lin: jax.Array,
    k_lin: jax.Array,
    v: jax.Array,
    *,
    group_size: int,
    causal: bool = False,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with weights `relu(s / g)^2` within chunks of g, plus linear attention over all.

    With `w_tj = relu(<q_quad_t, k_quad_j> / g)^2` for j in the chunk of t, and j <= t if causal:

        o_t = sum_j w_tj v_j + q_lin_t sum_s k_lin_s v_s^T / n

    where s runs over the whole sequence and n is T, or over the chunks before that of t and n is g
    if causal.

    Args:
      q_quad, k_quad, q_lin, k_lin: `[B, T, D]`.
      v: `[B, T, E]`.
      group_size: g.
      causal: whether a token sees only those up to its own.
      mask: bool `[B, T]`; the tokens that may be seen.
      implementation: of the part within chunks: see `attn_kernels.attention.attention`.

    Returns:
      `[B, T, E]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit or `group_size` is not positive.

    Source: Hua et al., 2022, arXiv 2202.10447; Zhao and Ma, MossFormer, 2023, arXiv 2302.11824.
    """
    shapes = [x.shape for x in (q_quad, k_quad, q_lin, k_lin)]
    if len({*shapes}) > 1 or q_quad.ndim != 3 or v.ndim != 3 or v.shape[:2] != shapes[0][:2]:
        raise ValueError(f"queries and keys must be [B, T, D], v [B, T, E]: {shapes}, {v.shape}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    if mask is not None and mask.shape != v.shape[:2]:
        raise ValueError(f"mask must be [B, T] = {list(v.shape[:2])}, got {list(mask.shape)}")
    (batch, length, _), dtype = v.shape, v.dtype
    size = min(group_size, length)
    wide = jnp.result_type(q_quad, k_quad, q_lin, k_lin, v, jnp.float32)
    v = v if mask is None else jnp.where(mask[..., None], v, 0)

    def chunks(x):
        x = jnp.pad(x.astype(wide), ((0, 0), (0, -length % size), (0, 0)))
        return x.reshape(batch, -1, size, x.shape[-1])

    q_quad, k_quad, q_lin, k_lin, v = map(chunks, (q_quad, k_quad, q_lin, k_lin, v))
    local = engine.attention(
        *(x.reshape(-1, size, 1, x.shape[-1]) for x in (q_quad, k_quad, v)),
        mask=causal_mask() if causal else None,
        normalizer=relu_squared,
        scale=1 / group_size,
        implementation=implementation,
    )
    states = jnp.einsum("bntd,bnte->bnde", k_lin, v, precision="highest")
    if causal:
        states = (jnp.cumsum(states, 1) - states) / group_size
    else:
        states = states.sum(1, keepdims=True) / length
    far = jnp.matmul(q_lin, states, precision="highest")
    out = local.reshape(v.shape) + far
    return out.reshape(batch, -1, v.shape[-1])[:, :length].astype(dtype)


def attentive_gate(att_u: jax.Array, att_v: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Two halves gate each other's attention: `att_u v sigmoid(att_v u)`.

    Args:
      att_u, att_v, u, v: of the same shape.

    Returns:
      The same shape, in the dtype of v.

    Source: Zhao and Ma, MossFormer, 2023, arXiv 2302.11824.
    """
    wide = jnp.result_type(att_u, att_v, u, v, jnp.float32)
    gate = jax.nn.sigmoid(att_v.astype(wide) * u)
    return (att_u.astype(wide) * v * gate).astype(v.dtype)
