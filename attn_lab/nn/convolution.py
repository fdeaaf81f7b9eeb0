"""Token mixers of gated convolutions, and filters as long as the sequence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, ShortConv, append


class LongFilter(nnx.Module):
    """A filter of any length for every channel: an MLP of the position.

    Positions enter as `t / (context - 1)` and as cosines and sines of a few frequencies.

    Args:
      channels: C.
      hidden: units of the hidden layers.
      depth: hidden layers.
      context: the training length, over which the features span their range.
      emb_dim: features, odd: the position and a cosine and a sine for each frequency.
      periodic: whether layers are followed by sines, of frequencies that are learned, or by relu.
        The last layer then has no bias.
      learned_positions: whether features within the context are moved by learned amounts.
      decays: whether the filter is multiplied by fixed exponentials, which fall to 0.01 within 0.3
        to 1.5 contexts.
      build: how to make the parameters.

    Raises:
      ValueError: if `emb_dim` is not odd and at least 3, or `depth` is not positive.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        depth: int,
        context: int,
        emb_dim: int = 3,
        periodic: bool = False,
        learned_positions: bool = False,
        decays: bool = False,
        build: Build,
    ):
        if emb_dim < 3 or emb_dim % 2 == 0 or depth < 1:
            raise ValueError(f"emb_dim must be odd and > 2, depth positive: {emb_dim}, {depth}")
        self.channels, self.context, self.emb_dim, self.decays = channels, context, emb_dim, decays
        build = dataclasses.replace(build, dtype=None)  # as exact as its parameters
        layers = range(depth)
        self.hidden = nnx.List(build.linear(hidden if n else emb_dim, hidden, True) for n in layers)
        self.out = build.linear(hidden, channels, not periodic)
        none, ones = nnx.data(None), nnx.initializers.ones
        self.frequency = build.param((hidden,), ones) if periodic else none
        moves = (context, emb_dim), nnx.initializers.zeros
        self.moves = build.param(*moves) if learned_positions else none

    def __call__(self, length: int) -> jax.Array:
        """The filter, `[C, length]`."""
        bands, last = self.emb_dim // 2, max(self.context - 1, 1)
        t = jnp.arange(length)[:, None]
        angle = 2 * math.pi * jnp.linspace(1e-4, bands - 1, bands) * t / self.context
        x = jnp.concatenate([t / last, jnp.cos(angle), -jnp.sin(angle)], -1)
        if self.moves is not None:
            moves = self.moves[...][:length]
            x += jnp.pad(moves, ((0, length - len(moves)), (0, 0)))
        for layer in self.hidden:
            x = layer(x)
            x = jax.nn.relu(x) if self.frequency is None else jnp.sin(self.frequency[...] * x)
        x = self.out(x)
        if self.decays:
            rates = -math.log(0.01) * jnp.linspace(1 / 1.5, 1 / 0.3, self.channels)
            x *= jnp.exp(-rates * t / last)
        return x.T


class LongConv(nnx.Module):
    """A convolution with a long filter, which decodes by keeping all that it has seen.

    Args:
      channels: C.
      filter: from a length to the filter `[C, length]`.
      skip: `[C]`, times which x is added, or None for once.
    """

    def __init__(
        self,
        channels: int,
        filter: Callable[[int], jax.Array],
        skip: nnx.Param | None = None,
    ):
        self.channels, self.filter = channels, filter
        self.skip = nnx.data(None) if skip is None else skip

    def init_cache(self, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
        seen = jnp.zeros((batch, length, self.channels), dtype)
        return {"index": jnp.zeros((), jnp.int32), "seen": seen}

    def __call__(self, x, cache=None):
        skip = jnp.ones(self.channels, x.dtype) if self.skip is None else self.skip[...]
        if cache is None:
            return ops.long_conv(x, self.filter(x.shape[1]), skip)
        past = cache["index"]
        seen = append(cache["seen"], x, past)
        y = ops.long_conv(seen.astype(x.dtype), self.filter(seen.shape[1]), skip)
        y = jax.lax.dynamic_slice_in_dim(y, past, x.shape[1], 1)
        return y, {"index": past + x.shape[1], "seen": seen}


class BaseConv(Mixer):
    """A convolution times a projection, with its own residual: `(conv(x) + b) * (x W + c) + x`.

    A long filter has no bias b.

    Args:
      width: C, of the input and output.
      kernel_size: taps of the causal depthwise convolution, or -1 for a filter as long as the
        sequence, an MLP of position, through which x passes once more unfiltered.
      activation: "silu" on both factors, or None.
      filter_width: hidden units of the long filter's MLP.
      context: the training length, at which the features of the long filter span their range.
      build: keywords of `Build`.

    Source: Arora et al., Zoology, 2023, arXiv 2312.04927.
    """

    def __init__(
        self,
        width: int,
        *,
        kernel_size: int = 3,
        activation: str | None = None,
        filter_width: int = 16,
        context: int = 64,
        **build: Any,
    ):
        if kernel_size != -1 and kernel_size < 1:
            raise ValueError(
                f"kernel_size must be positive, or -1 for a long filter: {kernel_size}"
            )
        if activation not in (None, "silu"):
            raise ValueError(f"activation must be None or 'silu', got {activation!r}")
        build = Build(**build)
        self.activation, self.packs = activation, kernel_size != -1
        self.project = build.linear(width, width, True)
        if self.packs:
            self.conv = ShortConv(width, kernel_size, bias=True, build=build)
        else:
            long = LongFilter(width, filter_width, depth=1, context=context, build=build)
            self.conv = LongConv(width, long)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        if self.packs:
            return {"conv": self.conv.init_state(batch, dtype)}
        return self.conv.init_cache(batch, length, dtype)

    def state_bytes(self, length: int) -> int:
        if not self.packs:
            return super().state_bytes(length)
        return 4 * self.conv.kernel.size

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        if segment_ids is not None and not self.packs:
            raise ValueError("segment_ids need kernel_size > 0: a long filter spans all segments")
        new = None
        if cache is None:
            mixed = self.conv(x, segment_ids=segment_ids) if self.packs else self.conv(x)
        elif self.packs:
            mixed, state = self.conv(x, state=cache["conv"])
            new = {"conv": state}
        else:
            mixed, new = self.conv(x, cache)
        gate = self.project(x)
        if self.activation:
            mixed, gate = jax.nn.silu(mixed), jax.nn.silu(gate)
        y = (mixed * gate + x).astype(x.dtype)
        return y if cache is None else (y, new)
