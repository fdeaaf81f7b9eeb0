"""Token mixers through a fixed number of rows: latent variables, or projections of the length."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.bidirectional import BidirectionalMixer
from attn_lab.nn.layers import Build, Mixer, divide, split_heads
from attn_lab.ops.running import LOWEST


class Latte(Mixer):
    """Attention through latent variables: tokens choose latents, and latents choose positions.

    Decoding keeps for every latent the values that it has gathered, whatever the length.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      num_latents: of all heads together, by default `width`.
      causal: whether a token sees its past alone; if not, segments cannot be kept apart.
      build: keywords of `Build`.

    Source: Dolga et al., Latte, 2024, arXiv 2402.17512.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_latents: int | None = None,
        causal: bool = True,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads, self.head_dim = num_heads, divide(width, num_heads)
        latents = width if num_latents is None else num_latents
        self.latents = divide(latents, num_heads, "number of latents")
        self.causal, self.packs, self.splits = causal, causal, (latents, 2 * latents)
        self.qkv = build.linear(width, 2 * latents + width)
        self.out = build.output(width, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        shape = batch, self.num_heads, self.latents
        gathered = jnp.zeros((*shape, self.head_dim), jnp.float32)
        return gathered, jnp.zeros(shape, jnp.float32), jnp.full(shape, LOWEST, jnp.float32)

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        if not self.causal and (cache is not None or segment_ids is not None):
            name = "cache needs" if segment_ids is None else "segment_ids need"
            raise ValueError(f"{name} causal=True: latents gather whole rows")
        parts = jnp.split(self.qkv(x), self.splits, -1)
        heads = [split_heads(part, self.num_heads) for part in parts]
        if self.causal:
            y, state = ops.causal_latte_attention(
                *heads, initial_state=cache, segment_ids=segment_ids
            )
        else:
            y = ops.latte_attention(*heads)
        y = self.out(y.reshape(x.shape))
        return y if cache is None else (y, state)


class Linformer(BidirectionalMixer):
    """Multi-head attention to keys and values whose length is projected to a few rows.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      max_len: the longest sequence, by default `context`; shorter ones use the first columns.
      proj_len: rows P.
      sharing: "headwise" (one projection of keys and one of values, for all heads), "kv" (the same
        one for both) or "layer" (as "kv", and it is `projection`, that of another layer).
      projection: `[P, max_len]`, for "layer"; None makes one, which other layers can share.
      context: the training length.
      causal: must be False.
      build: keywords of `Build`.

    Raises:
      ValueError: if an option is unknown, a projection does not fit, or a call is too long.

    Source: Wang et al., 2020, arXiv 2006.04768.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        max_len: int | None = None,
        proj_len: int = 256,
        sharing: str = "headwise",
        projection: nnx.Param | None = None,
        context: int = 64,
        causal: bool = True,
        **build: Any,
    ):
        super().__init__(causal)
        if sharing not in ("headwise", "kv", "layer"):
            raise ValueError(f"sharing must be 'headwise', 'kv' or 'layer', got {sharing!r}")
        shape = proj_len, context if max_len is None else max_len
        if projection is not None and (sharing != "layer" or projection.shape != shape):
            raise ValueError(
                f"projection must be {list(shape)} and needs sharing='layer', got "
                f"{list(projection.shape)} and sharing={sharing!r}"
            )
        divide(width, num_heads)
        build, self.num_heads = Build(**build), num_heads
        normal = nnx.initializers.normal(proj_len**-0.5)
        self.projection = build.param(shape, normal) if projection is None else projection
        own = sharing == "headwise"
        self.value_projection = build.param(shape, normal) if own else nnx.data(None)
        self.qkv = build.linear(width, 3 * width)
        self.out = build.output(width, width)

    def mix(self, x):
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, -1))
        keys = values = self.projection[...]
        if self.value_projection is not None:
            values = self.value_projection[...]
        return self.out(ops.linformer_attention(q, k, v, keys, values).reshape(x.shape))
