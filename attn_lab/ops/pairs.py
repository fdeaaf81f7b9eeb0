"""Attention whose scores are no inner product of query and key, or of changed ones."""

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, Pointwise, Score
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.masks import as_mask
from attn_lab.ops.positions import apply_rotary

__all__ = [
    "complex_attention",
    "complex_features",
    "compositional_attention",
    "mlp_score_attention",
]


def complex_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
    *,
    theta: float = 10000.0,
    scale: float = 1.0,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    eps: float = 1e-9,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of complex queries and keys: magnitudes times the cosine of a phase.

        s = scale sum_i |q_i| |k_i| cos(delta_i (arg q_i - arg k_i) + bias_i + (t - j) f_i)

    The first half of the channels is the real part, the second the imaginary one;
    `f_i = theta^(-2i / D)`.

    Args:
      q, k, v, mask, causal, implementation: as in `dot_product_attention`; D is even.
      delta, bias: `[H, D / 2]`.
      theta: base of the rotary frequencies.
      scale: of the scores.
      eps: added to squared magnitudes.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: ComplexFormer, 2025, arXiv 2505.10222.
    """
    (_, q_len, heads, dim), k_len = q.shape, k.shape[1]
    if dim % 2 or delta.shape != (heads, dim // 2) or bias.shape != delta.shape:
        raise ValueError(
            f"delta {delta.shape} and bias {bias.shape} must be [H, D / 2] of q {q.shape}, D even"
        )
    keys = jnp.repeat(k, heads // k.shape[2], axis=2)
    return dot_product_attention(
        apply_rotary(
            complex_features(q, delta, bias, eps=eps),
            jnp.arange(k_len - q_len, k_len),
            theta=theta,
        ),
        apply_rotary(complex_features(keys, delta, eps=eps), jnp.arange(k_len), theta=theta),
        v,
        mask=mask,
        causal=causal,
        scale=scale,
        implementation=implementation,
    )


def complex_features(
    x: jax.Array, delta: jax.Array, bias: jax.Array | float = 0.0, *, eps: float = 1e-9
) -> jax.Array:
    """Complex channels with their phases mapped: `|x| exp(i (delta arg x + bias))`.

    Args:
      x: `[B, T, H, D]`, the real parts in the first half of the channels.
      delta, bias: `[H, D / 2]`.
      eps: added to squared magnitudes.

    Returns:
      `[B, T, H, D]` in float32 or better.

    Source: ComplexFormer, 2025, arXiv 2505.10222.
    """
    wide = x.astype(jnp.result_type(jnp.float32, x.dtype))
    real, imaginary = jnp.split(wide, 2, axis=-1)
    phase = delta * jnp.arctan2(imaginary, real) + bias
    size = jnp.sqrt(real**2 + imaginary**2 + eps)
    return jnp.concatenate([size * jnp.cos(phase), size * jnp.sin(phase)], -1)


def mlp_score_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    w3: jax.Array,
    b3: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention scored by a network: `w3 relu(w2 relu(w1 [q; k] + b1) + b2) + b3`.

    Args:
      q, k, v, mask, causal, implementation: as in `dot_product_attention`; q and k of P channels.
      w1, b1: `[2P, P]`, `[P]`; the product with each of q and k is taken once a token.
      w2, b2: `[P, N]`, `[N]`.
      w3, b3: `[N, 1]`, `[1]`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Neural Attention, 2025, arXiv 2502.17206.
    """
    dim = q.shape[-1]
    if w1.shape[0] != 2 * dim or k.shape[-1] != dim:
        raise ValueError(f"w1 must be [2P, P] with P = {dim} of q and k {k.shape}, got {w1.shape}")
    return engine.attention(
        q @ w1[:dim],
        k @ w1[dim:],
        v,
        score=Score(_network, (b1, w2, b2, w3, b3), width=w1.shape[1]),
        mask=as_mask(mask, causal),
        implementation=implementation,
    )


def _network(q, k, q_index, k_index, b1, w2, b2, w3, b3):
    hidden = jax.nn.relu(q[:, :, :, None] + k[:, :, None] + b1)
    return (jax.nn.relu(hidden @ w2 + b2) @ w3 + b3)[..., 0]


def compositional_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gate: str = "scaled",
    mask: Mask | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention that adds, subtracts or drops values: weights `tanh(E) gate(N)`, no softmax.

    `E = alpha <q, k> / sqrt(D)` and `N = -beta |q - k|_1 / sqrt(D)`. The gate is `2 sigmoid(N)`
    ("scaled"), `sigmoid(N - mean N)` over all queries and keys of a head ("centered") or
    `sigmoid(N)` ("none").

    Args:
      q, k, v, mask, implementation: as in `dot_product_attention`.
      alpha, beta: of similarity and dissimilarity.
      gate: "scaled", "centered" or "none".

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if the gate is unknown.

    Source: Comateformer, 2024, arXiv 2412.07220.
    """
    if gate not in ("scaled", "centered", "none"):
        raise ValueError(f"gate must be 'scaled', 'centered' or 'none', got {gate!r}")
    wide = jnp.result_type(jnp.float32, q.dtype, k.dtype)
    scale, width = q.shape[-1] ** -0.5, q.shape[-1]
    plain = dict(normalizer=_itself, implementation=implementation)
    mean = jnp.zeros((), wide)
    if gate == "centered":
        ones = jnp.ones((*k.shape[:2], 1, 1), wide)
        total = engine.attention(q, k, ones, score=Score(_distance, width=width), **plain)
        mean = -beta * scale * total.mean((1, 3)) / k.shape[1]
    factors = jnp.asarray([alpha * scale, beta * scale, 2 if gate == "scaled" else 1], wide)
    score = Score(_composed, (factors, mean), width=width)
    return engine.attention(q, k, v, score=score, mask=as_mask(mask), **plain)


def _composed(q, k, q_index, k_index, factors, mean):
    alpha, beta, height = factors
    likeness = alpha * jnp.einsum("bhtd,bhsd->bhts", q, k)
    unlikeness = -beta * _distance(q, k, q_index, k_index) - mean[..., None, None]
    return jnp.tanh(likeness) * height * jax.nn.sigmoid(unlikeness)


def _distance(q, k, q_index, k_index):
    return jnp.abs(q[:, :, :, None] - k[:, :, None]).sum(-1)


_itself = Pointwise(lambda scores: jnp.where(scores == -jnp.inf, 0, scores))
