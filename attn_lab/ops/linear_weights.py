"""Linear attention whose weights are normalised, rotated, gated or balanced in other ways."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from attn_kernels import recurrence as engine
from attn_kernels.recurrence import match_heads
from attn_lab.ops.linear import FeatureMap, linear_attention
from attn_lab.ops.linear import feature_map as resolve

__all__ = [
    "causal_flow_attention",
    "efficient_attention",
    "flow_attention",
    "kv_gated_linear_attention",
    "magnitude_aware_linear_attention",
    "norm_aware_linear_attention",
    "rotary_linear_attention",
]


def efficient_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """Linear attention by two softmaxes, over channels of q and over positions of k.

        o_t = softmax_D(q_t) sum_s softmax_S(k)_s v_s^T

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      mask: bool `[B, S]`; True may be read. Without any such key the output is 0.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Shen et al., 2018, arXiv 1812.01243.
    """
    queries, keys = (x.astype(_wide(q, k, v)) for x in (q, k))
    if mask is not None:
        if mask.shape != k.shape[:2] or mask.dtype != bool:
            raise ValueError(
                f"mask must be bool {list(k.shape[:2])}, got {mask.dtype}{list(mask.shape)}"
            )
        mask = mask[:, :, None, None]
        keys = jnp.where(mask, keys, jnp.finfo(keys.dtype).min)
    keys = jax.nn.softmax(keys, axis=1)
    keys = keys if mask is None else jnp.where(mask, keys, 0)
    return _sum(jax.nn.softmax(queries, axis=-1), keys, v)


def flow_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, eps: float = 1e-6
) -> jax.Array:
    """Linear attention as a flow from keys to queries that is conserved at both.

    With `Q = sigmoid(q)`, `K = sigmoid(k)` and `x.y = <x + eps, y + eps>`:

        I_t = Q_t . sum_s K_s,    I'_t = Q_t . sum_s K_s / O_s
        O_s = K_s . sum_t Q_t,    O'_s = clip(K_s . sum_t Q_t / I_t, -1, 1)
        o_t = sigmoid(I'_t T / S) sum_s <Q_t / I_t, K_s> S softmax_s(O') v_s

    When causal, every sum (that of the softmax too) is over the n = t + 1 positions so far. Then
    I, O, I', O' and the last sum are divided by n, and S softmax(O') becomes n softmax(O').

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      causal: query t sees the keys up to t; there must be as many keys as queries.
      eps: keeps flows positive.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Wu et al., Flowformer, 2022, arXiv 2202.06258.
    """
    if not causal:
        return _flow(q, k, v, eps, lambda x: x.sum(1, keepdims=True), _sum, 1, k.shape[1])
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"causal flow needs as many keys as queries: q {q.shape}, k {k.shape}")
    return causal_flow_attention(q, k, v, eps=eps)[0]


def causal_flow_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    eps: float = 1e-6,
    initial_state: Any = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Causal `flow_attention` that goes on from a state, and leaves one.

    Args:
      q, k, v, eps: as in `flow_attention`, with as many keys as queries.
      initial_state: from an earlier call, whose positions these follow.
      segment_ids: integers `[B, T]`: documents of a packed row, as in `linear_attention` of engine
        2; each has its own flow.

    Returns:
      `[B, T, H, Dv]` in the dtype of v, and the state: every running sum at the last position.

    Raises:
      ValueError: if shapes do not fit.

    Source: Wu et al., Flowformer, 2022, arXiv 2202.06258.
    """
    before = iter([] if initial_state is None else initial_state)
    state = []

    def total(x):
        if segment_ids is None:
            sums = jnp.cumsum(x, 1) + next(before, 0)
        else:
            one = jnp.ones_like(x[..., :1])
            sums = engine.linear_attention(one, one, x, scale=1.0, segment_ids=segment_ids)
        state.append(sums[:, -1:])
        return sums

    def read(queries, keys, values):
        out, last = engine.linear_attention(
            queries,
            keys,
            values,
            scale=1.0,
            initial_state=next(before, None),
            return_state=True,
            segment_ids=segment_ids,
        )
        state.append(last)
        return out

    # padding at the start has counted nothing
    count = jnp.maximum(total(jnp.ones((*q.shape[:2], 1, 1), _wide(q, k, v))), 1)
    return _flow(q, k, v, eps, total, read, count, count), tuple(state)


def _flow(q, k, v, eps, total, read, count, key_count):
    """Flow attention by sums `total` over positions and the weighted sum `read`."""
    wide = _wide(q, k, v)
    queries, keys, values = match_heads(
        jax.nn.sigmoid(q.astype(wide)), jax.nn.sigmoid(k.astype(wide)), v.astype(wide)
    )

    def flow(x, others):
        return jnp.sum((x + eps) * (total(others) + eps), -1, keepdims=True) / count

    incoming, outgoing = flow(queries, keys), flow(keys, queries)
    arriving = flow(queries, keys / outgoing) * (q.shape[1] / k.shape[1])
    leaving = jnp.exp(jnp.clip(flow(keys, queries / incoming), -1, 1))
    share = _ratio(leaving, total(leaving)) * key_count
    out = read(queries / incoming / count, keys, share * values)
    return (jax.nn.sigmoid(arriving) * out).astype(v.dtype)


def magnitude_aware_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sin: jax.Array | None = None,
    cos: jax.Array | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> jax.Array:
    """Linear attention whose weights sum to 1 and are more peaked for longer queries.

        z_t = scale <Q_t, mean_s K_s>,    Q = elu(q) + 1, K = elu(k) + 1
        o_t = sum_s ((1 + 1 / (z_t + eps)) scale <rot Q_t, rot K_s> - z_t) v_s / S

    Weights may be negative. With rotations their sum is 1 no longer.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      sin, cos: of the angles, as in `rotary_linear_attention`; without them nothing rotates.
      scale: by default `1 / sqrt(D)`.
      eps: added to z in the denominator.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit, or only one of sin and cos is given.

    Source: Fan et al., MALA, 2025, arXiv 2507.00698.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide, elu1 = _wide(q, k, v), resolve("elu1")
    queries, keys, values = match_heads(
        scale * elu1(q.astype(wide)), elu1(k.astype(wide)), v.astype(wide)
    )
    size = jnp.sum(queries * keys.mean(1, keepdims=True), -1, keepdims=True)
    turned = _rotated(queries, keys, sin, cos)
    out = (1 + _ratio(1.0, size + eps)) * _sum(*turned, values / k.shape[1])
    return (out - size * values.mean(1, keepdims=True)).astype(v.dtype)


def norm_aware_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sin: jax.Array | None = None,
    cos: jax.Array | None = None,
    k_power: float = 3,
    q_power: float = 3.0,
    q_offset: float = 0.5,
    eps: float = 1e-6,
) -> jax.Array:
    """Linear attention whose query norm is an exponent, with both signs in channels of their own.

        p_t = q_power (q_offset + tanh |q_t|),    u_t = q_t / |q_t|
        Q_t = [relu(u_t)^p_t, relu(-u_t)^p_t],    K_s = [relu(k_s)^k_power, relu(-k_s)^k_power]
        o_t = sum_s <rot Q_t, rot K_s> v_s / (<Q_t, sum_s K_s> + eps S)

    The rotation turns both halves by the same angles. A query of 0 gives 0.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      sin, cos: of the angles, as in `rotary_linear_attention`; without them nothing rotates.
      k_power: the exponent of keys, at least 1.
      q_power, q_offset: of the exponent of queries.
      eps: added to the mean of a row's weights.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit, or only one of sin and cos is given.

    Source: Meng et al., NaLaFormer, 2025, arXiv 2506.21137.
    """
    wide = _wide(q, k, v)
    queries, keys = q.astype(wide), k.astype(wide)
    square = jnp.sum(jnp.square(queries), -1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    power = q_power * (q_offset + jnp.tanh(norm))
    parts = _signs(_ratio(queries, norm))
    # a power of 0 has the slope 0 * log(0) in its exponent
    queries = jnp.where(parts > 0, jnp.where(parts > 0, parts, 1) ** power, 0)
    if sin is not None and cos is not None:
        sin, cos = (jnp.concatenate([x, x], -1) for x in (sin, cos))
    return _weighted_mean(queries, _signs(keys) ** k_power, v, sin, cos, eps)


def kv_gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_gate: jax.Array,
    value_gate: jax.Array,
    *,
    eps: float = 1e-6,
) -> jax.Array:
    """Linear attention with gates on keys and on values at every position and head.

        Q = relu(q) + 1e-6,    K_s = key_gate_s (relu(k_s) + 1e-6)
        o_t = sum_s <Q_t, K_s> value_gate_s v_s / (sum_s <Q_t, K_s> + eps S)

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      key_gate, value_gate: `[S, H]` or `[B, S, H]`.
      eps: added to the mean of a row's weights.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: LINA, 2026, arXiv 2601.22630.
    """
    wide, gates = _wide(q, k, v, key_gate, value_gate), {}
    for name, gate in ("key_gate", key_gate), ("value_gate", value_gate):
        if gate.ndim not in (2, 3) or gate.shape[-2] not in (1, k.shape[1]):
            raise ValueError(
                f"{name} must be [S, H] or [B, S, H] for k {k.shape}, got {gate.shape}"
            )
        gates[name] = gate.astype(wide).reshape((-1, *gate.shape[-2:], 1))
    queries, keys = (jax.nn.relu(x.astype(wide)) + 1e-6 for x in (q, k))
    queries, keys, values, key_gate, value_gate = match_heads(
        queries, keys, v.astype(wide), *gates.values()
    )
    out = _weighted_mean(queries, keys * key_gate, values * value_gate, None, None, eps)
    return out.astype(v.dtype)


def rotary_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sin: jax.Array,
    cos: jax.Array,
    *,
    feature_map: FeatureMap = "elu1",
    eps: float = 1e-6,
) -> jax.Array:
    """Linear attention that rotates features in its numerator and not in its denominator.

        o_t = sum_s <rot phi(q_t), rot phi(k_s)> v_s / (sum_s <phi(q_t), phi(k_s)> + eps S)

    A rotation takes channels (0, 1), (2, 3), ... to `(x0 cos - x1 sin, x1 cos + x0 sin)`.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, T, K, D]`; K divides H.
      v: `[B, T, K, Dv]`.
      sin, cos: of the angles of every channel, `[T, D]` or `[T, H, D]`.
      feature_map: phi, as in `linear_attention`.
      eps: added to the mean of a row's weights.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit, or the number of channels is odd.

    Source: Su et al., RoFormer, 2021, arXiv 2104.09864.
    """
    phi, wide = resolve(feature_map), _wide(q, k, v)
    return _weighted_mean(phi(q.astype(wide)), phi(k.astype(wide)), v, sin, cos, eps)


def _wide(*arrays):
    return jnp.result_type(jnp.float32, *arrays)


def _signs(x):
    """The positive and the negative part, as channels of their own."""
    return jax.nn.relu(jnp.concatenate([x, -x], -1))


def _ratio(x, y):
    """x / y, and x where y is 0."""
    return x / jnp.where(y == 0, 1, y)


def _sum(queries, keys, values):
    """`sum_s <queries_t, keys_s> values_s`, in the dtype of values."""
    return linear_attention(queries, keys, values, feature_map="identity", normalization="none")


def _weighted_mean(queries, keys, v, sin, cos, eps):
    """Rotated weights by the sum of those that are not, plus eps for every key."""
    values = v.astype(_wide(queries, v))
    total = _sum(queries, keys, jnp.ones_like(values[..., :1])) + eps * keys.shape[1]
    return _ratio(_sum(*_rotated(queries, keys, sin, cos), values), total).astype(v.dtype)


def _rotated(queries, keys, sin, cos):
    """Both with neighbouring channels rotated; as they are without angles."""
    if sin is None and cos is None:
        return queries, keys
    if sin is None or cos is None:
        raise ValueError("sin and cos must be given together, got one of them")
    length, dim = queries.shape[1], queries.shape[3]
    if dim % 2:
        raise ValueError(f"rotated features must have an even dim, got {dim}")
    if keys.shape[1] != length:
        raise ValueError(f"angles need as many keys as queries, got {keys.shape[1]} and {length}")
    for name, x in ("sin", sin), ("cos", cos):
        if x.ndim not in (2, 3) or (x.shape[0], x.shape[-1]) != (length, dim):
            raise ValueError(
                f"{name} must be [T, D] or [T, H, D] with T = {length}, D = {dim}, got {x.shape}"
            )
    sin, cos = (x.astype(queries.dtype).reshape(1, length, -1, dim) for x in (sin, cos))
    queries, keys, sin, cos = match_heads(queries, keys, sin, cos)

    def turn(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        crossed = jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape)
        return x * cos + crossed * sin

    return turn(queries), turn(keys)
