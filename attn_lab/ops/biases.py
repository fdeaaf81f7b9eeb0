"""Biases on scores: by factors, by chances to exist, and by a positional map of their own."""

import math

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, ScoreMod, operand
from attn_lab.ops.attention import dot_product_attention

__all__ = [
    "existence_attention",
    "existence_bias",
    "factorized_bias_attention",
    "gated_positional_attention",
    "quadratic_position_scores",
    "squared_distance_bias_factors",
    "svd_bias_factors",
]


def factorized_bias_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias_q: jax.Array,
    bias_k: jax.Array,
    *,
    causal: bool = False,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with a bias of low rank: `scale <q_t, k_j> + <bias_q_t, bias_k_j>`.

    The factors lengthen queries and keys, so no bias of size `T S` is read.

    Args:
      q, k, v, causal, mask, scale, implementation: as in `dot_product_attention`.
      bias_q: `[B, T, H, R]`, or of batch 1.
      bias_k: `[B, S, H, R]` or `[B, S, K, R]`, or of batch 1.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if the factors do not fit.

    Source: Wu et al., FlashBias, 2025, arXiv 2505.12044.
    """
    (batch, q_len, heads, dim), (_, k_len, key_heads, _) = q.shape, k.shape
    rank = bias_q.shape[-1]
    if bias_q.shape[1:] != (q_len, heads, rank) or bias_q.shape[0] not in (1, batch):
        raise ValueError(f"bias_q must be [{batch} or 1, {q_len}, {heads}, R], got {bias_q.shape}")
    if (
        bias_k.shape[1::2] != (k_len, rank)
        or bias_k.shape[0] not in (1, batch)
        or bias_k.shape[2] not in (key_heads, heads)
    ):
        raise ValueError(
            f"bias_k must be [{batch} or 1, {k_len}, {heads} or {key_heads}, {rank}], "
            f"got {bias_k.shape}"
        )
    scale = 1 / math.sqrt(dim) if scale is None else scale
    k = jnp.repeat(k, bias_k.shape[2] // key_heads, axis=2)

    def join(x, factor):
        factor = jnp.broadcast_to(factor, (batch, *factor.shape[1:]))
        return jnp.concatenate([x, factor], -1)

    return dot_product_attention(
        join(scale * q, bias_q),
        join(k, bias_k),
        v,
        mask=mask,
        causal=causal,
        scale=1.0,
        implementation=implementation,
    )


def squared_distance_bias_factors(
    x_q: jax.Array, x_k: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Factors of rank `c + 2` of the bias `-alpha_h |x_t - y_j|^2`, for points in c dimensions.

    Args:
      x_q: the points of the queries, `[B, T, c]`.
      x_k: the points of the keys, `[B, S, c]`.
      alpha: `[H]`.

    Returns:
      `bias_q [B, T, H, c + 2]` and `bias_k [B, S, H, c + 2]` for `factorized_bias_attention`.

    Source: Wu et al., 2025, arXiv 2505.12044.
    """

    def squared(x):
        return jnp.sum(x**2, -1, keepdims=True)

    of_query = jnp.concatenate([squared(x_q), jnp.ones_like(x_q[..., :1]), -2 * x_q], -1)
    of_key = jnp.concatenate([jnp.ones_like(x_k[..., :1]), squared(x_k), x_k], -1)
    heads = alpha.shape[0]
    return -alpha[:, None] * of_query[:, :, None], jnp.repeat(of_key[:, :, None], heads, axis=2)


def svd_bias_factors(bias: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The best factors of a rank of an explicit bias: `U sqrt(S)` and `V sqrt(S)` of its SVD.

    Args:
      bias: `[B, H, T, S]`, any leading length.
      rank: R, at most `min(T, S)`, at which the product of the factors is the bias.

    Returns:
      `bias_q [B, T, H, R]` and `bias_k [B, S, H, R]` for `factorized_bias_attention`.

    Raises:
      ValueError: if the rank is out of range.

    Source: Wu et al., 2025, arXiv 2505.12044.
    """
    if not 1 <= rank <= min(bias.shape[-2:]):
        raise ValueError(f"rank must be within 1 and {min(bias.shape[-2:])}, got {rank}")
    left, size, right = jnp.linalg.svd(bias, full_matrices=False)
    root = jnp.sqrt(size[..., None, :rank])
    factors = left[..., :rank] * root, jnp.swapaxes(right[..., :rank, :], -1, -2) * root
    return tuple(jnp.swapaxes(x, 1, 2) for x in factors)


def existence_bias(existence: jax.Array) -> jax.Array:
    """A discount of later keys by the chance that they exist: `log e_j - log e_t`, for `j > t`.

    Args:
      existence: chances e, `[B, T]`; logarithms are of `max(e, 1e-20)`.

    Returns:
      `[B, 1, T, T]`, 0 for `j <= t`.

    Source: Zonkey, 2026.
    """
    position = jnp.arange(existence.shape[1])
    of_query, of_key = _log_existence(existence)
    return _discount(0.0, None, None, position[:, None], position, of_query, of_key)


def existence_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    existence: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention, without causality, over tokens that exist with a probability.

    The scores are `scale <q_t, k_j> + existence_bias`; keys with e = 0 are forbidden, and queries
    with e = 0 give 0.

    Args:
      q, k, v, scale, implementation: as in `dot_product_attention`, with T = S.
      existence: chances e, `[B, T]`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Zonkey, 2026.
    """
    for name, x in ("q", q), ("k", k):
        if existence.shape != x.shape[:2]:
            raise ValueError(
                f"existence must be {list(x.shape[:2])} as {name}, got {list(existence.shape)}"
            )
    some = existence > 0
    return engine.attention(
        q,
        k,
        v,
        mask=Mask(_both, (operand(some, "bq"), operand(some, "bk"))),
        score_mod=ScoreMod(_discount, _log_existence(existence)),
        scale=scale,
        implementation=implementation,
    )


def gated_positional_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position_scores: jax.Array,
    gate: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """A gated mean of attention by content and by position alone, with `g = sigmoid(gate_h)`.

    `((1 - g) softmax(scale q k^T) + g softmax(position_scores)) v`.

    Args:
      q, k, v, scale, implementation: as in `dot_product_attention`.
      position_scores: `[H, T, S]`, not scaled.
      gate: `[H]`, first 1.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if the shape of `position_scores` or `gate` does not fit.

    Source: d'Ascoli et al., ConViT, 2021, arXiv 2103.10697.
    """
    heads = q.shape[2]
    wanted = heads, q.shape[1], k.shape[1]
    if position_scores.shape != wanted or gate.shape != (heads,):
        raise ValueError(
            f"position_scores must be {list(wanted)} and gate [{heads}], "
            f"got {list(position_scores.shape)} and {list(gate.shape)}"
        )
    content = dot_product_attention(q, k, v, scale=scale, implementation=implementation)
    q, k = jnp.zeros_like(q[..., :1]), jnp.zeros_like(k[..., :1])
    place = dot_product_attention(q, k, v, bias=position_scores, implementation=implementation)
    wide = jnp.result_type(v, gate, jnp.float32)
    g = jax.nn.sigmoid(gate.astype(wide))[:, None]
    return ((1 - g) * content.astype(wide) + g * place.astype(wide)).astype(v.dtype)


def quadratic_position_scores(
    pos_w: jax.Array, pos_b: jax.Array, *, shape: tuple[int, int]
) -> jax.Array:
    """Scores of offsets on a grid: `<(dx, dy, dx^2 + dy^2), pos_w_h> + pos_b_h`, key minus query.

    Args:
      pos_w: `[3, H]`.
      pos_b: `[H]`.
      shape: (Y, X) of the grid; x runs fastest.

    Returns:
      `[H, T, T]` with T = Y X.

    Source: d'Ascoli et al., 2021, arXiv 2103.10697.
    """
    y, x = (axis.reshape(-1) for axis in jnp.indices(shape))
    dx, dy = x - x[:, None], y - y[:, None]
    features = jnp.stack([dx, dy, dx**2 + dy**2]).astype(pos_w.dtype)
    return jnp.einsum("fij,fh->hij", features, pos_w) + pos_b[:, None, None]


def _log_existence(existence):
    logs = jnp.log(jnp.maximum(existence, 1e-20))
    return operand(logs, "bq"), operand(logs, "bk")


def _discount(score, b, h, q_index, k_index, of_query, of_key):
    return score + jnp.where(k_index > q_index, of_key - of_query, 0)


def _both(b, h, q_index, k_index, of_query, of_key):
    return of_query & of_key
