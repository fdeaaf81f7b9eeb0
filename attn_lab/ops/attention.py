"""Attention over explicit weights: what enters a score, how a row is normalised, what follows."""

import math

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, ScoreMod, operand
from attn_lab.ops.masks import as_mask

__all__ = [
    "apply_gate",
    "dot_product_attention",
    "gated_attention",
    "sigmoid_attention",
    "sink_attention",
    "soft_cap",
    "softmax_off_by_one",
]

ACTIVATIONS = {
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "identity": lambda x: x,
    "ns_sigmoid": lambda x: 0.5 + 0.5 * jax.nn.sigmoid(x),
}


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_weights: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention: `softmax_j(soft_cap(scale <q_t, k_j>) + bias) v_j`.

    Query head h reads key and value head `h // (H / K)`: K = 1 is multi-query attention (Shazeer,
    2019, arXiv 1911.02150), 1 < K < H grouped-query attention (Ainslie et al., 2023, arXiv
    2305.13245). A row without allowed keys is 0.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      bias: added to the scores, broadcastable to `[B, H, T, S]`.
      mask: a `Mask`, or bool broadcastable to `[B, H, T, S]`; True may attend.
      causal: query t sees the keys `j <= t + S - T`.
      scale: by default `1 / sqrt(D)`.
      soft_cap: c bounds the scaled scores to `c tanh(s / c)`, before the bias.
      return_weights: whether to materialise and return the weights as well.
      implementation: of the engine: see `attn_kernels.attention.attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v, and with `return_weights` the weights `[B, H, T, S]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Vaswani et al., 2017, arXiv 1706.03762.
    """
    score_mod = bias_mod(bias, None if soft_cap is None else ScoreMod(_cap, (_number(soft_cap),)))
    part = dict(mask=as_mask(mask, causal), score_mod=score_mod, scale=scale)
    if not return_weights:
        return engine.attention(q, k, v, implementation=implementation, **part)
    out = engine.attention(q, k, v, implementation="definition", **part)
    return out, engine.attention_weights(q, k, **part)


def soft_cap(scores: jax.Array, cap: float) -> jax.Array:
    """Bounds scores smoothly to (-cap, cap): `cap tanh(scores / cap)`.

    Source: Gemma 2, 2024, arXiv 2408.00118.
    """
    return cap * jnp.tanh(scores / cap)


def sigmoid_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    logit_bias: float | jax.Array | None = None,
    bias: jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention whose weights do not compete: `sigmoid(scale <q_t, k_j> + bias + b) v_j`.

    Args:
      q, k, v, bias, mask, causal, scale, implementation: as in `dot_product_attention`.
      logit_bias: the number b, by default `-log(S)`; keep that of the training length at others.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Ramapuram et al., 2024, arXiv 2409.04431.
    """
    logit_bias = -math.log(k.shape[1]) if logit_bias is None else logit_bias
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias, ScoreMod(_add, (_number(logit_bias),))),
        normalizer=engine.sigmoid,
        scale=scale,
        implementation=implementation,
    )


def sink_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sink_key: jax.Array | None = None,
    sink_value: jax.Array | None = None,
    sink_logit: jax.Array | None = None,
    bias: jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with somewhere to put unwanted weight.

    `w = softmax([scale <q_t, sink_key>, s_t, sink_logit])`, `out = w_keys v + w_sink sink_value`.
    Sinks are always allowed. Without any sink this is softmax attention.

    Args:
      q, k, v, bias, mask, causal, scale, implementation: as in `dot_product_attention`.
      sink_key: `[P, K, D]`, learned keys that every query sees; K divides H.
      sink_value: `[P, K, Dv]`, their values, by default 0.
      sink_logit: `[H]`, the score of a sink without key and value.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if `sink_value` comes without `sink_key`, or shapes do not fit.

    Source: Gu et al., 2024, arXiv 2410.10781; with `sink_logit = 0`: Miller, 2023.
    """
    if sink_value is not None and sink_key is None:
        raise ValueError("sink_value needs sink_key; a value bias alone is added to the output")
    normalizer = engine.softmax if sink_logit is None else engine.softmax_with_sink(sink_logit)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    part = dict(mask=as_mask(mask, causal), score_mod=bias_mod(bias), scale=scale)
    part |= dict(normalizer=normalizer, implementation=implementation)
    if sink_key is None:
        return engine.attention(q, k, v, **part)
    heads, batch = q.shape[2], q.shape[0]
    for name, x in ("sink_key", sink_key), ("sink_value", sink_value):
        if x is not None and (x.ndim != 3 or heads % x.shape[1]):
            raise ValueError(f"{name} must be [P, K, D] with K dividing {heads}, got {x.shape}")
    keys = jnp.broadcast_to(sink_key, (batch, *sink_key.shape))
    if sink_value is None:
        sink_value = jnp.zeros((*sink_key.shape[:2], v.shape[-1]), v.dtype)
    values = jnp.broadcast_to(sink_value, (batch, *sink_value.shape))
    out, logs = engine.attention(q, k, v, return_stats=True, **part)
    sunk, sunk_logs = engine.attention(
        q, keys, values, scale=scale, return_stats=True, implementation=implementation
    )
    return join_keys(out, logs, sunk, sunk_logs)


def join_keys(out: jax.Array, logs: jax.Array, other: jax.Array, other_logs: jax.Array):
    """Softmax attention over two sets of keys at once, from that over each.

    Args:
      out, other: `[B, T, H, Dv]`.
      logs, other_logs: their log-sum-exps `[B, T, H]`; the other set has no row without a key.

    Returns:
      `[B, T, H, Dv]` in the dtype of `out`.
    """
    total = jnp.logaddexp(logs, other_logs)
    share, other_share = jnp.exp(logs - total)[..., None], jnp.exp(other_logs - total)[..., None]
    return (share * out + other_share * other).astype(out.dtype)


def softmax_off_by_one(
    scores: jax.Array, *, mask: jax.Array | None = None, sink_logit: float | jax.Array = 0.0
) -> jax.Array:
    """Softmax over the last axis with one more, silent entry: `exp(s) / (exp(c) + sum exp(s))`.

    Args:
      scores: `[B, H, T, S]`, or any shape if `sink_logit` is a number.
      mask: bool, broadcastable to `scores`; False entries get weight 0.
      sink_logit: c, a number or `[H]`.

    Source: Miller, Attention Is Off By One, 2023.
    """
    sink = jnp.asarray(sink_logit)
    sink = sink.reshape(-1, 1, 1) if sink.ndim else sink
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    sink = jnp.broadcast_to(sink.astype(scores.dtype), (*scores.shape[:-1], 1))
    normalizer = engine.softmax
    stats = normalizer.combine(normalizer.partial(sink), normalizer.partial(scores))
    return normalizer.weight(scores, stats)


def apply_gate(
    x: jax.Array, gate: jax.Array, *, activation: str = "sigmoid", mode: str = "multiply"
) -> jax.Array:
    """Gates an array: `x * act(gate)`, or `x + act(gate)` in mode "add".

    Args:
      x: any shape.
      gate: pre-activation, broadcastable to x.
      activation: "sigmoid", "silu", "identity" or "ns_sigmoid" (`0.5 + 0.5 sigmoid`).
      mode: "multiply" or "add".

    Returns:
      The shape and dtype of x, computed in float32 or better.

    Source: Qiu et al., 2025, arXiv 2505.06708.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation {activation!r} is unknown; choose one of {known}")
    if mode not in ("multiply", "add"):
        raise ValueError(f"mode must be 'multiply' or 'add', got {mode!r}")
    dtype = jnp.result_type(x, gate, jnp.float32)
    gate = ACTIVATIONS[activation](gate.astype(dtype))
    return (x * gate if mode == "multiply" else x + gate).astype(x.dtype)


def gated_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with a gate on its output: `dot_product_attention(...) * sigmoid(gate)`.

    Args:
      q, k, v, mask, bias, causal, scale, implementation: as in `dot_product_attention`.
      gate: pre-activation, `[B, T, H, Dv]` (elementwise) or `[B, T, H, 1]` (a head at a time).

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Qiu et al., 2025, arXiv 2505.06708.
    """
    out = dot_product_attention(
        q, k, v, mask=mask, bias=bias, causal=causal, scale=scale, implementation=implementation
    )
    if gate.shape not in (out.shape, (*out.shape[:3], 1)):
        raise ValueError(f"gate must be {out.shape} or {(*out.shape[:3], 1)}, got {gate.shape}")
    return apply_gate(out, gate)


def _cap(score, b, h, q_index, k_index, cap):
    return soft_cap(score, cap)


def _add(score, b, h, q_index, k_index, bias):
    return score + bias


def _number(x) -> jax.Array:
    return operand(jnp.asarray(x, jnp.result_type(float)), "")


def bias_mod(bias: jax.Array | None, score_mod: ScoreMod | None = None) -> ScoreMod | None:
    """`score_mod`, if any, and then the bias, if any."""
    if bias is None:
        return score_mod
    if bias.ndim > 4:
        raise ValueError(f"bias must broadcast to [B, H, T, S], got shape {bias.shape}")
    added = ScoreMod(_add, (bias.reshape((1,) * (4 - bias.ndim) + bias.shape),))
    return added if score_mod is None else score_mod.then(added)
