"""Linear attention: feature maps, decays, delta-rule writes and normalisers on a matrix state."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attn_kernels import recurrence as engine

__all__ = [
    "delta_rule",
    "feature_map",
    "feature_maps",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_attention",
    "retention",
]

FeatureMap = str | Callable[[jax.Array], jax.Array]


def _taylor2(x):
    dim = x.shape[-1]
    squares = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], dim * dim)
    parts = jnp.ones_like(x[..., :1]), x / dim**0.25, squares / math.sqrt(2 * dim)
    return jnp.concatenate(parts, -1)


feature_maps: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    # exp of the negative part alone: where x is large the untaken branch stays finite
    "elu1": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))),
    "relu": jax.nn.relu,
    "exp": jnp.exp,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "elu": jax.nn.elu,
    "taylor2": _taylor2,
    "safe_exp": lambda x: jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True))),
}


def feature_map(name: FeatureMap) -> Callable[[jax.Array], jax.Array]:
    """The function of that name in `feature_maps`, `[..., D]` to `[..., F]`; a function is itself.

    Raises:
      ValueError: if no feature map has the name.
    """
    if callable(name):
        return name
    if name not in feature_maps:
        raise ValueError(f"feature_map must be one of {', '.join(feature_maps)}, got {name!r}")
    return feature_maps[name]


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] = "elu1",
    normalization: str = "division",
    causal: bool = False,
    scale: float = 1.0,
    eps: float = 1e-6,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int = 64,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention whose weights factorise, in O(T + S): `a_ts = scale <phi(q_t), phi(k_s)>`.

        division:     o_t = sum_s a_ts v_s / (sum_s a_ts + eps)
        none:         o_t = sum_s a_ts v_s
        subtraction:  o_t = sum_s (a_ts - mean_r a_tr + 1 / S) v_s

    A row without keys, or whose weights sum to 0 with eps = 0, is 0.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      feature_map: phi: a name in `feature_maps`, a function `[..., D]` to `[..., F]`, or a pair of
        them for q and for k.
      normalization: "division", "none" or "subtraction" (not causal and without state).
      causal: query t sees the keys `s <= t + S - T`.
      scale: multiplies the weights.
      eps: added to the sum of a row's weights.
      initial_state: what keys before these have written: `sum_s phi(k_s) v_s^T`, `[B, H, F, Dv]`,
        and for division `[B, H, F, Dv + 1]`, whose last column is `sum_s phi(k_s)`.
      return_state: whether to return that sum over all keys as well.
      form, chunk_size: of the causal sum: see `attn_kernels.recurrence.linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state, in float32 or better.

    Raises:
      ValueError: if shapes do not fit, a name is unknown, or subtraction is asked to be causal or
        to keep a state.

    Source: Katharopoulos et al., 2020, arXiv 2006.16236; subtraction: Han et al., 2024, arXiv
    2412.06590.
    """
    if normalization not in ("division", "none", "subtraction"):
        raise ValueError(
            f"normalization must be division, none or subtraction, got {normalization!r}"
        )
    for name, x in ("q", q), ("k", k), ("v", v):
        if x.ndim != 4 or not x.shape[1] or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating [batch, length, heads, dim], got {x.dtype}{list(x.shape)}"
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k {k.shape} must have the batch and dim of q {q.shape}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v {v.shape} must have the batch and length of k {k.shape}")
    if normalization == "subtraction" and (causal or return_state or initial_state is not None):
        raise ValueError(
            "normalization='subtraction' is neither causal nor recurrent: drop causal, "
            "initial_state and return_state, or use 'division' or 'none'"
        )

    wide = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
    map_q, map_k = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    queries = scale * _resolve(map_q)(q.astype(wide))
    keys = _resolve(map_k)(k.astype(wide))
    queries, keys, values = engine.match_heads(queries, keys, v.astype(wide))
    if queries.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"feature_map gives {queries.shape[-1]} features to q and {keys.shape[-1]} to k"
        )
    if normalization == "subtraction":
        out = _read(queries, _written(keys - keys.mean(1, keepdims=True), values))
        return (out + values.mean(1, keepdims=True)).astype(v.dtype)

    if normalization == "division":
        values = jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1)
    shape = q.shape[0], keys.shape[2], keys.shape[3], values.shape[3]
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"initial_state must be {list(shape)}, got {list(initial_state.shape)}")
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state
    if causal:
        early = k.shape[1] - q.shape[1]  # keys before the first query, which all queries see
        if early > 0:
            state = state + _written(keys[:, :early], values[:, :early])
            keys, values = keys[:, early:], values[:, early:]
        if early < 0:
            keys, values = (
                jnp.pad(x, ((0, 0), (-early, 0), (0, 0), (0, 0))) for x in (keys, values)
            )
        out, state = engine.linear_attention(
            queries,
            keys,
            values,
            scale=1.0,
            initial_state=state,
            return_state=True,
            form=form,
            chunk_size=chunk_size,
        )
    else:
        state = state + _written(keys, values)
        out = _read(queries, state)
    if normalization == "division":
        total = out[..., -1:] + eps
        out = out[..., :-1] / jnp.where(total == 0, 1, total)
    out = out.astype(v.dtype)
    return (out, state) if return_state else out


def retention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int = 64,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Linear attention with one fixed decay g a head.

        o_t = scale sum_{s<=t} g^(t-s) <q_t, k_s> v_s

    Args:
      q, k: `[B, T, H, D]`.
      v: `[B, T, H, Dv]`.
      log_decay: `log(g)`, `[H]`, at most 0; by default `log(1 - 2^(-5 - h))`, h = 0..H-1.
      scale, initial_state, return_state, form, chunk_size: as in `gated_linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state `[B, H, D, Dv]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Sun et al., 2023, arXiv 2307.08621.
    """
    if log_decay is None:
        wide = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
        heads = max(q.shape[2], k.shape[2], v.shape[2])
        log_decay = jnp.log1p(-jnp.exp2(-5 - jnp.arange(heads, dtype=wide)))
    if log_decay.ndim != 1:
        raise ValueError(f"log_decay must be [H], got {list(log_decay.shape)}")
    return gated_linear_attention(
        q,
        k,
        v,
        jnp.broadcast_to(log_decay, (*q.shape[:2], *log_decay.shape)),
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        form=form,
        chunk_size=chunk_size,
    )


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int = 64,
    sub_chunk_size: int = 16,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """A state that decays by a gate of the data: `S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T`.

    The output is `o_t = scale S_t^T q_t`. An argument with fewer heads is repeated.

    Args:
      q, k: `[B, T, H, D]`.
      v: `[B, T, H, Dv]`.
      log_decay: g, at most 0, `[B, T, H, D]`, or `[B, T, H]` for all channels alike.
      scale: by default `1 / sqrt(D)`.
      initial_state: `[B, H, D, Dv]`, by default 0.
      return_state: whether to return the last state as well.
      form, chunk_size, sub_chunk_size: see `attn_kernels.recurrence.linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state, in float32 or better.

    Raises:
      ValueError: if shapes do not fit.

    Source: Yang et al., 2023, arXiv 2312.06635.
    """
    return engine.linear_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        form=form,
        chunk_size=chunk_size,
        sub_chunk_size=sub_chunk_size,
    )


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int = 64,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """A state whose every write first erases what its key reads.

        S_t = (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,    o_t = scale S_t^T q_t

    Keys are to have norm 1, which the caller sees to: with
    longer ones the state grows without bound.

    Args:
      q, k: `[B, T, H, D]`.
      v: `[B, T, H, Dv]`.
      beta: b, the write strengths `[B, T, H]` in (0, 1), or up to 2.
      scale, initial_state, return_state, form, chunk_size: as in `gated_linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state `[B, H, D, Dv]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Schlag et al., 2021, arXiv 2102.11174; Yang et al., 2024, arXiv 2406.06484.
    """
    return engine.linear_attention(
        q,
        k,
        v,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        form=form,
        chunk_size=chunk_size,
    )


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk_size: int = 64,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The delta rule on a state that decays first.

        S_t = (I - b_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T,    o_t = scale S_t^T q_t

    Args:
      q, k, v, beta: as in `delta_rule`.
      log_decay: g, at most 0, `[B, T, H]`, or `[B, T, H, D]` per key channel.
      scale, initial_state, return_state, form, chunk_size: as in `gated_linear_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state `[B, H, D, Dv]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Yang et al., 2024, arXiv 2412.06464.
    """
    return engine.linear_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
        form=form,
        chunk_size=chunk_size,
    )


_resolve = feature_map  # the keyword of that name hides it in linear_attention


def _written(keys, values):
    """`sum_s k_s v_s^T`: `[B, H, D, Dv]`."""
    return jnp.einsum("bshd,bshe->bhde", keys, values, precision="highest")


def _read(queries, state):
    return jnp.einsum("bthd,bhde->bthe", queries, state, precision="highest")
