"""Dynamic differential linear attention as a token mixer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.bidirectional import BidirectionalMixer
from attn_lab.nn.layers import Build, divide, split_heads
from attn_lab.nn.linear_vision import depthwise


class DyDiLA(BidirectionalMixer):
    """Linear attention that sharpens queries and keys and subtracts what routed banks predict.

    A router picks for every token one of several banks, which gives the redundant query q'; others
    pick for every head the exponents of q and q', from the vector itself, and the weight of the
    difference, from both. So it is with keys. A choice passes the gradient of a mixture.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      num_projectors: banks for q' and for k'.
      num_kernels: learned exponents to choose from, first 3.
      num_diff: learned weights to choose from, first 0.01.
      conv_size: of a depthwise convolution of the values, which is added, on the grid; None has
        none.
      grid: rows and columns of the tokens, for the convolution.
      eps: as in `ops.norm_preserving_power`.
      causal: must be False.
      build: keywords of `Build`.

    Raises:
      ValueError: if there is a convolution without a grid.

    Source: DyDiLA, 2026, arXiv 2601.13683.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_projectors: int = 3,
        num_kernels: int = 9,
        num_diff: int = 9,
        conv_size: int | None = None,
        grid: tuple[int, int] | None = None,
        eps: float = 1e-6,
        causal: bool = True,
        **build: Any,
    ):
        super().__init__(causal)
        if conv_size is not None and grid is None:
            raise ValueError(f"grid must be given for conv_size={conv_size}")
        divide(width, num_heads)
        build, self.num_heads, self.grid, self.eps = Build(**build), num_heads, grid, eps
        self.qkv = build.linear(width, 3 * width)
        self.query, self.key = (
            DifferentialRoutes(width, num_heads, num_projectors, num_kernels, num_diff, build)
            for _ in range(2)
        )
        none = nnx.data(None)
        self.conv = none if conv_size is None else depthwise(width, conv_size, build)
        self.out = build.output(width, width)

    def mix(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        (q_redundant, *q_gates), (k_redundant, *k_gates) = self.query(x, q), self.key(x, k)
        parts = (split_heads(part, self.num_heads) for part in (q, k, v, q_redundant, k_redundant))
        gates = (gate for pair in zip(q_gates, k_gates) for gate in pair)
        y = ops.dynamic_differential_linear_attention(*parts, *gates, eps=self.eps)
        y = y.reshape(x.shape)
        if self.conv is not None:
            y = y + self.conv(v.reshape(x.shape[0], *self.grid, -1)).reshape(x.shape)
        return self.out(y)


class DifferentialRoutes(nnx.Module):
    """What DyDiLA routes for queries, or for keys: the redundant vector, exponents and weight.

    Args:
      width, num_heads, num_projectors, num_kernels, num_diff: as in `DyDiLA`.
      build: how to make the parameters.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_projectors: int,
        num_kernels: int,
        num_diff: int,
        build: Build,
    ):
        self.num_heads = num_heads
        self.bank = build.linear(width, num_projectors * width)
        self.bank_router = build.linear(width, num_projectors)
        sizes = (width, num_kernels), (width, num_kernels), (2 * width, num_diff)
        self.routers = nnx.List([build.linear(n, num_heads * choices) for n, choices in sizes])
        self.values = nnx.List(
            [
                build.param((choices,), nnx.initializers.constant(first))
                for (_, choices), first in zip(sizes, (3.0, 3.0, 0.01))
            ]
        )

    def __call__(self, x: jax.Array, own: jax.Array) -> tuple[jax.Array, ...]:
        """The redundant vector `[B, T, width]`, two exponents and the weight `[B, T, H]`."""
        logits = self.bank_router(x)
        banks = self.bank(x).reshape(*logits.shape, -1)
        redundant = ops.hard_route(logits, banks)
        seen = own, redundant, jnp.concatenate([own, redundant], -1)
        routed = (
            ops.hard_route(split_heads(router(y).astype(jnp.float32), self.num_heads), values[...])
            for router, values, y in zip(self.routers, self.values, seen)
        )
        return redundant, *routed
