"""Attention as a quadrature, for functions on a grid."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.bidirectional import BidirectionalMixer
from attn_lab.nn.layers import Build, divide, split_heads

NORMED = {"galerkin": "kv", "linear": "kv", "fourier": "qk", "softmax": "qk"}


class GalerkinAttention(BidirectionalMixer):
    """Attention of a function's values on a grid, with their coordinates in every head.

    Two of q, k and v are normed per head, which are then all preceded by the coordinates. The
    projections start near a small multiple of the identity.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      pos_dim: coordinates of a point; 0 has none.
      kind: "galerkin" (`q (k^T v) / S`, k and v normed), "fourier" (`(q k^T) v / S` over the root
        of the dimension, q and k normed), "linear" (`ops.efficient_attention / S`, k and v normed)
        or "softmax" (q and k normed).
      xavier_init: the gain of the Xavier uniform part of the first projections; 0 takes the
        initialiser of the build for that part.
      diagonal_weight: the multiple of the identity that is added to it.
      norm_eps: added to the variances.
      causal: must be False.
      build: keywords of `Build`.

    Raises:
      ValueError: if the kind is unknown, or coordinates are missing or do not fit.

    Source: Cao, 2021, arXiv 2105.14995.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        pos_dim: int = 1,
        kind: str = "galerkin",
        xavier_init: float = 1e-4,
        diagonal_weight: float = 1e-2,
        norm_eps: float = 1e-5,
        causal: bool = True,
        **build: Any,
    ):
        super().__init__(causal)
        if kind not in NORMED:
            raise ValueError(f"kind must be one of {', '.join(NORMED)}, got {kind!r}")
        build, dim = Build(**build), divide(width, num_heads)
        self.num_heads, self.pos_dim, self.kind, self.norm_eps = num_heads, pos_dim, kind, norm_eps

        def near_identity(*arguments):
            random = nnx.initializers.xavier_uniform() if xavier_init else build.kernel_init
            kernel = random(*arguments)
            identity = jnp.eye(width, dtype=kernel.dtype)
            return (xavier_init or 1) * kernel + diagonal_weight * identity

        projections = dataclasses.replace(build, kernel_init=near_identity)
        self.projections = nnx.Dict({n: projections.linear(width, width, True) for n in "qkv"})
        first = nnx.initializers.ones, nnx.initializers.zeros
        self.norms = nnx.Dict(
            {
                n: nnx.List([build.param((num_heads, dim), init) for init in first])
                for n in NORMED[kind]
            }
        )
        self.out = build.output(width + num_heads * pos_dim, width, True)

    def __call__(self, x, *, coordinates=None, segment_ids=None, cache=None, rngs=None):
        """`[B, T, width]` to the same, at the coordinates `[B, T, pos_dim]` of the tokens.

        By default one coordinate runs from 0 to 1.
        """
        if segment_ids is not None or cache is not None:
            return super().__call__(x, segment_ids=segment_ids, cache=cache)  # which refuses them
        return self.mix(x, coordinates)

    def mix(self, x: jax.Array, coordinates: jax.Array | None = None) -> jax.Array:
        heads = {n: split_heads(self.projections[n](x), self.num_heads) for n in "qkv"}
        for n, (weight, bias) in self.norms.items():
            heads[n] = ops.head_layer_norm(heads[n], weight[...], bias[...], eps=self.norm_eps)
        if self.pos_dim:
            given = self._coordinates(x, coordinates)[:, :, None].astype(x.dtype)
            given = jnp.broadcast_to(given, (*heads["q"].shape[:3], self.pos_dim))
            heads = {n: jnp.concatenate([given, y], -1) for n, y in heads.items()}
        return self.out(self._attend(**heads).reshape(*x.shape[:2], -1))

    def _coordinates(self, x, coordinates):
        shape = *x.shape[:2], self.pos_dim
        if coordinates is None and self.pos_dim == 1:
            return jnp.broadcast_to(jnp.linspace(0, 1, x.shape[1])[:, None], shape)
        if coordinates is None or coordinates.shape != shape:
            got = None if coordinates is None else coordinates.shape
            raise ValueError(f"coordinates must be [B, T, pos_dim] = {list(shape)}, got {got}")
        return coordinates

    def _attend(self, q, k, v):
        if self.kind == "softmax":
            return ops.dot_product_attention(q, k, v)
        if self.kind == "linear":
            return ops.efficient_attention(q, k, v) / k.shape[1]
        scale = (
            1 / k.shape[1] if self.kind == "galerkin" else 1 / k.shape[1] / math.sqrt(q.shape[-1])
        )
        return ops.linear_attention(
            q, k, v, feature_map="identity", normalization="none", scale=scale
        )
