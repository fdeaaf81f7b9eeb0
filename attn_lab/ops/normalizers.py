"""Attention with other normalisers than softmax, and the normalisers themselves on arrays."""

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, operand
from attn_lab.ops.attention import bias_mod
from attn_lab.ops.masks import as_mask

__all__ = [
    "clipped_softmax",
    "clipped_softmax_attention",
    "entmax",
    "entmax15",
    "entmax_attention",
    "normalized_attention",
    "rectified_linear_attention",
    "relu_attention",
    "similarity_attention",
    "sinkhorn",
    "sinkhorn_attention",
    "sparsemax",
    "straight_through_hard_attention",
    "taylor_attention",
    "topk_attention",
]

LENGTH_SCALES = {"sqrt_half": lambda n: jnp.sqrt(n / 2), "inverse": lambda n: n}


def clipped_softmax(
    scores: jax.Array, *, gamma: float, eta: float = 1.0, mask: jax.Array | None = None
) -> jax.Array:
    """Softmax stretched and clipped, which reaches 0 and 1: `clip((eta - gamma) p + gamma, 0, 1)`.

    Args:
      scores: `[..., S]`.
      gamma: at most 0.
      eta: at least 1.
      mask: bool, broadcastable to `scores`; False entries get weight 0.

    Returns:
      The weights, of the shape and dtype of `scores`; rows do not sum to 1.

    Source: Bondarenko et al., 2023, arXiv 2306.12929.
    """
    return _on_rows(engine.clipped_softmax(gamma, eta), scores, mask)


def clipped_softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    gamma: float,
    eta: float = 1.0,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention whose softmax is stretched and clipped, so that heads can do nothing.

    `w = clip((eta - gamma) softmax(s) + gamma, 0, 1)`, not normalised again.

    Args:
      q, k, v, mask, bias, causal, scale, implementation: as in `dot_product_attention`.
      gamma: at most 0; -alpha / S with alpha of a few adapts to the length.
      eta: at least 1.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Bondarenko et al., Quantizable Transformers, 2023, arXiv 2306.12929.
    """
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias),
        normalizer=engine.clipped_softmax(gamma, eta),
        scale=scale,
        implementation=implementation,
    )


def sparsemax(x: jax.Array, *, axis: int = -1, mask: jax.Array | None = None) -> jax.Array:
    """The Euclidean projection onto the simplex: `max(x - tau, 0)`, which sums to 1.

    Args:
      x: any shape.
      axis: along which to normalise.
      mask: bool, broadcastable to x; False entries get weight 0.

    Returns:
      The shape and dtype of x.

    Source: Martins & Astudillo, 2016, arXiv 1602.02068.
    """
    return entmax(x, 2.0, axis=axis, mask=mask)


def entmax15(x: jax.Array, *, axis: int = -1, mask: jax.Array | None = None) -> jax.Array:
    """Entmax of alpha 1.5: `max(x / 2 - tau, 0)^2`, which sums to 1.

    Args:
      x, axis, mask: as in `sparsemax`.

    Returns:
      The shape and dtype of x.

    Source: Peters, Niculae & Martins, 2019, arXiv 1905.05702.
    """
    return entmax(x, 1.5, axis=axis, mask=mask)


def entmax(
    x: jax.Array,
    alpha: float | jax.Array,
    *,
    axis: int = -1,
    mask: jax.Array | None = None,
    num_iters: int = 50,
) -> jax.Array:
    """A sparse softmax: `max((alpha - 1) x - tau, 0)^(1 / (alpha - 1))`, which sums to 1.

    Args:
      x, axis, mask: as in `sparsemax`.
      alpha: above 1, broadcastable to x with length 1 on `axis`; near 1 it is softmax, at 2
        sparsemax. Its gradient is exact.
      num_iters: halvings of the interval that holds tau.

    Returns:
      The shape and dtype of x.

    Source: Peters, Niculae & Martins, 2019, arXiv 1905.05702.
    """
    moved = jnp.moveaxis(x, axis, -1)
    if mask is not None:
        mask = jnp.moveaxis(jnp.broadcast_to(mask, x.shape), axis, -1)
    alpha = jnp.asarray(alpha, jnp.result_type(jnp.float32, x.dtype))
    if alpha.ndim:
        alpha = jnp.moveaxis(jnp.expand_dims(alpha, range(x.ndim - alpha.ndim)), axis, -1)
        alpha = jnp.broadcast_to(alpha, (*moved.shape[:-1], 1)).reshape(1, 1, -1, 1)
    else:
        alpha = operand(alpha, "")
    return jnp.moveaxis(_on_rows(engine.Entmax(alpha, num_iters), moved, mask), -1, axis)


def entmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: float | jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with weights `entmax_alpha(s)`: sums of 1 with exact zeros.

    Args:
      q, k, v, mask, bias, causal, scale, implementation: as in `dot_product_attention`.
      alpha: above 1, a number or `[H]`; 2 is sparsemax.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Correia, Niculae & Martins, Adaptively Sparse Transformers, 2019, arXiv 1909.00015.
    """
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias),
        normalizer=engine.entmax(alpha),
        scale=scale,
        implementation=implementation,
    )


def sinkhorn(
    scores: jax.Array,
    *,
    num_iters: int = 3,
    mask: jax.Array | None = None,
    stop_gradient_columns: bool = False,
) -> jax.Array:
    """Weights scaled to sum to 1 along rows and to T / S along columns: `exp(s + u_t + v_j)`.

    Args:
      scores: `[B, H, T, S]`.
      num_iters: alternate scalings, rows first; the last is exact, and 1 is softmax.
      mask: bool, broadcastable to `scores`.
      stop_gradient_columns: whether v counts as constant in derivatives.

    Returns:
      The weights, of the shape and dtype of `scores`.

    Source: Sander et al., Sinkformers, 2021, arXiv 2110.11773.
    """
    normalizer = engine.Sinkhorn(num_iters, stop_gradient_columns)
    scores, dtype = _masked(scores, mask), scores.dtype
    return engine.normalize(scores, normalizer).astype(dtype)


def sinkhorn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    num_iters: int = 3,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    stop_gradient_columns: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with nearly doubly stochastic weights: `exp(s_tj + u_t + v_j) v_j`.

    There is no causal form: a column's scaling sees all queries.

    Args:
      q, k, v, mask, scale, implementation: as in `dot_product_attention`.
      num_iters, stop_gradient_columns: as in `sinkhorn`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Sander et al., Sinkformers, 2021, arXiv 2110.11773.
    """
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask),
        normalizer=engine.Sinkhorn(num_iters, stop_gradient_columns),
        scale=scale,
        implementation=implementation,
    )


def relu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    length_scaling: str = "sqrt_half",
    gamma: float = 1.0,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with weights `relu(s) / (gamma f(n))`, n the number of keys that a query sees.

    Args:
      q, k, v, mask, bias, causal, scale, implementation: as in `dot_product_attention`.
      length_scaling: f: "sqrt_half" (`sqrt(n / 2)`), "inverse" (n) or "none" (1).
      gamma: divides all weights.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if the length scaling is unknown.

    Source: Shen et al., 2023, arXiv 2302.06461; "inverse": Wortsman et al., 2023, arXiv 2309.08586.
    """
    if length_scaling not in (*LENGTH_SCALES, "none"):
        known = ", ".join([*LENGTH_SCALES, "none"])
        raise ValueError(f"length_scaling must be one of {known}, got {length_scaling!r}")
    normalizer = engine.relu
    if length_scaling != "none":
        normalizer = engine.LengthScaled(jax.nn.relu, LENGTH_SCALES[length_scaling])
    out = engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias),
        normalizer=normalizer,
        scale=scale,
        implementation=implementation,
    )
    return (out / gamma).astype(v.dtype)


def rectified_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    norm_scale: jax.Array,
    norm_gate: jax.Array | None = None,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-8,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with weights `relu(s)` and a norm over all heads: `g z / sqrt(mean(z^2) + eps)`.

    z is the concatenation of the heads' `relu(s) v`; with a gate, `y = sigmoid(norm_gate z) y`.

    Args:
      q, k, v, mask, causal, scale, implementation: as in `dot_product_attention`.
      norm_scale: g, `[H * Dv]`, head by head.
      norm_gate: `[H * Dv]`.
      eps: added to the mean square.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Zhang, Titov & Sennrich, Sparse Attention with Linear Units, 2021, arXiv 2104.07012.
    """
    shape = (*q.shape[:3], v.shape[-1])
    for name, x in ("norm_scale", norm_scale), ("norm_gate", norm_gate):
        if x is not None and x.shape != (shape[2] * shape[3],):
            raise ValueError(f"{name} must be [H * Dv] = [{shape[2] * shape[3]}], got {x.shape}")
    out = engine.attention(
        q,
        k,
        v.astype(jnp.result_type(jnp.float32, v.dtype)),
        mask=as_mask(mask, causal),
        normalizer=engine.relu,
        scale=scale,
        implementation=implementation,
    )
    z = out.reshape(*shape[:2], -1)
    y = norm_scale * z * jax.lax.rsqrt(jnp.mean(z**2, -1, keepdims=True) + eps)
    y = y if norm_gate is None else y * jax.nn.sigmoid(norm_gate * z)
    return y.reshape(shape).astype(v.dtype)


def normalized_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gain: jax.Array,
    shift: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    eps: float = 1e-3,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with standardised scores for weights: `(gain (s - mean) / sd + shift) / sqrt(S)`.

    Mean and `sd = std + eps` are over the allowed keys of a row; scores are not scaled.

    Args:
      q, k, v, mask, implementation: as in `dot_product_attention`.
      gain, shift: `[H]`.
      eps: added to the standard deviation.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Richter & Wattenhofer, Normalized Attention Without Probability Cage, 2020, arXiv
    2005.09561.
    """
    out = engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask),
        normalizer=engine.Standardized(operand(gain, "h"), operand(shift, "h"), eps),
        scale=1.0,
        implementation=implementation,
    )
    return (out * k.shape[1] ** -0.5).astype(v.dtype)


def similarity_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    similarity: str = "sigmoid",
    normalize: bool = False,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    eps: float = 1e-8,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with weights `sim(s)`, or `sim(s) / (sum sim(s) + eps)` if normalised.

    Args:
      q, k, v, mask, causal, scale, implementation: as in `dot_product_attention`.
      similarity: "sigmoid" or "elu1" (`elu(s) + 1`).
      normalize: whether rows sum to 1.
      eps: added to their sums.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if the similarity is unknown.

    Source: Gu et al., 2024, arXiv 2410.10781.
    """
    known = {"sigmoid": jax.nn.sigmoid, "elu1": _elu1}
    if similarity not in known:
        raise ValueError(f"similarity must be one of {', '.join(known)}, got {similarity!r}")
    kind = engine.Proportional(known[similarity], eps)
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        normalizer=kind if normalize else engine.Pointwise(known[similarity]),
        scale=scale,
        implementation=implementation,
    )


def taylor_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with the second-order Taylor series of exp: weights `1 + s + s^2 / 2`, normalised.

    Args:
      q, k, v, mask, causal, scale, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Deconstructing Attention, 2025, arXiv 2510.11602.
    """
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        normalizer=engine.Proportional(_taylor),
        scale=scale,
        implementation=implementation,
    )


def topk_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    top_k: int,
    causal: bool = False,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention over the `top_k` best allowed keys of every query, equals included.

    Args:
      q, k, v, causal, mask, bias, scale, implementation: as in `dot_product_attention`.
      top_k: at least 1; as many as there are keys, or more, is softmax attention.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if `top_k` is below 1.

    Source: Zhao et al., Explicit Sparse Transformer, 2019, arXiv 1912.11637.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias),
        normalizer=engine.TopK(top_k),
        scale=scale,
        implementation=implementation,
    )


def straight_through_hard_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The value of the best key, with the gradient of softmax attention in the scores.

    `w = onehot(argmax s) + p - stop_gradient(p)`, p the softmax; the first of equals is the best.

    Args:
      q, k, v, mask, causal, scale, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Bengio, Leonard & Courville, 2013, arXiv 1308.3432 (the straight-through estimator).
    """
    part = dict(mask=as_mask(mask, causal), scale=scale, implementation=implementation)
    best = engine.best_key(q, k, **part)
    values = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    hard = jnp.take_along_axis(values, jnp.maximum(best, 0)[..., None], axis=1)
    soft = engine.attention(q, k, jax.lax.stop_gradient(v), **part)
    hard = jnp.where(best[..., None] >= 0, hard, 0)
    return (hard + (soft - jax.lax.stop_gradient(soft))).astype(v.dtype)


def _elu1(scores):
    return jax.nn.elu(scores) + 1


def _taylor(scores):
    return 1 + scores + scores**2 / 2


def _masked(scores, mask):
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _on_rows(normalizer, scores, mask):
    """The weights of scores `[..., S]`, in their dtype."""
    rows = _masked(scores, mask).reshape(1, 1, -1, scores.shape[-1])
    return engine.normalize(rows, normalizer).reshape(scores.shape).astype(scores.dtype)
