"""What the scores of attention are made of, and how sharp the rows are."""

import math

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, Pointwise, ScoreMod, operand
from attn_kernels.recurrence import linear_attention
from attn_lab.ops.attention import bias_mod, dot_product_attention
from attn_lab.ops.masks import as_mask

__all__ = [
    "additive_scores",
    "decoupled_target_attention",
    "length_scaled_attention",
    "luong_scores",
    "monotonic_alignment",
    "position_temperature",
    "qk_norm_attention",
    "selective_attention",
    "self_gated_pooling",
]


def qk_norm_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: float | jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    eps: float = 1e-12,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention whose scores are scaled cosines: `g <q_t / |q_t|, k_j / |k_j|> + bias`.

    Args:
      q, k, v, mask, bias, causal, implementation: as in `dot_product_attention`.
      g: the learned scale, a number or `[H]`; first `log2(L^2 - L)` at training length L.
      eps: the least length that a query or key is divided by.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if `g` has another shape.

    Source: Henry et al., Query-Key Normalization for Transformers, 2020, arXiv 2010.04245.
    """

    def unit(x):
        wide = x.astype(jnp.result_type(x, jnp.float32))
        squared = jnp.maximum(jnp.sum(wide**2, -1, keepdims=True), eps**2)
        return (wide * jax.lax.rsqrt(squared)).astype(x.dtype)

    g = _per_head("g", g, q.shape[2])
    return engine.attention(
        unit(q),
        unit(k),
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias, _times(g)),
        scale=1.0,
        implementation=implementation,
    )


def selective_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_temperature: jax.Array | None = None,
    v_temperature: jax.Array | None = None,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with an inverse temperature for every query and a factor on every value.

    `softmax_j(tau_q[t] scale <q_t, k_j>) (tau_v[j] v_j)`.

    Args:
      q, k, v, mask, causal, scale, implementation: as in `dot_product_attention`.
      q_temperature: `tau_q [B, T, H]`; None is 1.
      v_temperature: `tau_v [B, S, Kv]`, of any sign; None is 1.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if a temperature does not fit.

    Source: Zhang et al., Selective Attention, 2024, arXiv 2411.12892.
    """
    for name, x, wanted in (
        ("q_temperature", q_temperature, q.shape[:3]),
        ("v_temperature", v_temperature, v.shape[:3]),
    ):
        if x is not None and x.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(x.shape)}")
    if v_temperature is not None:
        wide = jnp.result_type(v, v_temperature, jnp.float32)
        v = (v.astype(wide) * v_temperature[..., None].astype(wide)).astype(v.dtype)
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=None if q_temperature is None else _times(operand(q_temperature, "bqh")),
        scale=scale,
        implementation=implementation,
    )


def position_temperature(alpha: jax.Array, length: int) -> jax.Array:
    """Inverse temperatures that grow with the visible past: `1 + sigmoid(alpha_h) log(t + 1)`.

    Args:
      alpha: learned, `[H]`.
      length: the number T of queries.

    Returns:
      `[T, H]`, to be added to those of the tokens for `selective_attention`.

    Source: Zhang et al., 2024, arXiv 2411.12892.
    """
    return 1 + jax.nn.sigmoid(alpha) * jnp.log(jnp.arange(1.0, length + 1))[:, None]


def length_scaled_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mode: str = "log",
    base_length: int | None = None,
    slope: jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with scores times a function of the number n_t of keys a query may see.

    Args:
      q, k, v, mask, causal, scale, implementation: as in `dot_product_attention`.
      mode: "log" multiplies by `ln n_t`, "log_base" by `ln n_t / ln base_length`, "learned" by
        `1 + slope_h ln n_t`.
      base_length: the length, above 1, at which "log_base" is plain attention.
      slope: `[H]`, for "learned".

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if the mode is unknown, or lacks its argument.

    Source: Chiang and Cholak, 2022, arXiv 2202.12172; "log_base": MVSFormer++, 2024, arXiv
    2401.11673.
    """
    if mode not in ("log", "log_base", "learned"):
        raise ValueError(f"mode must be 'log', 'log_base' or 'learned', got {mode!r}")
    if mode == "log_base" and (base_length is None or base_length <= 1):
        raise ValueError(f"mode 'log_base' needs base_length above 1, got {base_length}")
    if mode == "learned" and slope is None:
        raise ValueError("mode 'learned' needs slope")
    mask = as_mask(mask, causal)
    factor = jnp.log(jnp.maximum(visible_keys(mask, q.shape[1], k.shape[1]), 1))
    if mode == "log_base":
        factor = factor / math.log(base_length)
    elif mode == "learned":
        factor = 1 + _per_head("slope", slope, q.shape[2]) * factor
    return engine.attention(
        q,
        k,
        v,
        mask=mask,
        score_mod=_times(factor),
        scale=scale,
        implementation=implementation,
    )


def self_gated_pooling(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, scale: float | None = None
) -> jax.Array:
    """A softmax average in which every key scores itself: `a_j = scale <silu(q_j), k_j>`.

    `out_t = sum_j softmax_j(a_j) v_j` over all keys, or over `j <= t`: in time O(T).

    Args:
      q: `[B, T, H, D]`, read at the position of the key.
      k, v: `[B, T, K, D]` and `[B, T, Kv, Dv]`; K and Kv divide H.
      causal: whether t sees its past alone.
      scale: by default `1 / sqrt(D)`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if there are not as many queries as keys, or shapes do not fit.

    Source: Deconstructing Attention, 2025, arXiv 2510.11602.
    """
    heads = q.shape[2]
    if q.shape[1] != k.shape[1] or heads % k.shape[2] or heads % v.shape[2]:
        raise ValueError(f"k {k.shape} and v {v.shape} need the length and heads of q {q.shape}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k = jnp.repeat(k, heads // k.shape[2], axis=2)
    wide = jnp.result_type(q, k, v, jnp.float32)
    score = scale * jnp.sum(jax.nn.silu(q.astype(wide)) * k.astype(wide), -1)
    if not causal:
        one = jnp.ones((*q.shape[:1], 1, heads, 1), wide)
        pooled = engine.attention(one, score[..., None], v, scale=1.0)
        return jnp.broadcast_to(pooled, (*q.shape[:3], v.shape[-1]))
    total = jax.lax.cumlogsumexp(score, axis=1)
    share = jnp.exp(score - total)[..., None]
    before = jnp.concatenate([total[:, :1], total[:, :-1]], 1)
    v = jnp.repeat(v, heads // v.shape[2], axis=2)
    decay = jnp.minimum(before - total, 0)
    return linear_attention(jnp.ones_like(share), share, v, log_decay=decay, scale=1.0)


def decoupled_target_attention(
    target_attention: jax.Array,
    history_attention: jax.Array,
    target_representation: jax.Array,
    history_representation: jax.Array,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A target reads a history by one set of embeddings and is compared with it by another.

    `pooled = softmax_j(<t_a, h_aj> / sqrt(Da)) h_rj`, `crossed = t_r * pooled`.

    Args:
      target_attention, history_attention: `t_a [B, Da]` and `h_a [B, S, Da]`.
      target_representation, history_representation: `t_r [B, Dr]` and `h_r [B, S, Dr]`.
      mask: bool `[B, S]`, True where the history is valid.

    Returns:
      `pooled` and `crossed`, both `[B, Dr]`.

    Source: Feng et al., DARE, 2024, arXiv 2410.02604.
    """
    pooled = dot_product_attention(
        target_attention[:, None, None],
        history_attention[:, :, None],
        history_representation[:, :, None],
        mask=None if mask is None else mask[:, None, None],
    )[:, 0, 0]
    return pooled, target_representation * pooled


def luong_scores(
    q: jax.Array,
    k: jax.Array,
    *,
    method: str = "dot",
    w: jax.Array | None = None,
    v: jax.Array | None = None,
) -> jax.Array:
    """The four scores of global attention between an encoder and a decoder.

    Args:
      q: `[B, T, Dq]`.
      k: `[B, S, Dk]`.
      method: "dot" is `<q_t, k_j>`; "general" `q_t^T w k_j`; "concat" `v^T tanh([q_t; k_j] w)`;
        "location" `(q_t w)_j`.
      w: `[Dq, Dk]`, `[Dq + Dk, A]` or `[Dq, N]` with `N >= S`, as the method needs.
      v: `[A]`, for "concat".

    Returns:
      `[B, T, S]`.

    Raises:
      ValueError: if the method is unknown, lacks an argument, or w has fewer columns than keys.

    Source: Luong et al., 2015, arXiv 1508.04025.
    """
    if method not in ("dot", "general", "concat", "location"):
        raise ValueError(f"method must be dot, general, concat or location, got {method!r}")
    if (method != "dot" and w is None) or (method == "concat" and v is None):
        raise ValueError(f"method {method!r} needs w" + ", and v" * (method == "concat"))
    if method == "location":
        if w.shape[1] < k.shape[1]:
            raise ValueError(f"w {w.shape} must have a column for each of {k.shape[1]} keys")
        return q @ w[:, : k.shape[1]]
    if method == "concat":
        split = q.shape[-1]
        queries, keys = (q @ w[:split])[:, :, None], (k @ w[split:])[:, :, None]
        return additive_scores(queries, keys, v[None])[:, 0]
    return jnp.einsum("btd,bsd->bts", q if method == "dot" else q @ w, k)


def additive_scores(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Scores by a network with one hidden layer: `v_h^T tanh(q_t + k_j) + bias_h`.

    Args:
      q, k: `[B, T, H, A]` and `[B, S, H, A]`, already projected.
      v: `[H, A]`.
      bias: `[H]`.

    Returns:
      `[B, H, T, S]`.

    Source: Bahdanau et al., 2014, arXiv 1409.0473.
    """
    hidden = jnp.tanh(q[:, :, None] + k[:, None])
    scores = jnp.einsum("btsha,ha->bhts", hidden, v)
    return scores if bias is None else scores + bias[:, None, None]


def monotonic_alignment(p: jax.Array) -> jax.Array:
    """Where hard monotonic attention is expected to stop, from the chances p to stop at a key.

    `a_tj = p_tj sum_{k <= j} a_{t-1,k} prod_{l=k}^{j-1} (1 - p_tl)`, from the first key.

    Args:
      p: `[..., T, S]`, within 0 and 1.

    Returns:
      The shape of `p`; a row adds up to at most 1.

    Source: Raffel et al., 2017, arXiv 1704.00784.
    """

    def join(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    def step(last, p):
        passed = jnp.concatenate([jnp.ones_like(p[..., :1]), 1 - p[..., :-1]], -1)
        reached = jax.lax.associative_scan(join, (passed, last), axis=-1)[1]
        return p * reached, p * reached

    start = jnp.zeros_like(p[..., 0, :]).at[..., 0].set(1)
    return jnp.moveaxis(jax.lax.scan(step, start, jnp.moveaxis(p, -2, 0))[1], 0, -2)


def visible_keys(mask: Mask | None, q_len: int, k_len: int) -> jax.Array:
    """The number of keys that a mask allows each query, laid out by `operand`."""
    if mask is None:
        return jnp.full((1, 1, 1, 1), float(k_len))
    batch, heads = (max([1, *(x.shape[n] for x in mask.operands)]) for n in (0, 1))
    flat, ones = jnp.zeros((batch, q_len, heads, 1)), jnp.ones((batch, k_len, 1, 1))
    counts = engine.attention(flat, ones, ones, mask=mask, normalizer=Pointwise(_one_if_allowed))
    return operand(counts[..., 0], "bqh")


def _one_if_allowed(score):
    return jnp.where(score == -jnp.inf, 0, jnp.ones_like(score))


def _per_head(name, x, heads):
    x = jnp.asarray(x, jnp.result_type(float) if isinstance(x, float | int) else None)
    if x.shape not in ((), (heads,)):
        raise ValueError(f"{name} must be a number or [{heads}], got shape {x.shape}")
    return operand(x, "h" if x.ndim else "")


def _times(factor):
    return ScoreMod(_multiply, (factor,))


def _multiply(score, b, h, q_index, k_index, factor):
    return score * factor
