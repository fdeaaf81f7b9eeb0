"""Attention at a few tokens that ask for it."""

from __future__ import annotations

import math
from typing import Any

import jax

from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import Build


class SelectiveLookupAttention(MultiHeadAttention):
    """Attention added, with its own residual, by as much as a selector asks: `x + s attention(x)`.

    `s = sigmoid(x w)`. In training s is soft, and `objectives.lookup_penalty` of
    `selector(x)` keeps its mean low; afterwards only the largest may be kept.

    Args:
      width, arguments: as `MultiHeadAttention`.
      num_lookups: how many tokens of a sequence are updated if `top`; by default the square root
        of its length, rounded up.
      top: whether tokens but those of the largest s are left as they are. That choice sees whole
        sequences, so it neither decodes nor keeps segments apart.

    Raises:
      ValueError: if `num_lookups` is negative.

    Source: Arora et al., Zoology, 2023, arXiv 2312.04927.
    """

    def __init__(
        self, width: int, *, num_lookups: int | None = None, top: bool = False, **arguments: Any
    ):
        if num_lookups is not None and num_lookups < 0:
            raise ValueError(f"num_lookups must not be negative, got {num_lookups}")
        super().__init__(width, **arguments)
        self.num_lookups, self.top = num_lookups, top
        self.select = Build.of(arguments).linear(width, 1)

    def selector(self, x: jax.Array) -> jax.Array:
        """How much every token asks, `[B, T]`."""
        return jax.nn.sigmoid(self.select(x)[..., 0])

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if self.top and (segment_ids is not None or cache is not None):
            raise ValueError("segment_ids and cache need top=False: the largest are of a sequence")
        y = super().__call__(x, segment_ids=segment_ids, cache=cache, rngs=rngs)
        update, cache = (y, None) if cache is None else y
        count = None
        if self.top:
            count = self.num_lookups
            count = math.ceil(math.sqrt(x.shape[1])) if count is None else count
        y = ops.selective_lookup(x, update, self.selector(x), num_selected=count)
        return y if cache is None else (y, cache)
