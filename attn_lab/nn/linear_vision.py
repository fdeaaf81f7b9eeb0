"""Linear attention of images, with local positions and gates."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.bidirectional import BidirectionalMixer, EfficientAttention
from attn_lab.nn.layers import Build, divide, split_heads


class EfficientAttention2d(nnx.Module):
    """`EfficientAttention` of the pixels of an image, added to it.

    Args:
      width: of the pixels.
      key_channels, value_channels, num_heads: as in `EfficientAttention`.
      build: keywords of `Build`.

    Source: Shen et al., 2018, arXiv 1812.01243.
    """

    def __init__(
        self,
        width: int,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        num_heads: int = 4,
        **build: Any,
    ):
        self.attention = EfficientAttention(
            width,
            num_heads=num_heads,
            key_channels=key_channels,
            value_channels=value_channels,
            causal=False,
            **build,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, Y, X, width]` to the same."""
        return x + self.attention(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


class LINAAttention(BidirectionalMixer):
    """Linear attention with learned gates of positions, and a convolution of the image's tokens.

    The tokens are conditions, and after them the image's, row by row. Those of the image are
    rotated by their row and column before the feature map, and a depthwise convolution of them is
    added to the output of the heads.

    Args:
      width: of the input and output.
      num_heads: H, whose dimension is a multiple of 4 if queries and keys rotate.
      num_tokens: of conditions and image together.
      grid: rows and columns of the image.
      conv_size: of the convolution, along both axes.
      rope_theta: base of the rotations; None has none.
      eps: as in `ops.kv_gated_linear_attention`.
      causal: must be False.
      build: keywords of `Build`.

    Raises:
      ValueError: if there are fewer tokens than the grid has, or a call has other than
        `num_tokens`.

    Source: LINA, 2026, arXiv 2601.22630.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_tokens: int = 320,
        grid: tuple[int, int] = (16, 16),
        conv_size: int = 5,
        rope_theta: float | None = 10000.0,
        eps: float = 1e-6,
        causal: bool = True,
        **build: Any,
    ):
        super().__init__(causal)
        self.conditions = num_tokens - grid[0] * grid[1]
        if self.conditions < 0:
            raise ValueError(f"num_tokens={num_tokens} must be at least those of the grid {grid}")
        build, self.num_heads, self.grid = Build(**build), num_heads, tuple(grid)
        self.rope_theta, self.eps = rope_theta, eps
        if divide(width, num_heads) % 4 and rope_theta is not None:
            raise ValueError(f"rotations need heads of a multiple of 4: {width // num_heads}")
        self.qkv = build.linear(width, 3 * width, True)
        self.conv = depthwise(width, conv_size, build)
        gate = functools.partial(build.param, (num_tokens, num_heads), nnx.initializers.ones)
        self.key_gate, self.value_gate = gate(), gate()
        self.out = build.output(width, width, True)

    def mix(self, x):
        tokens = self.key_gate.shape[0]
        if x.shape[1] != tokens:
            raise ValueError(f"x must have the {tokens} tokens of the gates, got {x.shape}")
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, -1))
        if self.rope_theta is not None:
            q, k = self._turn(q), self._turn(k)
        gates = self.key_gate[...], self.value_gate[...]
        y = ops.kv_gated_linear_attention(q, k, v, *gates, eps=self.eps).reshape(x.shape)
        image = x[:, self.conditions :]
        local = self.conv(image.reshape(x.shape[0], *self.grid, -1)).reshape(image.shape)
        return self.out(y + jnp.pad(local, ((0, 0), (self.conditions, 0), (0, 0))))

    def _turn(self, x):
        """Half of the channels rotated by the row of a token and half by its column."""
        cells, half = jnp.arange(self.grid[0] * self.grid[1]), x.shape[-1] // 2
        rows, columns = (
            jnp.pad(place, (self.conditions, 0)) for place in jnp.divmod(cells, self.grid[1])
        )
        turn = functools.partial(ops.apply_rotary, theta=self.rope_theta, interleaved=True)
        return jnp.concatenate([turn(x[..., :half], rows), turn(x[..., half:], columns)], -1)


class MALABlock2d(nnx.Module):
    """Magnitude-aware linear attention of an image, with local positions and a plain gate.

    `W((attention(q, k, v) + conv(v)) * o)` with `q, k, v, o = x W`, the convolution depthwise, and
    q and k rotated by row and column.

    Args:
      width: of the pixels.
      num_heads: H, whose dimension is a multiple of 4.
      conv_size: of the convolution, along both axes.
      rope_theta: base of the rotations; None has none.
      build: keywords of `Build`.

    Source: Fan et al., MALA, 2025, arXiv 2507.00698.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        conv_size: int = 5,
        rope_theta: float | None = 10000.0,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads, self.rope_theta = num_heads, rope_theta
        if divide(width, num_heads) % 4 and rope_theta is not None:
            raise ValueError(f"rotations need heads of a multiple of 4: {width // num_heads}")
        self.project = build.linear(width, 4 * width, True)
        self.conv = depthwise(width, conv_size, build)
        self.out = build.output(width, width, True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, Y, X, width]` to the same."""
        *qkv, gate = jnp.split(self.project(x), 4, -1)
        heads = (part.reshape(x.shape[0], -1, self.num_heads, self._dim(x)) for part in qkv)
        angles = {}
        if self.rope_theta is not None:
            frequencies = self.rope_theta ** -jnp.linspace(0, 1, self._dim(x) // 4)
            angle = grid_angles(x.shape[1:3], frequencies)
            angles = {"sin": jnp.sin(angle), "cos": jnp.cos(angle)}
        y = self.attend(*heads, **angles).reshape(x.shape)
        return self.out(self.gated(y + self.conv(qkv[2]), gate))

    def _dim(self, x):
        return x.shape[-1] // self.num_heads

    def attend(self, q, k, v, **angles):
        """Attention of heads `[B, N, H, D]`."""
        return ops.magnitude_aware_linear_attention(q, k, v, **angles)

    def gated(self, y, gate):
        """What is projected, of the attention's output and the gate."""
        return y * gate


class NormAwareAttention2d(MALABlock2d):
    """Norm-aware linear attention of an image, with local positions, a norm and a swish gate.

    `W(norm(attention(q, k, v) + conv(v)) * silu(g))` with `q, k, v, g = x W`.

    Args:
      width, num_heads, conv_size, rope_theta: as in `MALABlock2d`.
      norm_eps: of the layer norm.

    Source: Meng et al., NaLaFormer, 2025, arXiv 2506.21137.
    """

    def __init__(self, width: int, *, norm_eps: float = 1e-5, **arguments: Any):
        super().__init__(width, **arguments)
        self.norm = Build.of(arguments).layer_norm(width, norm_eps)

    def attend(self, q, k, v, **angles):
        return ops.norm_aware_linear_attention(q, k, v, **angles)

    def gated(self, y, gate):
        return self.norm(y) * jax.nn.silu(gate)


class DualGatedLinearAttention(nnx.Module):
    """A block of an image: rotary linear attention of filtered values, gated, and an MLP.

    With `u = norm(x)`, `q, k = u W_qk` and `v = W_up silu(W_down u)`:
    `x += W_o((attention(q, k, v) + conv(v)) * silu(u W_a))`, then `x += mlp(norm(x))`.

    Args:
      width: of the pixels, a multiple of 4.
      num_heads: H, whose dimension is even.
      grid: rows and columns of the image.
      bottleneck: the width between W_down and W_up over `width`.
      mlp_ratio: hidden width of the MLP over `width`; None has no MLP.
      conv_size: of the depthwise convolution, along both axes.
      rope_theta: base of the rotations, whose frequencies fall over the channels of all heads.
      norm_eps: of the layer norms.
      build: keywords of `Build`.

    Raises:
      ValueError: if a dimension does not divide, or an image has another grid.

    Source: HER-Seg, 2025.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        grid: tuple[int, int],
        bottleneck: float = 0.25,
        mlp_ratio: float | None = 4.0,
        conv_size: int = 3,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        build, self.num_heads, self.grid = Build(**build), num_heads, tuple(grid)
        if divide(width, num_heads) % 2 or width % 4:
            raise ValueError(
                f"the width {width} must be a multiple of 4 and of twice num_heads={num_heads}"
            )
        narrow = round(width * bottleneck)
        self.rope_theta = rope_theta
        self.norm = build.layer_norm(width, norm_eps)
        self.gate = build.linear(width, width, True)
        self.query_key = build.linear(width, 2 * width, True)
        self.down, self.up = build.linear(width, narrow, True), build.linear(narrow, width, True)
        self.conv = depthwise(width, conv_size, build)
        self.out = build.output(width, width, True)
        none = nnx.data(None)
        hidden = 0 if mlp_ratio is None else round(width * mlp_ratio)
        self.mlp_norm = build.layer_norm(width, norm_eps) if hidden else none
        self.mlp_up = build.linear(width, hidden, True) if hidden else none
        self.mlp_down = build.output(hidden, width, True) if hidden else none

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, Y, X, width]` to the same."""
        if x.shape[1:3] != self.grid:
            raise ValueError(f"x must have the grid {self.grid}, got {x.shape}")
        width = x.shape[-1]
        u = self.norm(x)
        v = self.up(jax.nn.silu(self.down(u)))
        q, k = jnp.split(self.query_key(u), 2, -1)
        q, k, heads = (
            y.reshape(x.shape[0], -1, self.num_heads, width // self.num_heads) for y in (q, k, v)
        )
        quarter = width // 4
        angle = grid_angles(self.grid, self.rope_theta ** -(jnp.arange(quarter) / quarter))
        angle = split_heads(angle, self.num_heads)
        y = ops.rotary_linear_attention(q, k, heads, jnp.sin(angle), jnp.cos(angle))
        y = (y.reshape(x.shape) + self.conv(v)) * jax.nn.silu(self.gate(u))
        x = x + self.out(y)
        if self.mlp_norm is None:
            return x
        return x + self.mlp_down(jax.nn.gelu(self.mlp_up(self.mlp_norm(x)), approximate=False))


def grid_angles(shape: tuple[int, int], frequencies: jax.Array) -> jax.Array:
    """Angles `[Y * X, 4 F]` of the pixels of a grid, for channels that rotate in pairs.

    The first half of the channels turns with the row and the second with the column, and each
    frequency, `[F]`, is that of two neighbours.
    """
    step = jnp.repeat(frequencies, 2)
    rows, columns = (jnp.arange(n)[:, None] * step for n in shape)
    angles = jnp.broadcast_arrays(rows[:, None], columns[None])
    return jnp.concatenate(angles, -1).reshape(shape[0] * shape[1], -1)


def depthwise(channels: int, size: int, build: Build) -> nnx.Conv:
    """A convolution of every channel of an image by itself, with a bias; zeros beyond the edges."""
    return nnx.Conv(
        channels,
        channels,
        (size, size),
        feature_group_count=channels,
        kernel_init=build.kernel_init,
        dtype=build.dtype,
        param_dtype=build.param_dtype,
        rngs=build.rngs,
    )
