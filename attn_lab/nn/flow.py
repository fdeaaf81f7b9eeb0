"""Flow attention as a token mixer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, divide, split_heads


class FlowAttention(Mixer):
    """Multi-head flow attention: `concat_h flow_attention(x W_q, x W_k, x W_v) W_o`.

    Decoding keeps running sums, a matrix and four vectors a head, whatever the length.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      causal: whether a token sees its past alone; if not, segments cannot be kept apart.
      bias: of the projections.
      eps: as in `ops.flow_attention`.
      build: keywords of `Build`.

    Source: Wu et al., Flowformer, 2022, arXiv 2202.06258.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        causal: bool = True,
        bias: bool = True,
        eps: float = 1e-6,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads, self.head_dim = num_heads, divide(width, num_heads)
        self.causal, self.packs, self.eps = causal, causal, eps
        self.qkv = build.linear(width, 3 * width, bias)
        self.out = build.output(width, width, bias)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        one = jnp.zeros((batch, 1, self.num_heads, self.head_dim))
        state = jax.eval_shape(lambda x: ops.causal_flow_attention(x, x, x)[1], one)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        if not self.causal and (cache is not None or segment_ids is not None):
            name = "cache needs" if segment_ids is None else "segment_ids need"
            raise ValueError(f"{name} causal=True: the flow is over whole rows")
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, -1))
        if self.causal:
            y, state = ops.causal_flow_attention(
                q, k, v, eps=self.eps, initial_state=cache, segment_ids=segment_ids
            )
        else:
            y = ops.flow_attention(q, k, v, eps=self.eps)
        y = self.out(y.reshape(x.shape).astype(x.dtype))
        return y if cache is None else (y, state)
