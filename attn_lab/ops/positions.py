"""Positions in attention: rotary embeddings and linear biases."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "alibi_bias",
    "alibi_bias_factors",
    "alibi_slopes",
    "apply_rotary",
    "relative_position_bias",
    "relative_position_bucket",
    "rotary_frequencies",
]

SCALINGS = "linear", "ntk", "dynamic", "yarn", "llama3"


def rotary_frequencies(
    dim: int,
    *,
    theta: float = 10000.0,
    scaling: Mapping | None = None,
    seq_len: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Frequencies of rotary embeddings: `f_i = theta^(-2 i / dim)`, scaled for longer contexts.

    Args:
      dim: the number of channels that rotate, even.
      theta: the base.
      scaling: None, or a mapping with "type" and "factor" c:
        "linear": `f / c` (Chen et al., 2023, arXiv 2306.15595);
        "ntk": the base becomes `theta c^(dim / (dim - 2))`;
        "dynamic" (+ "original_length" L): as ntk with `c seq_len / L - (c - 1)` beyond L;
        "yarn" (+ "original_length", "beta_fast" 32, "beta_slow" 1): between f and f / c by the
        number of turns within L (Peng et al., 2023, arXiv 2309.00071);
        "llama3" (+ "original_length" 8192, "low_freq_factor" 1, "high_freq_factor" 4): between f
        and f / c by wavelength (Llama 3, 2024, arXiv 2407.21783).
      seq_len: the present length, which "dynamic" needs.

    Returns:
      `inv_freq [dim / 2]`, and the factor on cos and sin (1 but for "yarn"), for `apply_rotary`.

    Raises:
      ValueError: if `dim` is odd, the type is unknown, or `seq_len` is missing.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    scaling = dict(scaling or {"type": None})
    kind, factor = scaling["type"], scaling.get("factor", 1.0)
    if kind not in (None, *SCALINGS):
        raise ValueError(f"scaling type {kind!r} is unknown; choose one of {', '.join(SCALINGS)}")
    length = scaling.get("original_length", 8192)
    if kind == "dynamic":
        if seq_len is None:
            raise ValueError("scaling 'dynamic' needs seq_len")
        factor = max(1.0, factor * seq_len / length - (factor - 1))
    if kind in ("ntk", "dynamic"):
        theta = theta * factor ** (dim / (dim - 2))
    index = np.arange(dim // 2)
    frequency = theta ** (-2.0 * index / dim)
    attention_factor = 1.0
    if kind == "linear":
        frequency = frequency / factor
    elif kind == "yarn":

        def channel(turns):
            return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

        low = max(math.floor(channel(scaling.get("beta_fast", 32))), 0)
        high = min(math.ceil(channel(scaling.get("beta_slow", 1))), dim - 1)
        ramp = np.clip((index - low) / (high - low if high > low else 0.001), 0, 1)
        frequency = ramp * frequency / factor + (1 - ramp) * frequency
        attention_factor = 0.1 * math.log(factor) + 1.0
    elif kind == "llama3":
        low, high = scaling.get("low_freq_factor", 1), scaling.get("high_freq_factor", 4)
        turns = length * frequency / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    dtype = jnp.result_type(float)
    return jnp.asarray(frequency, dtype), jnp.asarray(attention_factor, dtype)


def apply_rotary(
    x: jax.Array,
    positions: jax.Array,
    *,
    theta: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    inv_freq: jax.Array | None = None,
    attention_factor: float | jax.Array = 1.0,
) -> jax.Array:
    """Rotates pairs of channels by their position: `(x1 cos a - x2 sin a, x2 cos a + x1 sin a)`.

    The angle is `a = position * f_i`. Products of a rotated query and key depend on the distance
    of their positions only.

    Args:
      x: `[B, T, H, D]`.
      positions: integers `[T]` or `[B, T]`.
      theta: the base of the frequencies `theta^(-2 i / rotary_dim)`.
      rotary_dim: how many channels rotate, even, the first ones; None rotates all.
      interleaved: pairs are even and odd channels instead of the two halves.
      inv_freq: frequencies `[rotary_dim / 2]` to use instead: see `rotary_frequencies`.
      attention_factor: multiplies cos and sin.

    Returns:
      The shape and dtype of `x`; angles are in float32 or better.

    Raises:
      ValueError: if `rotary_dim` is odd or larger than D.

    Source: Su et al., RoFormer, 2021, arXiv 2104.09864.
    """
    rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or rotary_dim > x.shape[-1]:
        raise ValueError(f"rotary_dim must be even and at most {x.shape[-1]}, got {rotary_dim}")
    if inv_freq is None:
        inv_freq = rotary_frequencies(rotary_dim, theta=theta)[0]
    dtype = jnp.result_type(x, jnp.float32)
    angle = positions[..., None, None].astype(dtype) * inv_freq.astype(dtype)
    cos, sin = jnp.cos(angle) * attention_factor, jnp.sin(angle) * attention_factor
    turning, rest = x[..., :rotary_dim].astype(dtype), x[..., rotary_dim:]
    axis = -1 if interleaved else -2
    shape = (-1, 2) if interleaved else (2, -1)
    x1, x2 = jnp.moveaxis(turning.reshape(*x.shape[:-1], *shape), axis, 0)
    turned = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis)
    turned = turned.reshape(*x.shape[:-1], rotary_dim).astype(x.dtype)
    return jnp.concatenate([turned, rest], -1)


def alibi_slopes(num_heads: int) -> jax.Array:
    """The slopes of linear biases, `[H]`: `2^(-8 (h + 1) / H)` for a power of two.

    Otherwise those of the next smaller power of two c, then every other slope of 2 c heads.

    Source: Press et al., 2021, arXiv 2108.12409.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be positive, got {num_heads}")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return jnp.asarray(np.concatenate([slopes, between])[:num_heads], jnp.result_type(float))


def alibi_bias(num_heads: int, q_len: int, k_len: int) -> jax.Array:
    """A penalty on distance, `-m_h |t + S - T - j|`: `[1, H, q_len, k_len]`, added to scores.

    Source: Press et al., Train Short, Test Long, 2021, arXiv 2108.12409.
    """
    slopes = alibi_slopes(num_heads)
    distance = jnp.abs(_query_positions(q_len, k_len)[:, None] - jnp.arange(k_len))
    return -slopes[:, None, None] * distance[None, None]


def alibi_bias_factors(num_heads: int, q_len: int, k_len: int) -> tuple[jax.Array, jax.Array]:
    """Rank-2 factors `[1, q_len, H, 2]`, `[1, k_len, H, 2]` with product `m_h (j - t - (S - T))`.

    This is `alibi_bias` where `j <= t + S - T`. Source: Press et al., 2021, arXiv 2108.12409.
    """
    slopes = alibi_slopes(num_heads)
    positions = _query_positions(q_len, k_len)[:, None]
    of_query = jnp.stack([jnp.broadcast_to(slopes, (q_len, num_heads)), -slopes * positions], -1)
    keys = jnp.broadcast_to(jnp.arange(k_len, dtype=slopes.dtype)[:, None], (k_len, num_heads))
    return of_query[None], jnp.stack([keys, jnp.ones_like(keys)], -1)[None]


def relative_position_bucket(
    relative_position: jax.Array,
    *,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> jax.Array:
    """Buckets of distances, one by one for near and logarithmic for far keys.

    With n buckets a side and `e = n / 2`, distance d is in bucket d below e, and from there in
    `e + floor((n - e) log(d / e) / log(max_distance / e))`, at most `n - 1`.

    Args:
      relative_position: integers, key minus query, any shape.
      bidirectional: whether keys ahead have the second half of the buckets; else they are at 0.
      num_buckets: of both sides together.
      max_distance: from which on all keys share a bucket.

    Returns:
      The shape of `relative_position`, int32 within 0 and `num_buckets - 1`.

    Raises:
      ValueError: if the buckets are too few, or reach further than `max_distance`.

    Source: Raffel et al., T5, 2019, arXiv 1910.10683.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    near = side // 2
    if near < 1 or max_distance <= near:
        raise ValueError(
            f"num_buckets={num_buckets} must leave at least 2 a side, and max_distance must be "
            f"above {near}, got {max_distance}"
        )
    # The least distances of buckets 1, 2, ..., with slack for those that are exact powers.
    steps = (np.arange(1, side - near) - 1e-6) / (side - near)
    edges = [*range(1, near + 1), *np.ceil(near * (max_distance / near) ** steps).astype(int)]
    ahead = relative_position > 0
    distance = jnp.abs(relative_position) if bidirectional else jnp.maximum(-relative_position, 0)
    bucket = jnp.searchsorted(jnp.array(edges), distance, side="right").astype(jnp.int32)
    return bucket + side * ahead if bidirectional else bucket


def relative_position_bias(
    table: jax.Array,
    *,
    q_len: int,
    k_len: int,
    bidirectional: bool = True,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> jax.Array:
    """A learned number for every head and bucket of distances, added to scores.

    Args:
      table: `[num_buckets, H]`.
      q_len, k_len: T and S; the last query meets the last key.
      bidirectional, num_buckets, max_distance: as in `relative_position_bucket`.

    Returns:
      `[1, H, q_len, k_len]`.

    Raises:
      ValueError: if the table has another number of buckets.

    Source: Raffel et al., T5, 2019, arXiv 1910.10683; T5 does not scale its scores otherwise.
    """
    if table.ndim != 2 or table.shape[0] != num_buckets:
        raise ValueError(f"table must be [{num_buckets}, H], got {list(table.shape)}")
    bucket = relative_position_bucket(
        jnp.arange(k_len) - _query_positions(q_len, k_len)[:, None],
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    return jnp.moveaxis(table[bucket], -1, 0)[None]


def _query_positions(q_len: int, k_len: int) -> jax.Array:
    return jnp.arange(q_len) + (k_len - q_len)
