"""Blocks of image models whose attention decays with Manhattan distance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.layers import Build, divide, dropout, split_heads
from attn_lab.nn.linear_vision import depthwise

INITIALIZERS = {
    "kernel_init": nnx.initializers.variance_scaling(2**-5, "fan_avg", "normal"),
    "out_init": nnx.initializers.glorot_normal(),
}


class ManhattanAttention(nnx.Module):
    """Multi-head attention on a grid that decays with distance, plus a convolution of the values.

    `y = W_o(attention(R q, R k, v) + dw5x5(v))`, R the rotary positions of places counted row by
    row. Scores also fall by `log(1 - 2^(-initial - spread h / H))` for every step of distance.

    Args:
      width: C, of the input and output.
      num_heads: H, with an even number of channels each.
      decomposed: whether to attend along rows and then along columns.
      initial, spread: as in `ops.manhattan_decay`.
      rope_base: of the rotary positions, whose frequencies are `rope_base^(-i / (D / 2 - 1))`.
      build: keywords of `Build`; queries, keys and values are first smaller by `2^-2.5`.

    Source: Fan et al., RMT, 2023, arXiv 2309.11523.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        decomposed: bool = True,
        initial: float = 2.0,
        spread: float = 4.0,
        rope_base: float = 10000.0,
        **build: Any,
    ):
        plain, build = Build(**build), Build(**INITIALIZERS | build)
        self.num_heads, self.head_dim = num_heads, divide(width, num_heads)
        if self.head_dim % 2:
            raise ValueError(f"num_heads={num_heads} must leave an even dimension of {width}")
        self.decomposed, self.initial, self.spread = decomposed, initial, spread
        self.rope_base = rope_base
        self.query = build.linear(width, width, True)
        self.key = build.linear(width, width, True)
        self.value = build.linear(width, width, True)
        self.local = depthwise(width, 5, plain)
        self.out = build.output(width, width, True)

    def __call__(self, x):
        v = self.value(x)
        q, k, heads = (split_heads(y, self.num_heads) for y in (self.query(x), self.key(x), v))
        q, k = (self._rotated(y) for y in (q, k))
        decay = ops.manhattan_decay(self.num_heads, initial=self.initial, spread=self.spread)
        y = ops.manhattan_attention(q, k, heads, decay, decomposed=self.decomposed)
        return self.out(y.reshape(x.shape) + self.local(v))

    def _rotated(self, x):
        batch, rows, columns = x.shape[:3]
        flat = x.reshape(batch, rows * columns, *x.shape[3:])
        frequency = self.rope_base ** -jnp.linspace(0, 1, self.head_dim // 2)
        places = jnp.arange(rows * columns)
        return ops.apply_rotary(flat, places, interleaved=True, inv_freq=frequency).reshape(x.shape)


class RMTBlock(nnx.Module):
    """A block of RMT on images: `x += dw3x3(x); x += attention(norm(x)); x += mlp(norm(x))`.

    The MLP is `W_2(h + dw3x3(h))` with `h = gelu(W_1 x)`.

    Args:
      width: C of the images `[B, Y, X, C]`.
      mlp_ratio: the width of the MLP over C.
      layer_scale: the first value of a factor for every channel of both branches; None has none.
      drop_path: the probability that an example skips a branch.
      attention: keywords of `ManhattanAttention`, and of `Build`.

    Source: Fan et al., RMT, 2023, arXiv 2309.11523.
    """

    def __init__(
        self,
        width: int,
        *,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        **attention: Any,
    ):
        build = Build.of(attention)
        self.drop_path = drop_path
        hidden = round(width * mlp_ratio)
        self.position = depthwise(width, 3, build)
        self.mixer_norm, self.mlp_norm = (build.layer_norm(width, 1e-6) for _ in range(2))
        self.mixer = ManhattanAttention(width, **attention)
        self.up, self.down = build.linear(width, hidden, True), build.output(hidden, width, True)
        self.local = depthwise(hidden, 3, build)
        self.scales = nnx.data(None)
        if layer_scale is not None:
            start = nnx.initializers.constant(layer_scale)
            self.scales = nnx.List([build.param((width,), start) for _ in range(2)])

    def __call__(self, x, *, rngs: nnx.Rngs | None = None):
        x = x + self.position(x)
        for n, branch in enumerate((self._mix, self._mlp)):
            y = branch(x)
            if self.scales is not None:
                y = y * self.scales[n][...].astype(y.dtype)
            x = x + y * dropout(jnp.ones((x.shape[0], 1, 1, 1), y.dtype), self.drop_path, rngs)
        return x

    def _mix(self, x):
        return self.mixer(self.mixer_norm(x))

    def _mlp(self, x):
        hidden = jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False)
        return self.down(hidden + self.local(hidden))
