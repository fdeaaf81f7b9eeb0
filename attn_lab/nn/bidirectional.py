"""Linear attention that reads whole sequences."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, divide, split_heads


class BidirectionalMixer(Mixer):
    """A mixer whose every output reads all tokens: the base of those without cache and segments.

    Args:
      causal: must be False.
    """

    decodes = False
    packs = False

    def __init__(self, causal: bool):
        if causal:
            raise ValueError("causal must be False: every output reads all tokens")

    def mix(self, x: jax.Array) -> jax.Array:
        """`[B, T, width]` to the same."""
        raise NotImplementedError

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if segment_ids is not None:
            raise ValueError("segment_ids need a mixer that is causal: sums are over whole rows")
        if cache is not None:
            raise ValueError("cache needs causal=True: later tokens change earlier outputs")
        return self.mix(x)


class EfficientAttention(BidirectionalMixer):
    """Multi-head `ops.efficient_attention`: channels of queries and positions of keys softmaxed.

    Args:
      width: of the input and output.
      num_heads: H, which divides the channels.
      key_channels, value_channels: of all heads together, by default `width`.
      causal: must be False.
      bias: of the projections.
      build: keywords of `Build`.

    Source: Shen et al., 2018, arXiv 1812.01243.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        key_channels: int | None = None,
        value_channels: int | None = None,
        causal: bool = True,
        bias: bool = True,
        **build: Any,
    ):
        super().__init__(causal)
        build, self.num_heads = Build(**build), num_heads
        keys = width if key_channels is None else key_channels
        values = width if value_channels is None else value_channels
        divide(keys, num_heads, "key channels")
        divide(values, num_heads, "value channels")
        self.splits = keys, 2 * keys
        self.qkv = build.linear(width, 2 * keys + values, bias)
        self.out = build.output(values, width, bias)

    def mix(self, x):
        parts = jnp.split(self.qkv(x), self.splits, -1)
        y = ops.efficient_attention(*(split_heads(part, self.num_heads) for part in parts))
        return self.out(y.reshape(*x.shape[:2], -1))


class GeneralizedLinearAttention(BidirectionalMixer):
    """Linear attention whose queries and keys come from `x + F(x)`, with a mean as normaliser.

    `q = W_q(x + F_q(x))` and likewise k, with `F = W_2 leaky_relu(norm(W_1 x))`, which is first 0:
    then it is the attention that it is to replace, but linear.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      mid_dim: hidden units of F, by default `width`; with -1 F is the identity.
      eps: added to the mean of a row's weights.
      causal: must be False.
      build: keywords of `Build`.

    Source: Liu et al., LinFusion, 2024, arXiv 2409.02097.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        mid_dim: int | None = None,
        eps: float = 1e-4,
        causal: bool = True,
        **build: Any,
    ):
        super().__init__(causal)
        build, self.num_heads, self.eps = Build(**build), num_heads, eps
        divide(width, num_heads)
        self.query, self.key, self.value = (build.linear(width, width) for _ in range(3))
        hidden = width if mid_dim is None else mid_dim
        self.query_map, self.key_map = (_detour(width, hidden, build) for _ in range(2))
        self.out = build.output(width, width, True)

    def mix(self, x):
        parts = self.query(x + self.query_map(x)), self.key(x + self.key_map(x)), self.value(x)
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        y = ops.linear_attention(q, k, v, eps=self.eps * x.shape[1])
        return self.out(y.reshape(x.shape))


def _detour(width, hidden, build):
    """The map F of a generalised query or key."""
    if hidden == -1:
        return nnx.Sequential()
    last = build.linear(hidden, width, True)
    last.kernel[...] = jnp.zeros_like(last.kernel[...])
    activation = functools.partial(jax.nn.leaky_relu, negative_slope=0.01)
    norm = build.layer_norm(hidden)
    return nnx.Sequential(build.linear(width, hidden, True), norm, activation, last)
