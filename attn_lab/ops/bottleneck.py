"""Attention through a fixed number of rows: latent variables, or projections of the length."""

import jax
import jax.numpy as jnp

from attn_kernels import recurrence as engine
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.linear_weights import efficient_attention
from attn_lab.ops.running import running_exp

__all__ = [
    "causal_latte_attention",
    "latte_attention",
    "linformer_attention",
]

LatteState = tuple[jax.Array, jax.Array, jax.Array]


def latte_attention(
    q_logits: jax.Array,
    k_logits: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    mask: jax.Array | None = None,
    return_state: bool = False,
    initial_state: LatteState | None = None,
) -> jax.Array | tuple[jax.Array, LatteState]:
    """Attention through L latent variables: queries choose latents, and latents choose positions.

        o_t = sum_l softmax_L(q_logits_t)_l  sum_s e^{k_logits_sl} v_s / sum_s e^{k_logits_sl}

    When causal, both sums are over `s <= t`.

    Args:
      q_logits: `[B, T, H, L]`.
      k_logits: `[B, T, K, L]`; K divides H.
      v: `[B, T, K, D]`.
      causal: whether positions see their past alone.
      mask: bool `[B, T]`; True may be read. Without any such position the output is 0.
      return_state: whether to return the state as well; needs `causal`.
      initial_state: from an earlier causal call, whose positions these follow.

    Returns:
      `[B, T, H, D]` in the dtype of v; with `return_state` also `(c, z, m)` in float32 or better:
      the sums of `e^{k - m} v`, `[B, H, L, D]`, and of `e^{k - m}`, `[B, H, L]`, and the largest
      logit m so far.

    Raises:
      ValueError: if shapes do not fit, or a state is asked for without `causal`.

    Source: Dolga et al., Latte, 2024, arXiv 2402.17512.
    """
    if causal:
        out, state = causal_latte_attention(
            q_logits, k_logits, v, mask=mask, initial_state=initial_state
        )
        return (out, state) if return_state else out
    if return_state or initial_state is not None:
        raise ValueError("initial_state and return_state need causal=True")
    return efficient_attention(q_logits, k_logits, v, mask=mask)


def causal_latte_attention(
    q_logits: jax.Array,
    k_logits: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    initial_state: LatteState | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, LatteState]:
    """Causal `latte_attention` that goes on from a state and leaves one.

    It is gated linear attention: `e^{k_t - m_t}` are written, with m the largest logit so far, the
    state decays by `e^{m_{t-1} - m_t}`, and what latents read is divided by their own sum.

    Args:
      q_logits, k_logits, v, mask, initial_state: as in `latte_attention`.
      segment_ids: integers `[B, T]`: documents of a packed row, as in `linear_attention` of engine
        2.

    Returns:
      `[B, T, H, D]` in the dtype of v, and the state.

    Raises:
      ValueError: if shapes do not fit.

    Source: Dolga et al., Latte, 2024, arXiv 2402.17512.
    """
    wide = jnp.result_type(jnp.float32, q_logits, k_logits, v)
    chosen = jax.nn.softmax(q_logits.astype(wide), axis=-1)
    chosen, logits, values = engine.match_heads(chosen, k_logits.astype(wide), v.astype(wide))
    sums = total = peak = None
    if initial_state is not None:
        sums, total, peak = initial_state
        total, peak = total.reshape(total.shape[0], -1, 1), peak[:, None]
    weights, log_decay, peak = running_exp(logits, peak=peak, mask=mask, segment_ids=segment_ids)
    flat = *weights.shape[:2], -1
    totals, total = engine.diagonal_recurrence(
        weights.reshape(flat),
        log_decay.reshape(*flat, 1),
        initial_state=total,
        return_state=True,
    )
    totals = totals.reshape(weights.shape)
    out, sums = engine.linear_attention(
        chosen / jnp.where(totals > 0, totals, 1),
        weights,
        values,
        log_decay=log_decay,
        scale=1.0,
        initial_state=sums,
        return_state=True,
        segment_ids=segment_ids,
    )
    return out.astype(v.dtype), (sums, total.reshape(sums.shape[:3]), peak[:, 0])


def linformer_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    proj_k: jax.Array,
    proj_v: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention to P rows, into which keys and values are projected along the length.

        o = softmax(scale q (E k)^T) (F v)

    Padding must be 0 in k and v.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      proj_k, proj_v: E and F, `[P, N]` or for every head `[H, P, N]`; of their N columns the first
        S are used.
      scale, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Wang et al., 2020, arXiv 2006.04768.
    """
    wide = jnp.result_type(jnp.float32, q, k, v)
    keys, values = engine.match_heads(
        _shortened("proj_k", proj_k, k.astype(wide)), _shortened("proj_v", proj_v, v.astype(wide))
    )
    out = dot_product_attention(
        q.astype(wide), keys, values, scale=scale, implementation=implementation
    )
    return out.astype(v.dtype)


def _shortened(name, proj, x):
    """`x [B, S, K, D]` with its length projected: `[B, P, K or H, D]`."""
    if proj.ndim not in (2, 3) or proj.shape[-1] < x.shape[1]:
        raise ValueError(
            f"{name} must be [P, N] or [H, P, N] with N at least {x.shape[1]}, got {proj.shape}"
        )
    proj = proj[..., : x.shape[1]].astype(x.dtype)
    proj = proj[None] if proj.ndim == 2 else proj
    proj, x = engine.match_heads(jnp.swapaxes(proj, 0, 1)[None], x)
    return jnp.einsum("phs,bshd->bphd", proj[0], x, precision="highest")
