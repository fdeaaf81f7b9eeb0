"""Multi-head attention in which every key scores itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import split_heads


class SelfGatedPooling(MultiHeadAttention):
    """Multi-head average whose weights are a softmax of each key's own score.

    `a_j = <silu(q_j), k_j> / sqrt(D)` and `out_t = sum_j softmax_j(a_j) v_j`: the cache keeps one
    number for each key and head, and its value.

    Args:
      width, arguments: as `MultiHeadAttention`, without `qk_norm` and rotary positions.

    Raises:
      ValueError: on `qk_norm` or `rope_theta`, or if head counts do not divide.

    Source: Deconstructing Attention, 2025, arXiv 2510.11602.
    """

    def __init__(self, width: int, **arguments: Any):
        for name in "qk_norm", "rope_theta":
            if arguments.get(name) is not None:
                raise ValueError(
                    f"{name} must be None, got {arguments[name]}: a key is met by no query"
                )
        super().__init__(width, **arguments)

    def _make_projections(self, width, bias, out_bias, build):
        super()._make_projections(width, bias, out_bias, build)
        self.key = build.linear(width, self.num_kv_heads * self.head_dim, bias)

    @property
    def key_heads(self) -> int:
        return self.num_heads

    @property
    def key_dim(self) -> int:
        return 1

    def _heads(self, x, segment_ids, cache):
        q, k = (
            split_heads(self.query(x), self.num_heads),
            split_heads(self.key(x), self.num_kv_heads),
        )
        wide = jnp.result_type(q, jnp.float32)
        k = jnp.repeat(k, self.num_heads // self.num_kv_heads, axis=2).astype(wide)
        score = (jax.nn.silu(q.astype(wide)) * k).sum(-1, keepdims=True) * self.head_dim**-0.5
        return jnp.ones_like(score), score, split_heads(self.value(x), self.value_heads), {}
