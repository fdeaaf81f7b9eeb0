"""Multi-head attention with other scores: cosines, temperatures, lengths and positions."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import ScoreMod, attention, operand
from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import Build
from attn_lab.ops.scores import visible_keys

zeros = nnx.initializers.zeros_init()


class _OtherScores(MultiHeadAttention):
    """Attention whose weights do not come from the scaled products alone."""

    drops = False

    def _scores(self, q, k, mask):
        raise ValueError(f"{type(self).__name__} has no scores to capture")


class CosineAttention(_OtherScores):
    """Multi-head attention by cosines with one learned scale, first `log2(L^2 - L)`.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      context: the training length L, at least 2.

    Source: Henry et al., 2020, arXiv 2010.04245.
    """

    def __init__(self, width: int, *, context: int = 75, **arguments: Any):
        super().__init__(width, **arguments)
        length = max(context, 2)
        start = nnx.initializers.constant(math.log2(length**2 - length))
        self.cosine_scale = Build.of(arguments).param((), start)

    def _attend(self, q, k, v, mask, rngs):
        return ops.qk_norm_attention(q, k, v, self.cosine_scale[...], mask=mask)


class SelectiveAttention(_OtherScores):
    """Multi-head attention with inverse temperatures from the tokens and from the visible length.

    `tau_q = 1 + tanh(x W) + sigmoid(alpha) log n_t`, and values are scaled by `1 + tanh(x W')`.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.

    Source: Zhang et al., 2024, arXiv 2411.12892.
    """

    def __init__(self, width: int, **arguments: Any):
        super().__init__(width, **arguments)
        build = Build.of(arguments)
        self.of_query = build.linear(width, self.num_heads)
        self.of_value = build.linear(width, self.num_kv_heads)
        self.growth = build.param((self.num_heads,), nnx.initializers.constant(-4.5))

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        q, k, v, mask, cache = self._inputs(x, segment_ids, cache)
        y = self._project(self._select(q, k, v, mask, x), x)
        return y if cache is None else (y, cache)

    def weights(self, x, *, segment_ids=None):
        q, k, _, mask, _ = self._inputs(x, segment_ids, None)
        length = k.shape[1]
        unit = jnp.broadcast_to(jnp.eye(length)[:, None], (x.shape[0], length, 1, length))
        return jnp.swapaxes(self._select(q, k, unit, mask, x), 1, 2)

    def _modulate(self, q, k, v, x):
        return q, k, v * (1 + jnp.tanh(self.of_value(x)))[..., None]

    def _select(self, q, k, v, mask, x):
        seen = jnp.log(jnp.maximum(visible_keys(mask, q.shape[1], k.shape[1]), 1))
        growth = jax.nn.sigmoid(self.growth[...].astype(seen.dtype))
        tau = 1 + growth * jnp.moveaxis(seen[..., 0], 1, 2)
        tau = tau + jnp.tanh(self.of_query(x).astype(seen.dtype))
        return ops.selective_attention(q, k, v, tau, mask=mask)


class LengthScaledAttention(_OtherScores):
    """Multi-head attention with scores that grow with the logarithm of the visible length.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      mode: as in `ops.length_scaled_attention`; the slopes of "learned" are first 0.
      context: the length at which "log_base" is plain attention.

    Source: Chiang and Cholak, 2022, arXiv 2202.12172.
    """

    def __init__(
        self, width: int, *, mode: str = "learned", context: int | None = None, **arguments: Any
    ):
        super().__init__(width, **arguments)
        self.attend = functools.partial(
            ops.length_scaled_attention,
            mode=mode,
            base_length=context if mode == "log_base" else None,
        )
        learned = mode == "learned"
        build = Build.of(arguments)
        self.slope = build.param((self.num_heads,), zeros) if learned else nnx.data(None)

    def _attend(self, q, k, v, mask, rngs):
        slope = None if self.slope is None else self.slope[...]
        return self.attend(q, k, v, slope=slope, mask=mask)


class _PositionBias(_OtherScores):
    """Attention with a bias by distance, which must know where cached queries stand."""

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        past = 0 if cache is None else cache["index"]
        q, k, v, mask, cache = self._inputs(x, segment_ids, cache)
        shift = past + q.shape[1] - k.shape[1]
        y = self._project(self._attend(q, k, v, mask, rngs, shift), x)
        return y if cache is None else (y, cache)


class LinearBiasAttention(_PositionBias):
    """Multi-head attention with a fixed penalty on distance, of another slope for each head.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.

    Source: Press et al., ALiBi, 2021, arXiv 2108.12409.
    """

    def _attend(self, q, k, v, mask, rngs, shift=0):
        slopes = operand(ops.alibi_slopes(self.num_heads), "h")
        score_mod = ScoreMod(_distance_penalty, (slopes, operand(shift, "")))
        return attention(q, k, v, mask=mask, score_mod=score_mod)


class RelativeBiasAttention(_PositionBias):
    """Multi-head attention with a learned bias for each head and bucket of distances.

    The bias is an array `[H, T, S]`.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      num_buckets, max_distance: as in `ops.relative_position_bucket`.
      scale: of the scores, by default `1 / sqrt(head_dim)`; T5 has 1.

    Source: Raffel et al., T5, 2019, arXiv 1910.10683.
    """

    def __init__(
        self,
        width: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        scale: float | None = None,
        **arguments: Any,
    ):
        super().__init__(width, **arguments)
        self.bucket = functools.partial(
            ops.relative_position_bucket,
            bidirectional=not self.causal,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )
        self.scale = scale
        normal = nnx.initializers.normal(0.02)
        self.table = Build.of(arguments).param((num_buckets, self.num_heads), normal)

    def _attend(self, q, k, v, mask, rngs, shift=0):
        q_len, k_len = q.shape[1], k.shape[1]
        places = jnp.arange(q_len) + (k_len - q_len) + shift
        bias = self.table[...][self.bucket(jnp.arange(k_len) - places[:, None])]
        bias = jnp.moveaxis(bias, -1, 0)
        return ops.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=self.scale)


class GatedPositionalAttention(MultiHeadAttention):
    """Multi-head attention over a grid, gated between content and position, first a convolution.

    With n = floor(sqrt(num_heads)), the first n^2 heads look at one offset each of an n x n kernel.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout, causality or a cache.
      shape: (Y, X) of the grid; inputs are `[B, Y X, width]`.
      strength: of the positional scores at first.

    Source: d'Ascoli et al., ConViT, 2021, arXiv 2103.10697.
    """

    drops = False

    def __init__(
        self, width: int, *, shape: tuple[int, int], strength: float = 1.0, **arguments: Any
    ):
        super().__init__(width, causal=False, **arguments)
        self.shape = tuple(shape)
        build, heads = Build.of(arguments), self.num_heads
        side = math.isqrt(heads)
        centre = side // 2 if side % 2 else (side - 1) / 2
        across, down = jnp.divmod(jnp.arange(side**2), side)
        offsets = jnp.stack([2 * (across - centre), 2 * (down - centre), -jnp.ones(side**2)])

        def start(key, shape, dtype):
            x = nnx.initializers.truncated_normal(0.02)(key, shape, dtype)
            return x.at[:, : side**2].set(strength * offsets)

        self.position_weight = build.param((3, heads), start)
        self.position_bias = build.param((heads,), zeros)
        self.gate = build.param((heads,), nnx.initializers.ones)

    def _attend(self, q, k, v, mask, rngs):
        if mask is not None:
            raise ValueError("gated positional attention takes no window, segments or cache")
        weight, bias = self.position_weight[...], self.position_bias[...]
        place = ops.quadratic_position_scores(weight, bias, shape=self.shape)
        return ops.gated_positional_attention(q, k, v, place, self.gate[...])


def _distance_penalty(score, b, h, q_index, k_index, slope, shift):
    return score - slope * jnp.abs(q_index + shift - k_index)
