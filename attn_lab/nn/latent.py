"""Attention in latents: one for all keys and values, or a narrow one with convolutions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import attention_weights
from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention, identity
from attn_lab.nn.layers import Build, Mixer, append, cache_mask, divide, split_heads


class MultiHeadLatentAttention(Mixer):
    """Multi-head latent attention: keys and values come from one latent a token, which is cached.

    Decoding keeps the latent and one rotary key that the heads share, and computes in the absorbed
    form.

    Args:
      width: of the input and output.
      num_heads: H.
      q_rank, kv_rank: of the latents, by default `width / 2` and `width / 4`.
      nope_dim, rope_dim: channels of a query without and with rotary positions, by default
        `width / num_heads` and half of that.
      value_dim: by default `nope_dim`.
      rope_theta: base of the rotary positions.
      causal: whether a token sees its past alone.
      build: keywords of `Build`.

    Source: DeepSeek-V2, 2024, arXiv 2405.04434.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        q_rank: int | None = None,
        kv_rank: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        value_dim: int | None = None,
        rope_theta: float = 10000.0,
        causal: bool = True,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads, self.rope_theta, self.causal = num_heads, rope_theta, causal
        q_rank = max(width // 2, 1) if q_rank is None else q_rank
        self.kv_rank = max(width // 4, 1) if kv_rank is None else kv_rank
        self.nope_dim = divide(width, num_heads) if nope_dim is None else nope_dim
        self.rope_dim = max(self.nope_dim // 4, 1) * 2 if rope_dim is None else rope_dim
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(f"rope_dim must be even and at least 2, got {rope_dim}")
        self.value_dim = self.nope_dim if value_dim is None else value_dim
        self.query_down = build.linear(width, q_rank)
        self.query_norm = build.rms_norm(q_rank, 1e-6)
        self.query_up = build.linear(q_rank, num_heads * (self.nope_dim + self.rope_dim))
        self.down = build.linear(width, self.kv_rank + self.rope_dim)
        self.norm = build.rms_norm(self.kv_rank, 1e-6)
        self.key_up = build.linear(self.kv_rank, num_heads * self.nope_dim)
        self.value_up = build.linear(self.kv_rank, num_heads * self.value_dim)
        self.out = build.output(num_heads * self.value_dim, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        return {
            "index": jnp.zeros((), jnp.int32),
            "latent": jnp.zeros((batch, length, self.kv_rank), dtype),
            "key": jnp.zeros((batch, length, self.rope_dim), dtype),
        }

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        *parts, mask, new = self._inputs(x, segment_ids, cache)
        heads = ops.latent_attention(*parts, mask=mask, absorb=cache is not None)
        y = self.out(heads.reshape(*x.shape[:2], -1))
        return y if cache is None else (y, new)

    def weights(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        return self._weights(x, segment_ids)

    def scores(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        return self._weights(x, segment_ids, normalizer=identity)

    def _weights(self, x, segment_ids, **normalizer):
        q_nope, q_rope, latent, k_rope, w_uk, _, mask, _ = self._inputs(x, segment_ids, None)
        keys = jnp.einsum("bsc,chd->bshd", latent, w_uk)
        shared = jnp.broadcast_to(k_rope[:, :, None], (*keys.shape[:3], k_rope.shape[-1]))
        q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([keys, shared], -1)
        return attention_weights(q, k, mask=mask, **normalizer)

    def _inputs(self, x, segment_ids, cache):
        """The arguments of `latent_attention`, the mask, and the cache after these tokens."""
        if cache is not None and not self.causal:
            raise ValueError("cache needs causal=True: later tokens change earlier outputs")
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        past, count = 0 if cache is None else cache["index"], x.shape[1]

        def rotate(heads):
            return ops.apply_rotary(heads, past + jnp.arange(count), theta=self.rope_theta)

        q = split_heads(self.query_up(self.query_norm(self.query_down(x))), self.num_heads)
        q_nope, q_rope = q[..., : self.nope_dim], rotate(q[..., self.nope_dim :])
        latent, key = jnp.split(self.down(x), [self.kv_rank], -1)
        latent, key = self.norm(latent), rotate(key[:, :, None])[:, :, 0]
        mask = ops.causal_mask() if self.causal else None
        if segment_ids is not None:
            segments = ops.segment_mask(segment_ids)
            mask = segments if mask is None else mask & segments
        new = None
        if cache is not None:
            latent = append(cache["latent"], latent, past)
            key = append(cache["key"], key, past)
            mask = cache_mask(past, count, key.shape[1])
            new = {"index": past + count, "latent": latent, "key": key}
        ups = (
            split_heads(layer.kernel[...].astype(q.dtype), self.num_heads)
            for layer in (self.key_up, self.value_up)
        )
        return q_nope, q_rope, latent, key, *ups, mask, new


class CompressedConvolutionalAttention(MultiHeadAttention):
    """Attention in a narrow latent, with convolutions of queries and keys and shifted values.

    Args:
      width: of the input and output.
      num_heads: query heads H.
      num_kv_heads: K, which divides H; by default H / 4, at least 1.
      head_dim: by default half of `width / num_heads`, which halves the width.
      query_kernel, group_kernel: taps of the convolution of channels and of that within heads.
      rotary_fraction: the part of the channels that rotate.
      rope_theta: base of rotary positions; None has none.
      window, dropout: as `MultiHeadAttention`.
      build: keywords of `Build`.

    Raises:
      ValueError: if head counts do not divide, or values have an odd number of channels.

    Source: Figliolia et al., Compressed Convolutional Attention, 2025, arXiv 2510.04476.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        query_kernel: int = 2,
        group_kernel: int = 2,
        rotary_fraction: float = 0.5,
        rope_theta: float | None = 10000.0,
        window: int | None = None,
        dropout: float = 0.0,
        **build: Any,
    ):
        num_kv_heads = max(num_heads // 4, 1) if num_kv_heads is None else num_kv_heads
        head_dim = divide(width, 2 * num_heads) if head_dim is None else head_dim
        if num_kv_heads * head_dim % 2:
            raise ValueError(
                f"num_kv_heads * head_dim must be even, got {num_kv_heads} * {head_dim}: half of "
                "the channels of values come from the token before"
            )
        for name, size in ("query_kernel", query_kernel), ("group_kernel", group_kernel):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must be of 0 to 1, got {rotary_fraction}")
        rotary_dim = 2 * int(rotary_fraction * head_dim / 2)
        super().__init__(
            width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta if rotary_dim else None,
            rotary_dim=rotary_dim,
            window=window,
            dropout=dropout,
            **build,
        )
        build, packed = Build(**build), num_heads + num_kv_heads
        normal, zeros = nnx.initializers.normal, nnx.initializers.zeros
        shape = query_kernel, packed, head_dim
        self.conv_depth = build.param(shape, normal(1 / math.sqrt(query_kernel)))
        self.bias_depth = build.param(shape[1:], zeros)
        shape = group_kernel, packed, head_dim, head_dim
        self.conv_group = build.param(shape, normal(1 / math.sqrt(group_kernel * head_dim)))
        self.bias_group = build.param((packed, head_dim), zeros)
        self.temperature = build.param((num_kv_heads,), nnx.initializers.ones)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        before = self.conv_depth.shape[0] + self.conv_group.shape[0] - 2
        packed, width = (batch, before, *self.bias_depth.shape), self.query.in_features
        return {
            "conv": jnp.zeros(packed, dtype),
            "previous": jnp.zeros((batch, width), dtype),
            **super().init_cache(batch, length, dtype),
        }

    def _heads(self, x, segment_ids, cache):
        q = split_heads(self.query(x), self.num_heads)
        k = split_heads(self.key(x), self.num_kv_heads)
        convolutions = (
            self.conv_depth,
            self.bias_depth,
            self.conv_group,
            self.bias_group,
            self.temperature,
        )
        state = previous = None
        if cache is not None:
            state, previous = cache["conv"], cache["previous"]
        q, k, *conv = ops.compressed_convolutional_qk(
            q, k, *(part[...] for part in convolutions), state=state, segment_ids=segment_ids
        )
        weights = jnp.split(self.value.kernel[...].astype(q.dtype), 2, 1)
        v = ops.shifted_values(
            x.astype(q.dtype),
            *weights,
            num_heads=self.num_kv_heads,
            previous=previous,
            segment_ids=segment_ids,
        )
        if cache is None:
            return q, k, v, {}
        kept = {"conv": conv[0].astype(state.dtype), "previous": x[:, -1].astype(previous.dtype)}
        return q, k, v, kept
