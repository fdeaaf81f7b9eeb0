"""What Mega and Megalodon put around moving averages: attention without competition, and gates."""

import math

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, Pointwise, ScoreMod, operand
from attn_lab.ops.attention import bias_mod, dot_product_attention
from attn_lab.ops.masks import as_mask
from attn_lab.ops.normed import simple_rms_norm

__all__ = [
    "elementwise_attention",
    "laplace",
    "mega_gated_output",
    "normalized_shared_qk",
    "relu2",
]

MEAN, DEVIATION = 0.707107, 0.282095  # of `laplace`, as rounded in the paper


def laplace(x: jax.Array) -> jax.Array:
    """The distribution function of a normal variable, `0.5 (1 + erf((x - m) / (s sqrt 2)))`.

    With `m = 0.707107` and `s = 0.282095` it is close to `relu2` around `sqrt(1/2)`.

    Source: Ma et al., Mega, 2022, arXiv 2209.10655.
    """
    # erfc keeps the digits of small weights, which 1 + erf loses.
    z = (x - MEAN) / (DEVIATION * math.sqrt(2))
    return 0.5 * jax.scipy.special.erfc(-jnp.where(x == -jnp.inf, -100, z))


def relu2(x: jax.Array) -> jax.Array:
    """`relu(x)^2`.

    Source: So et al., Primer, 2021, arXiv 2109.08668.
    """
    return jnp.square(jax.nn.relu(x))


FUNCTIONS = {"laplace": laplace, "relu2": relu2}


def elementwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str = "laplace",
    causal: bool = False,
    chunk_size: int | None = None,
    scale: float | None = None,
    mask: Mask | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention whose weights do not compete, `f(<q_t, k_j> / n_t + bias)`, in chunks if asked.

    n_t is the number of keys that query t sees, and f `laplace` or `relu2`; "softmax" is
    `softmax_j(scale <q_t, k_j> + bias)` instead.

    Args:
      q, k, v, causal, implementation: as in `dot_product_attention`.
      bias: broadcastable to `[B, H, T, S]`; with chunks T and S are their length, and B is 1.
      activation: "laplace", "relu2" or "softmax".
      chunk_size: tokens see those of their own chunk alone, one of consecutive chunks of this size;
        None, or a size of at least T, is one chunk.
      scale: of the softmax form, by default `1 / sqrt(D)`; the others ignore it.
      mask: as in `dot_product_attention`, of a chunk like the bias.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; 0 where no key is allowed.

    Raises:
      ValueError: if shapes do not fit, the activation is unknown, or chunks do not fill T.

    Source: Ma et al., Mega, 2022, arXiv 2209.10655.
    """
    if activation not in (*FUNCTIONS, "softmax"):
        known = ", ".join((*FUNCTIONS, "softmax"))
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    batch, length = q.shape[:2]
    if chunk_size is not None and chunk_size < length:
        if chunk_size < 1 or length % chunk_size or k.shape[1] != length:
            raise ValueError(
                f"chunk_size must divide the {length} queries and as many keys, got {chunk_size} "
                f"and {k.shape[1]} keys"
            )
        q, k, v = (x.reshape(-1, chunk_size, *x.shape[2:]) for x in (q, k, v))
    part = dict(mask=as_mask(mask, causal), implementation=implementation)
    if activation == "softmax":
        out = dot_product_attention(q, k, v, bias=bias, scale=scale, **part)
    else:
        seen = _seen(q, k, causal) if mask is None else _counted(q, k, **part)
        out = engine.attention(
            q,
            k,
            v,
            score_mod=bias_mod(bias, ScoreMod(_divide, (seen,))),
            normalizer=Pointwise(FUNCTIONS[activation]),
            scale=1.0,
            **part,
        )
    return out.reshape(batch, length, *out.shape[2:])


def _seen(q, k, causal):
    """The number of keys of every query without a mask of its own, at least 1, as an operand."""
    (length, keys), wide = (q.shape[1], k.shape[1]), jnp.result_type(jnp.float32, q, k)
    seen = jnp.arange(length) + (keys - length + 1) if causal else jnp.full(length, keys)
    return operand(jnp.maximum(seen, 1).astype(wide), "q")


def _counted(q, k, **part):
    """The number of keys of every query that a mask allows, at least 1, as an operand."""
    wide = jnp.result_type(jnp.float32, q, k)
    blank, keys = jnp.zeros((*q.shape[:3], 1), wide), jnp.zeros((*k.shape[:2], 1, 1), wide)
    count = engine.attention(blank, keys, keys + 1, normalizer=Pointwise(_present), **part)
    return operand(jnp.maximum(count[..., 0], 1), "bqh")


def _present(score):
    return jnp.where(score == -jnp.inf, 0.0, 1.0)


def _divide(score, b, h, q_index, k_index, seen):
    return score / seen


def mega_gated_output(
    x: jax.Array,
    attended: jax.Array,
    r: jax.Array,
    hx: jax.Array,
    u: jax.Array,
    w_h: jax.Array,
    b_h: jax.Array,
) -> jax.Array:
    """The update of a residual stream by gated attention: `x + sigmoid(u) (h - x)`.

        h = silu(hx + (attended * r) w_h + b_h)

    Args:
      x: the stream, `[B, T, C]`.
      attended: outputs of attention, `[B, T, E]`.
      r: their gate, after its activation, `[B, T, E]`.
      hx, u: `[B, T, C]`, before their activations.
      w_h: `[E, C]`.
      b_h: `[C]`.

    Returns:
      `[B, T, C]` in the dtype of x.

    Source: Ma et al., Mega, 2022, arXiv 2209.10655.
    """
    wide = jnp.result_type(jnp.float32, x, attended)
    x_wide, hx, u = (a.astype(wide) for a in (x, hx, u))
    h = jax.nn.silu(hx + (attended * r) @ w_h + b_h)
    return (x_wide + jax.nn.sigmoid(u) * (h - x_wide)).astype(x.dtype)


def normalized_shared_qk(
    z: jax.Array, gamma: jax.Array, beta: jax.Array, *, eps: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys from one normalised projection: `(gamma + 1) z / rms(z) / sqrt(D) + beta`.

    Args:
      z: `[B, T, H, D]`.
      gamma, beta: `[2, H, D]`, of queries and of keys.
      eps: added to the mean square of a head.

    Returns:
      q and k, `[B, T, H, D]` in the dtype of z; their inner product needs no further scale.

    Raises:
      ValueError: if shapes do not fit.

    Source: Ma et al., Megalodon, 2024, arXiv 2404.08801.
    """
    for name, a in (("gamma", gamma), ("beta", beta)):
        if a.shape != (2, *z.shape[2:]):
            raise ValueError(f"{name} must be {[2, *z.shape[2:]]}, got {list(a.shape)}")
    wide = jnp.result_type(jnp.float32, z, gamma, beta)
    unit = simple_rms_norm(z.astype(wide), eps=eps) / math.sqrt(z.shape[-1])
    q, k = (unit * (gamma[i] + 1) + beta[i] for i in range(2))
    return q.astype(z.dtype), k.astype(z.dtype)
