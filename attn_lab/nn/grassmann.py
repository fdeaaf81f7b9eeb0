"""A token mixer of the planes that tokens span with earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from attn_lab.nn.layers import Build, Mixer, dropout
from attn_lab.ops.grassmann import gate_in, mean_plane


class GrassmannMixing(Mixer):
    """`ops.grassmann_mixing` with learned maps, then a layer norm and dropout.

    Args:
      width: C, of the input and output.
      reduced_dim: r, of the tokens whose planes are taken.
      offsets: distances back, positive.
      norm_eps: of the layer norm.
      dropout: rate on the output.
      build: keywords of `Build`.

    Raises:
      ValueError: if an offset is not positive.

    Source: arXiv 2512.19428, 2025.
    """

    def __init__(
        self,
        width: int,
        *,
        reduced_dim: int = 32,
        offsets: Sequence[int] = (1, 2, 4, 8, 12, 16),
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        **build: Any,
    ):
        if not offsets or min(offsets) < 1:
            raise ValueError(f"offsets must be positive, at least one, got {tuple(offsets)}")
        build = Build(**build)
        self.offsets, self.dropout = tuple(offsets), dropout
        self.reduce = build.linear(width, reduced_dim, True)
        self.plane = build.linear(reduced_dim * (reduced_dim - 1) // 2, width, True)
        self.gate = build.output(2 * width, width, True)
        self.norm = build.layer_norm(width, norm_eps)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        past = batch, max(self.offsets), self.reduce.out_features
        return {"index": jnp.zeros((), jnp.int32), "past": jnp.zeros(past, jnp.float32)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        length, reach = x.shape[1], max(self.offsets)
        h = x.astype(jnp.result_type(x, jnp.float32))
        z = h @ self.reduce.kernel[...] + self.reduce.bias[...]
        back = jnp.array(self.offsets)
        place = jnp.arange(length) + (0 if cache is None else cache["index"])
        valid = place[:, None] >= back
        if segment_ids is not None:
            before = jnp.pad(segment_ids, ((0, 0), (reach, 0)), constant_values=-1)
            earlier = before[:, jnp.arange(length)[:, None] + reach - back]
            valid &= earlier == segment_ids[..., None]
        past = jnp.zeros_like(z, shape=(len(x), reach, z.shape[-1]))
        seen = jnp.concatenate([past if cache is None else cache["past"], z], 1)
        g = mean_plane(seen, valid, self.offsets, self.plane.kernel[...], self.plane.bias[...])
        y = gate_in(h, g, self.gate.kernel[...], self.gate.bias[...])
        y = dropout(self.norm(y).astype(x.dtype), self.dropout, rngs)
        if cache is None:
            return y
        return y, {"index": cache["index"] + length, "past": seen[:, length:]}
