"""Token mixers of gated convolutions."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, ShortConv, append


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
        self.width, self.context, self.activation = width, context, activation
        self.project = build.linear(width, width, True)
        none = nnx.data(None)
        self.packs = short = kernel_size != -1
        self.conv = ShortConv(width, kernel_size, bias=True, build=build) if short else none
        self.filter_in = none if short else build.linear(3, filter_width, True)
        self.filter_out = none if short else build.linear(filter_width, width, True)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        if self.conv is not None:
            return {"conv": self.conv.init_state(batch, dtype)}
        seen = jnp.zeros((batch, length, self.width), dtype)
        return {"index": jnp.zeros((), jnp.int32), "seen": seen}

    def state_bytes(self, length: int) -> int:
        return 4 * self.width * (length if self.conv is None else self.conv.kernel.shape[0])

    def filter(self, length: int) -> jax.Array:
        """The long filter, `[C, length]`."""
        t = jnp.arange(length)
        angle = 2e-4 * math.pi * t / self.context
        features = [t / max(self.context - 1, 1), jnp.cos(angle), -jnp.sin(angle)]
        hidden = jax.nn.relu(self.filter_in(jnp.stack(features, -1)))
        return self.filter_out(hidden).T

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        new = None
        if self.conv is not None and cache is not None:
            mixed, state = self.conv(x, state=cache["conv"])
            new = {"conv": state}
        elif self.conv is not None:
            mixed = self.conv(x, segment_ids=segment_ids)
        elif segment_ids is not None:
            raise ValueError("segment_ids need kernel_size > 0: a long filter spans all segments")
        else:
            seen, past = x, 0
            if cache is not None:
                past = cache["index"]
                seen = append(cache["seen"], x, past)
                new = {"index": past + x.shape[1], "seen": seen}
            skip = jnp.ones(self.width, x.dtype)
            mixed = ops.long_conv(seen.astype(x.dtype), self.filter(seen.shape[1]), skip)
            mixed = jax.lax.dynamic_slice_in_dim(mixed, past, x.shape[1], 1)
        gate = self.project(x)
        if self.activation:
            mixed, gate = jax.nn.silu(mixed), jax.nn.silu(gate)
        y = (mixed * gate + x).astype(x.dtype)
        return y if cache is None else (y, new)
