"""Gated attention units: one head of squared rectified weights inside a gated linear unit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import attention
from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, ShortConv, append, cache_mask, dropout
from attn_lab.ops.gated_units import relu_squared

ROTARY = 32  # channels that rotate, at most


class GatedAttentionUnit(Mixer):
    """A gated linear unit whose values are mixed by one head of attention: `W_o(u attention(v))`.

    `u, v = silu(x W)`, and queries and keys are scaled and shifted copies of one `silu(x W_z)`,
    with rotary positions. Attention is `ops.mixed_chunk_attention`, or `relu(q k / n)^2` over all
    keys, with n the training length, or that of the call if not causal.

    Args:
      width: of the input and output.
      qk_dim: of queries and keys.
      expansion: channels of u and v over the width.
      group_size: of the chunks of mixed attention; None attends to all keys.
      context: the training length n of the latter.
      causal: whether a token sees its past alone.
      scale_std: of the normal distribution from which the scales are first drawn.
      rope_theta: base of the rotary positions.
      build: keywords of `Build`.

    Raises:
      ValueError: if a size is not positive.

    Source: Hua et al., 2022, arXiv 2202.10447.
    """

    def __init__(
        self,
        width: int,
        *,
        qk_dim: int = 128,
        expansion: float = 2,
        group_size: int | None = 256,
        context: int = 64,
        causal: bool = True,
        scale_std: float = 0.02,
        rope_theta: float = 10000.0,
        **build: Any,
    ):
        for name, size in ("qk_dim", qk_dim), ("group_size", group_size or 1), ("context", context):
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        build = Build(**build)
        self.group_size, self.context, self.causal = group_size, context, causal
        self.packs = group_size is None
        hidden = int(expansion * width)
        self.uv = build.linear(width, 2 * hidden, True)
        self.z = build.linear(width, qk_dim, True)
        self.copies = SharedCopies(qk_dim, 2 if self.packs else 4, scale_std, rope_theta, build)
        self.out = build.output(hidden, width, True)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        size = length if self.packs else self.group_size
        dim, hidden = self.z.out_features, self.out.in_features
        shapes = {"key": (size, dim), "value": (size, hidden)}
        cache = {name: jnp.zeros((batch, *shape), dtype) for name, shape in shapes.items()}
        if not self.packs:
            for name in "chunk", "state":  # what this chunk has written, and those before it
                wide = jnp.result_type(dtype, jnp.float32)
                cache[name] = jnp.zeros((batch, dim, hidden), wide)
        return cache | {"index": jnp.zeros((), jnp.int32)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        if segment_ids is not None and not self.packs:
            raise ValueError("segment_ids need group_size=None: chunks have fixed places")
        if cache is not None and not self.causal:
            raise ValueError("cache needs causal=True")
        u, v = jnp.split(jax.nn.silu(self.uv(x)), 2, -1)
        past = 0 if cache is None else cache["index"]
        copies = self.copies(jax.nn.silu(self.z(x)), past + jnp.arange(x.shape[1]))
        if self.packs:
            y, cache = self._all(*copies, v, segment_ids, cache)
        elif cache is None:
            y = self._mixed(copies, v)
        else:
            y, cache = self._steps(copies, v, cache)
        y = self.out((u * y).astype(x.dtype))
        return y if cache is None else (y, cache | {"index": past + x.shape[1]})

    def _mixed(self, copies, v):
        q, q_lin, k, k_lin = copies
        part = dict(group_size=self.group_size, causal=self.causal)
        return ops.mixed_chunk_attention(q, k, q_lin, k_lin, v, **part)

    def _all(self, q, k, v, segment_ids, cache):
        mask = ops.as_mask(None, self.causal)
        if segment_ids is not None:
            same = ops.segment_mask(segment_ids)
            mask = same if mask is None else mask & same
        if cache is not None:
            past, count = cache["index"], q.shape[1]
            k = append(cache["key"], k, past)
            v = append(cache["value"], v, past)
            cache = {"key": k, "value": v}
            mask = cache_mask(past, count, k.shape[1])
        return self._attend(q, k, v, mask), cache

    def _attend(self, q, k, v, mask):
        scale = 1 / (self.context if self.causal else q.shape[1])
        q, k, v = (x[:, :, None] for x in (q, k, v))
        y = attention(q, k, v, mask=mask, normalizer=relu_squared, scale=scale)
        return y[:, :, 0].astype(v.dtype)

    def _steps(self, copies, v, cache):
        """One token after another: the present chunk is kept, those before are a state."""
        steps = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1)[:, :, None], (*copies, v))
        index = cache["index"] + jnp.arange(v.shape[1])
        carried = {name: x for name, x in cache.items() if name != "index"}
        cache, y = jax.lax.scan(self._step, carried, (index, *steps))
        return jnp.swapaxes(y[:, :, 0], 0, 1), cache

    def _step(self, cache, step):
        index, q, q_lin, k, k_lin, v = step
        place = index % self.group_size
        fresh = place == 0
        state = cache["state"] + jnp.where(fresh, cache["chunk"] / self.group_size, 0)
        written = jnp.swapaxes(k_lin, 1, 2).astype(state.dtype) * v.astype(state.dtype)
        chunk = jnp.where(fresh, 0, cache["chunk"]) + written
        kept = {"state": state, "chunk": chunk}
        for name, new in ("key", k), ("value", v):
            old = jnp.where(fresh, 0, cache[name])
            kept[name] = jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), place, 1)
        weights = jnp.einsum("btd,bgd->btg", q, kept["key"].astype(q.dtype)) / self.group_size
        y = jax.nn.relu(weights) ** 2 @ kept["value"] + q_lin @ state
        return kept, y.astype(v.dtype)


class MossFormerBlock(nnx.Module):
    """A residual block of two halves whose attention gates each other, with convolutions.

    Half of the channels are shifted by a token. `[v, u]` and z are layers of norm, map, silu and a
    residual depthwise convolution; v and u are mixed by `ops.mixed_chunk_attention` with four
    copies of z, joined by `ops.attentive_gate` and mapped back by another such layer.

    Args:
      width: of the input and output.
      group_size: of the chunks.
      qk_dim: of z.
      conv_size: taps of the convolutions, odd; they reach as far ahead as back unless causal.
      expansion: channels of u and v over the width.
      causal: whether a token sees its past alone.
      dropout: rate after each layer.
      scale_std, rope_theta: as in `GatedAttentionUnit`.
      build: keywords of `Build`.

    Raises:
      ValueError: if `conv_size` is even or the width odd.

    Source: Zhao and Ma, MossFormer, 2023, arXiv 2302.11824.
    """

    def __init__(
        self,
        width: int,
        *,
        group_size: int = 256,
        qk_dim: int = 128,
        conv_size: int = 17,
        expansion: float = 1,
        causal: bool = False,
        dropout: float = 0.1,
        scale_std: float = 0.02,
        rope_theta: float = 10000.0,
        **build: Any,
    ):
        if conv_size % 2 == 0 or width % 2:
            raise ValueError(f"conv_size must be odd, the width even: {conv_size}, {width}")
        build = Build(**build)
        self.group_size, self.causal = group_size, causal
        hidden = int(expansion * width)
        layer = dict(conv_size=conv_size, causal=causal, dropout=dropout, build=build)
        self.vu = ConvolvedLayer(width, 2 * hidden, **layer)
        self.z = ConvolvedLayer(width, qk_dim, **layer)
        self.copies = SharedCopies(qk_dim, 4, scale_std, rope_theta, build)
        self.out = ConvolvedLayer(hidden, width, **layer)

    def __call__(
        self, x: jax.Array, *, mask: jax.Array | None = None, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """Of `[B, T, width]`; `mask`, bool `[B, T]`, says which tokens may be attended to."""
        ahead, same = jnp.split(x, 2, -1)
        late = jnp.pad(ahead, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        h = jnp.concatenate([late, same], -1)
        both = self.vu(h, rngs)
        q, q_lin, k, k_lin = self.copies(self.z(h, rngs), jnp.arange(x.shape[1]))
        part = dict(group_size=self.group_size, causal=self.causal, mask=mask)
        # both halves share their weights, so they are mixed as one
        mixed = ops.mixed_chunk_attention(q, k, q_lin, k_lin, both, **part)
        (v, u), (att_v, att_u) = (jnp.split(y, 2, -1) for y in (both, mixed))
        return x + self.out(ops.attentive_gate(att_u, att_v, u, v), rngs)


class ConvolvedLayer(nnx.Module):
    """`y + conv(y)` with `y = silu(norm(x) W + b)` and a depthwise convolution, then dropout."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        conv_size: int,
        causal: bool,
        dropout: float,
        build: Build,
    ):
        self.ahead, self.dropout = 0 if causal else conv_size // 2, dropout
        self.norm = build.rms_norm(inputs)
        self.linear = build.linear(inputs, outputs, True)
        self.conv = ShortConv(outputs, conv_size, build=build)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        y = jax.nn.silu(self.linear(self.norm(x)))
        padded = jnp.pad(y, ((0, 0), (0, self.ahead), (0, 0)))
        return dropout(y + self.conv(padded)[:, self.ahead :], self.dropout, rngs)


class SharedCopies(nnx.Module):
    """Copies of `[B, T, D]`, each scaled and shifted by channel, with rotary positions."""

    def __init__(self, dim: int, count: int, std: float, theta: float, build: Build):
        self.scales = build.param((count, dim), nnx.initializers.normal(std))
        self.shifts = build.param((count, dim), nnx.initializers.zeros)
        self.theta, self.rotary = theta, min(ROTARY, dim // 2 * 2)

    def __call__(self, z: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        copies = z[:, :, None] * self.scales[...] + self.shifts[...]
        if self.rotary:
            part = dict(theta=self.theta, rotary_dim=self.rotary)
            copies = ops.apply_rotary(copies, positions, **part)
        return tuple(jnp.moveaxis(copies.astype(z.dtype), 2, 0))
