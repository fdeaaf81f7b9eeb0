"""Linear attention with particular decays: refined gates, state space duality, fixed slopes."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.recurrence import match_heads
from attn_lab.ops.linear import gated_linear_attention
from attn_lab.ops.positions import alibi_slopes

__all__ = [
    "lightning_attention",
    "lightning_slopes",
    "log_refined_gate",
    "refined_gate",
    "refined_gated_linear_attention",
    "safe_exp_feature_map",
    "ssd",
]


def refined_gate(g: jax.Array, r: jax.Array) -> jax.Array:
    """A forget gate that a second gate moves around: `f = (1 - r) g^2 + r (1 - (1 - g)^2)`.

    Its slope in g is `2 (1 - r) g + 2 r (1 - g)`, which does not vanish where g saturates.

    Args:
      g: the gate, in [0, 1].
      r: the refining gate, in [0, 1], broadcastable to g; 1/2 leaves g as it is.

    Returns:
      f in [0, 1], in the dtype of g.

    Source: Lu et al., ReGLA, 2025, arXiv 2502.01578.
    """
    wide = jnp.result_type(jnp.float32, g, r)
    kept, refine = g.astype(wide), r.astype(wide)
    return (kept * ((1 - refine) * kept + refine * (2 - kept))).astype(g.dtype)


def log_refined_gate(gate_logits: jax.Array, refine_logits: jax.Array) -> jax.Array:
    """The log of `refined_gate` of two sigmoids, to relative accuracy at gates near 0 and near 1.

    Args:
      gate_logits, refine_logits: of g and r, in shapes that fit.

    Returns:
      At most 0, in float32 or better.
    """
    wide = jnp.result_type(jnp.float32, gate_logits, refine_logits)
    gate, refine = gate_logits.astype(wide), refine_logits.astype(wide)
    log_gate = jax.nn.log_sigmoid(gate)
    # f / g is (1 - r) g + r (2 - g), which is also 1 + (2 r - 1) (1 - g)
    near_0 = jnp.logaddexp(
        jax.nn.log_sigmoid(-refine) + log_gate,
        jax.nn.log_sigmoid(refine) + jnp.log1p(jax.nn.sigmoid(-gate)),
    )
    near_1 = jnp.log1p(jnp.tanh(refine / 2) * jax.nn.sigmoid(-jnp.maximum(gate, 0)))
    return log_gate + jnp.where(gate > 0, near_1, near_0)


def safe_exp_feature_map(x: jax.Array, *, axes: int | tuple[int, ...]) -> jax.Array:
    """Exponentials of at most 1: `exp(x - max x)`, the maximum a constant to derivatives.

    Args:
      x: any shape.
      axes: the axes that share a maximum.

    Returns:
      The shape of x, in float32 or better.

    Source: Lu et al., ReGLA, 2025, arXiv 2502.01578.
    """
    x = x.astype(jnp.result_type(jnp.float32, x))
    return jnp.exp(x - jax.lax.stop_gradient(x.max(axes, keepdims=True)))


def refined_gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate_logits: jax.Array,
    refine_logits: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Gated linear attention of exponential features with a gate that does not saturate.

        f_t = refined_gate(sigmoid(gate_logits_t), sigmoid(refine_logits_t))
        S_t = Diag(f_t) S_{t-1} + exp(k_t - max k) v_t^T
        o_t = S_t^T exp(q_t - max q_t) / (e sqrt(D (e^2 - 1)))

    The maximum of keys is over all positions and channels of a head. It only scales the outputs
    of the head, but comes from later positions too, and states of calls with other maxima have
    another scale.

    Args:
      q, k: `[B, T, H, D]`.
      v: `[B, T, H, Dv]`.
      gate_logits, refine_logits: `[B, T, H, D]`.
      initial_state, return_state: as in `gated_linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state `[B, H, D, Dv]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Lu et al., ReGLA, 2025, arXiv 2502.01578.
    """
    return gated_linear_attention(
        safe_exp_feature_map(q, axes=-1),
        safe_exp_feature_map(k, axes=(1, 3)),
        v,
        log_refined_gate(gate_logits, refine_logits),
        scale=1 / (math.e * math.sqrt(q.shape[-1] * (math.e**2 - 1))),
        initial_state=initial_state,
        return_state=return_state,
    )


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int = 64,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The selective state space of Mamba-2, a linear attention with a decay and a step per head.

        S_t = exp(dt_t a) S_{t-1} + b_t (dt_t x_t)^T,    y_t = S_t^T c_t + d x_t

    Args:
      x: `[B, T, H, P]`.
      dt: step sizes, positive, `[B, T, H]`.
      a: rates, negative, `[H]`.
      b, c: `[B, T, G, N]`; G divides H, and head h reads group `h // (H / G)`.
      d: the weight of the skip, `[H]`; None is no skip.
      initial_state: `[B, H, N, P]`, by default 0.
      return_state, form, chunk_size: as in `gated_linear_attention`.

    Returns:
      `[B, T, H, P]` in the dtype of x; with `return_state` also the state `[B, H, N, P]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Dao and Gu, 2024, arXiv 2405.21060.
    """
    for name, rank, array in ("x", 4, x), ("dt", 3, dt), ("a", 1, a), ("d", 1, d):
        if array is not None and array.ndim != rank:
            raise ValueError(f"{name} must have {rank} axes, got shape {array.shape}")
    if dt.shape[:2] != x.shape[:2]:
        raise ValueError(f"dt {dt.shape} must have the batch and length of x {x.shape}")
    wide = jnp.result_type(jnp.float32, x, dt, a, b, c)
    skip = jnp.zeros_like(a) if d is None else d
    inputs, steps, rates, skip = match_heads(
        *(y.astype(wide) for y in (x, dt, a[None, None], skip[None, None]))
    )
    out, state = gated_linear_attention(
        c,
        b,
        steps[..., None] * inputs,
        steps * rates,
        scale=1.0,
        initial_state=initial_state,
        return_state=True,
        form=form,
        chunk_size=chunk_size,
    )
    if d is not None:
        out = out + skip[..., None] * inputs
    out = out.astype(x.dtype)
    return (out, state) if return_state else out


def lightning_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    *,
    scale: float = 1.0,
    block_size: int = 64,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Linear attention whose weights fall with distance by a fixed slope a head, block by block.

        o_t = scale sum_{s<=t} exp(-slope_h (t - s)) <q_t, k_s> v_s

    Args:
      q, k: `[B, T, H, D]`.
      v: `[B, T, H, Dv]`.
      slopes: `[H]`, at least 0: see `lightning_slopes`.
      scale: multiplies the weights.
      block_size: positions a block, which changes nothing but the cost.
      initial_state, return_state: as in `gated_linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state `[B, H, D, Dv]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Qin et al., 2024, arXiv 2401.04658 and 2405.17381.
    """
    if slopes.ndim != 1:
        raise ValueError(f"slopes must be [H], got shape {slopes.shape}")
    return gated_linear_attention(
        q,
        k,
        v,
        jnp.broadcast_to(-slopes, (*q.shape[:2], *slopes.shape)),
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=block_size,
    )


def lightning_slopes(num_heads: int, layer_idx: int = 0, num_layers: int = 1) -> jax.Array:
    """Slopes that fall with depth, `[H]`: `alibi_slopes (1 - l / (L - 1) + 1e-5)` in layer l of L.

    Raises:
      ValueError: if `num_heads` is not positive or `layer_idx` is not below `num_layers`.

    Source: Qin et al., TransNormerLLM, 2023, arXiv 2307.14995.
    """
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx must be within 0 and {num_layers - 1}, got {layer_idx}")
    return alibi_slopes(num_heads) * (1 - layer_idx / max(num_layers - 1, 1) + 1e-5)
