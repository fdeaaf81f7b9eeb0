"""Attention with dense normalisers other than softmax, and the normalisers on arrays."""

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, operand
from attn_lab.ops.attention import bias_mod
from attn_lab.ops.masks import as_mask

__all__ = [
    "clipped_softmax",
    "clipped_softmax_attention",
    "normalized_attention",
    "rectified_linear_attention",
    "relu_attention",
    "similarity_attention",
    "sinkhorn",
    "sinkhorn_attention",
    "taylor_attention",
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
    return normalize_rows(engine.clipped_softmax(gamma, eta), scores, mask)


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


def _elu1(scores):
    return jax.nn.elu(scores) + 1


def _taylor(scores):
    return 1 + scores + scores**2 / 2


def _masked(scores, mask):
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def normalize_rows(normalizer, scores, mask):
    """The weights of scores `[..., S]`, in their dtype."""
    rows = _masked(scores, mask).reshape(1, 1, -1, scores.shape[-1])
    return engine.normalize(rows, normalizer).reshape(scores.shape).astype(scores.dtype)
