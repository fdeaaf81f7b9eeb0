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
        return self.out(self._attend(x, v) + self.local(v))

    def _attend(self, x, v, **options):
        """The heads side by side; `options` are those of `ops.manhattan_attention`."""
        q, k, heads = (split_heads(y, self.num_heads) for y in (self.query(x), self.key(x), v))
        q, k = (self._rotated(y) for y in (q, k))
        decay = ops.manhattan_decay(self.num_heads, initial=self.initial, spread=self.spread)
        y = ops.manhattan_attention(q, k, heads, decay, decomposed=self.decomposed, **options)
        return y.reshape(x.shape)

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


class GatedManhattanAttention(ManhattanAttention):
    """Manhattan attention within windows, with a gate of the input on its output or its values.

        retention:  y = W_o((attention(R q, R k, v) + dw5x5(v)) * sigmoid(x W_g))
        swat:       y = W_o(rms_norm(sigmoid_attention(R q, R k, (x W_v) * silu(x W_g))))

    The scores of "swat" also rise or fall along a line, by 2^-m a place in one half of the heads
    and by -2^-m in the other, m counting the heads of a half from 1.

    Args:
      width, num_heads, initial, spread, rope_base: as in `ManhattanAttention`.
      variant: "retention" or "swat".
      window: places attend within squares of that side.
      shift: where the first whole square begins; usually 0 in one block and `window // 2` in the
        next.
      attention: other keywords of `ManhattanAttention`, and of `Build`.

    Raises:
      ValueError: if the variant is unknown.

    Source: Gated-SwinRMT, 2026, arXiv 2604.06014.
    """

    def __init__(
        self,
        width: int,
        *,
        variant: str = "retention",
        window: int = 7,
        shift: int = 0,
        **attention: Any,
    ):
        if variant not in ("retention", "swat"):
            raise ValueError(f"variant must be 'retention' or 'swat', got {variant!r}")
        super().__init__(width, **attention)
        build = Build.of(attention)
        self.variant, self.window, self.shift = variant, window, shift
        self.gate = build.linear(width, width, True)
        self.norm = nnx.data(None)
        if variant == "swat":
            self.local, self.norm = nnx.data(None), build.rms_norm(width)

    def __call__(self, x):
        v, gate, squares = self.value(x), self.gate(x), {"window": self.window, "shift": self.shift}
        if self.variant == "retention":
            y = self._attend(x, v, **squares) + self.local(v)
            return self.out(y * jax.nn.sigmoid(gate))
        first = (self.num_heads + 1) // 2
        slopes = jnp.exp2(-1.0 - jnp.arange(first))
        slopes = jnp.concatenate([slopes, -slopes[: self.num_heads - first]])
        v = v * jax.nn.silu(gate)
        y = self._attend(x, v, activation="sigmoid", slopes=slopes, **squares)
        return self.out(self.norm(y))


class GatedSwinRMTBlock(nnx.Module):
    """A block of Gated-SwinRMT on images: `x += attention(norm(x)); x += mlp(norm(x))`.

    Args:
      width: C of the images `[B, Y, X, C]`.
      mlp_ratio: the width of the gelu MLP over C.
      attention: keywords of `GatedManhattanAttention`, and of `Build`.

    Source: Gated-SwinRMT, 2026, arXiv 2604.06014.
    """

    def __init__(self, width: int, *, mlp_ratio: float = 4.0, **attention: Any):
        build, hidden = Build.of(attention), round(width * mlp_ratio)
        self.mixer_norm, self.mlp_norm = (build.layer_norm(width) for _ in range(2))
        self.mixer = GatedManhattanAttention(width, **attention)
        self.up, self.down = build.linear(width, hidden, True), build.output(hidden, width, True)

    def __call__(self, x):
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False))
