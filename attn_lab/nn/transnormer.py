"""TransNormer's layers: linear attention normed over all heads, and softmax within blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import Build
from attn_lab.nn.recurrent import MatrixStateMixer


class NormAttention(MatrixStateMixer):
    """Linear attention whose output is normed over all heads and then gated.

    `O_t = sum_{s <= t} <phi(q_t), phi(k_s)> v_s`, `y_t = W_o(swish(x_t W_g) * O_t / rms(O_t))`.

    Args:
      width: of the input and output.
      num_heads: H.
      hidden_dim: of all heads together, by default `width`.
      feature_map: phi, a name in `ops.feature_maps`.
      output_gate: "swish", "linear" (without an activation) or None.
      norm_eps: added to the mean square.

    Source: Qin et al., TransNormer, 2022, arXiv 2210.10340.
    """

    scale = 1.0

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        hidden_dim: int | None = None,
        feature_map: str = "elu1",
        output_gate: str | None = "swish",
        norm_eps: float = 1e-6,
        **build: Any,
    ):
        ops.feature_map(feature_map)
        self.feature_map, self.norm_eps = feature_map, norm_eps
        hidden_dim = width if hidden_dim is None else hidden_dim
        super().__init__(
            width,
            num_heads=num_heads,
            key_width=hidden_dim,
            value_width=hidden_dim,
            short_conv=None,
            activation="identity",
            qk_norm=None,
            output_gate=output_gate,
            norm_eps=None,
            **build,
        )

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        features = jax.eval_shape(ops.feature_map(self.feature_map), jnp.zeros(self.head_dim))
        shape = batch, self.num_heads, features.shape[0], self.value_dim
        return super().init_cache(batch, length, dtype) | {"state": jnp.zeros(shape, jnp.float32)}

    def heads(self, q, k, v, positions):
        phi = ops.feature_map(self.feature_map)
        return phi(q), phi(k), v

    def finish(self, y):
        joined = y.reshape(*y.shape[:2], -1)
        return ops.simple_rms_norm(joined, eps=self.norm_eps).reshape(y.shape)


class TransNormerMixer(NormAttention):
    """Lightning attention normed over all heads, with a gate that has no activation.

    `O_t = sum_{s <= t} exp(-slope_h (t - s)) <q_t, k_s> v_s` with `q, k = act(x W)`, in the first
    layer with the positions of `ops.lrpe` at learned frequencies, and
    `y_t = W_o((x_t W_u) * O_t / rms(O_t))`.

    Args:
      width, num_heads, hidden_dim, norm_eps: as in `NormAttention`.
      act: of queries and keys, a name in `ops.feature_maps` that keeps the dimension.
      use_lrpe: whether queries and keys have positions; None is in the first layer alone.
      depth: the layer's number, from 0; slopes fall with it.
      num_layers: of the model.

    Source: Qin et al., TransNormerLLM, 2023, arXiv 2307.14995.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        hidden_dim: int | None = None,
        act: str = "silu",
        use_lrpe: bool | None = None,
        depth: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-6,
        **build: Any,
    ):
        super().__init__(
            width,
            num_heads=num_heads,
            hidden_dim=hidden_dim,
            feature_map=act,
            output_gate="linear",
            norm_eps=norm_eps,
            **build,
        )
        ops.lightning_slopes(num_heads, depth, num_layers)  # refuses a depth that is not a layer's
        self.depth, self.num_layers = depth, num_layers
        positions = depth == 0 if use_lrpe is None else use_lrpe
        frequencies = Build(**build).param((num_heads, self.head_dim), _frequencies)
        self.theta = frequencies if positions else nnx.data(None)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        cache = super().init_cache(batch, length, dtype)
        if self.theta is None:
            return cache
        doubled = jnp.concatenate([cache["state"]] * 2, 2)
        return cache | {"state": doubled, "index": jnp.zeros((), jnp.int32)}

    def gates(self, x, positions):
        slopes = ops.lightning_slopes(self.num_heads, self.depth, self.num_layers)
        return jnp.broadcast_to(-slopes, (*x.shape[:2], self.num_heads)), None

    def heads(self, q, k, v, positions):
        q, k, v = super().heads(q, k, v, positions)
        if self.theta is None:
            return q, k, v
        theta, first = self.theta[...], positions[0]
        return ops.lrpe(q, theta, offset=first), ops.lrpe(k, theta, offset=first), v


def _frequencies(key, shape, dtype):
    """`10000^(-2 i / (H D))`, i the number of a channel among those of all heads."""
    size = shape[0] * shape[1]
    return 10000 ** (-2 * jnp.arange(size, dtype=dtype) / size).reshape(shape)


class SimpleGLU(nnx.Module):
    """A gated linear unit without an activation: `W_3((W_1 x) * (W_2 x))`.

    Args:
      width: of the input and output.
      hidden: of the product.
      bias: of the three maps.
      build: keywords of `Build`.

    Source: Qin et al., TransNormerLLM, 2023, arXiv 2307.14995.
    """

    def __init__(self, width: int, *, hidden: int, bias: bool = False, **build: Any):
        build = Build(**build)
        self.up, self.gate = build.linear(width, hidden, bias), build.linear(width, hidden, bias)
        self.down = build.output(hidden, width, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.gate(x) * self.up(x))


class DiagAttention(MultiHeadAttention):
    """Multi-head softmax attention within blocks of tokens that do not overlap.

    A packed row's documents have blocks of their own, from their first token on. The cache keeps a
    block, whatever the length.

    Args:
      width, arguments: as `MultiHeadAttention`.
      block_size: tokens a block.

    Raises:
      ValueError: if `block_size` is not positive.

    Source: Qin et al., TransNormer, 2022, arXiv 2210.10340.
    """

    def __init__(self, width: int, *, block_size: int = 64, **arguments: Any):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        super().__init__(width, **arguments)
        self.block_size = block_size

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        return super().init_cache(batch, self.block_size - 1, dtype)

    def _inputs(self, x, segment_ids, cache):
        q, k, v, mask, new = super()._inputs(x, segment_ids, cache)
        if cache is not None:
            return q, k, v, mask, new
        if segment_ids is None:
            blocks = ops.block_local_mask(x.shape[1], self.block_size)
        else:
            index = jnp.arange(x.shape[1])
            starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
            start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
            blocks = ops.segment_mask(start + (index - start) // self.block_size * self.block_size)
        return q, k, v, blocks if mask is None else mask & blocks, new

    def _continue(self, cache, k, v):
        past, count = cache["index"], k.shape[1]
        new = {"key": k, "value": v}
        seen = {
            name: jnp.concatenate([cache[name], x.astype(cache[name].dtype)], 1)
            for name, x in new.items()
        }
        first = past - (self.block_size - 1)  # slots before the sequence are of negative blocks
        block = (first + jnp.arange(seen["key"].shape[1])) // self.block_size
        mask = ops.segment_mask(block[None, -count:], block[None])
        mask = mask & ops.sliding_window_mask(*self._reach())
        return seen["key"], seen["value"], mask, {n: x[:, count:] for n, x in seen.items()}
