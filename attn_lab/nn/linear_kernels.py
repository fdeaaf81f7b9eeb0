"""Token mixers of linear attention with polynomial, log-normal and rectified weights."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.bidirectional import BidirectionalMixer
from attn_lab.nn.layers import Build, Mixer, divide, fan_in, split_heads
from attn_lab.nn.recurrent import LinearAttention
from attn_lab.nn.transnormer import DiagAttention
from attn_lab.ops.running import LOWEST


class FastmaxAttention(LinearAttention):
    """Linear attention weighted by the Taylor polynomial of exp, which decoding keeps as moments.

    Args:
      width, num_heads, short_conv, qk_norm, output_gate, build: as in `LinearAttention`.
      order: of the polynomial; even ones have positive weights.
      normalize: "standardize" or "none": of a head's queries and keys. "max" would look ahead.

    Source: Gerami et al., FAST, 2024, arXiv 2402.07901.
    """

    def __init__(
        self, width: int, *, order: int = 2, normalize: str = "standardize", **arguments: Any
    ):
        if normalize not in ("standardize", "none"):
            raise ValueError(f"normalize must be 'standardize' or 'none', got {normalize!r}")
        features = functools.partial(_polynomial, order=order, standardize=normalize != "none")
        super().__init__(width, feature_map=features, eps=0.0, **arguments)

    def finish(self, y):
        total = y[..., -1:]
        return y[..., :-1] / jnp.where(total == 0, 1, total)


def _polynomial(x, order, standardize):
    x = x.astype(jnp.result_type(jnp.float32, x))
    return ops.polynomial_feature_map(ops.standardize(x) if standardize else x, order=order)


class LogNormalAttention(Mixer):
    """Linear attention by exponentials that is as concentrated as softmax attention.

    When causal, keys are in units of the largest one so far, and decoding keeps a matrix a head.
    If not, it is `ops.linear_log_normal_attention`.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      alpha, beta: temperatures of queries and keys. By default they are matched to softmax
        attention: when causal for queries and keys of unit variance, which does not look ahead,
        if not for those of the call.
      causal: whether a token sees its past alone; if not, segments cannot be kept apart.
      eps: added to the sum of a row's weights.
      build: keywords of `Build`.

    Source: Nahshan et al., 2023, arXiv 2311.13541.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        alpha: float | None = None,
        beta: float | None = None,
        causal: bool = True,
        eps: float = 1e-8,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads, self.head_dim = num_heads, divide(width, num_heads)
        self.causal, self.packs = causal, causal
        self.temperatures, self.eps = (alpha, beta), eps
        self.qkv = build.linear(width, 3 * width)
        self.out = build.output(width, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        return _no_keys(batch, self.num_heads, self.num_heads, self.head_dim, self.head_dim)

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, -1))
        y, state = _log_normal(self, q, k, v, cache, segment_ids)
        y = self.out(y.reshape(x.shape))
        return y if cache is None else (y, state)


class LogNormalDiagAttention(DiagAttention):
    """The mean of log-normal linear attention and of softmax attention within blocks.

    Decoding keeps a matrix a head and the keys and values of a block, whatever the length.

    Args:
      width, block_size, arguments: as `DiagAttention`.
      alpha, beta, eps: as in `LogNormalAttention`.
      learned: whether both terms have learned weights for each channel, which are first 1/2.

    Source: Nahshan et al., 2023, arXiv 2311.13541.
    """

    drops = False
    weights, scores = Mixer.weights, Mixer.scores

    def __init__(
        self,
        width: int,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        eps: float = 1e-8,
        learned: bool = False,
        **arguments: Any,
    ):
        super().__init__(width, **arguments)
        self.packs = self.causal
        self.temperatures, self.eps = (alpha, beta), eps
        build, half = Build.of(arguments), nnx.initializers.constant(0.5)
        sizes = self.num_heads, self.value_dim
        self.shares = nnx.List([build.param(sizes, half) for _ in range(2 * learned)])

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        heads = self.num_heads, self.num_kv_heads
        state = _no_keys(batch, *heads, self.head_dim, self.value_dim)
        return {"log_normal": state, **super().init_cache(batch, length, dtype)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        q, k, v, mask, new = self._inputs(x, segment_ids, cache)
        near = self._attend(q, k, v, mask, rngs)
        own = q, k[:, -x.shape[1] :], v[:, -x.shape[1] :]
        state = None if cache is None else cache["log_normal"]
        far, state = _log_normal(self, *own, state, segment_ids)
        shares = [share[...].astype(x.dtype) for share in self.shares] or (0.5, 0.5)
        y = self._project(shares[0] * far + shares[1] * near, x)
        return y if cache is None else (y, {"log_normal": state, **new})


def _log_normal(mixer, q, k, v, state, segment_ids):
    """Log-normal linear attention of heads with the options of a mixer, and the state after it."""
    alpha, beta = mixer.temperatures
    if not mixer.causal:
        if state is not None or segment_ids is not None:
            name = "cache needs" if segment_ids is None else "segment_ids need"
            raise ValueError(f"{name} causal=True: the sums are over whole rows")
        y = ops.linear_log_normal_attention(q, k, v, alpha=alpha, beta=beta, eps=mixer.eps)
        return y, None
    unit = ops.log_normal_temperatures(1.0, 1.0)
    return ops.causal_log_normal_attention(
        q,
        k,
        v,
        alpha=unit[0] if alpha is None else alpha,
        beta=unit[1] if beta is None else beta,
        eps=mixer.eps,
        initial_state=state,
        segment_ids=segment_ids,
    )


def _no_keys(batch, heads, key_heads, key_dim, value_dim):
    """The state of causal log-normal attention before any key."""
    sums = jnp.zeros((batch, heads, key_dim, value_dim + 1), jnp.float32)
    return sums, jnp.full((batch, key_heads), LOWEST, jnp.float32)


class SimplifiedLinearAttention(BidirectionalMixer):
    """Linear attention of the tokens of an image by relu, with a convolution of the values.

    Keys get a learned vector for each position, which is first 0.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      grid: rows and columns of the image, by default the square of `context` tokens.
      context: the number of tokens, if there is no grid.
      conv_size: of the convolution, along both axes; all heads share it.
      eps: added to the sum of a row's weights.
      causal: must be False.
      bias: of the projections.
      build: keywords of `Build`.

    Raises:
      ValueError: if `context` is no square and there is no grid, or a call has other tokens.

    Source: Guo et al., SLAB, 2024, arXiv 2405.11582.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        grid: tuple[int, int] | None = None,
        context: int = 64,
        conv_size: int = 5,
        eps: float = 1e-6,
        causal: bool = True,
        bias: bool = True,
        **build: Any,
    ):
        super().__init__(causal)
        side = math.isqrt(context)
        if grid is None and side * side != context:
            raise ValueError(f"grid must be given: context={context} is no square")
        build, self.num_heads, self.eps = Build(**build), num_heads, eps
        self.grid = (side, side) if grid is None else tuple(grid)
        head_dim = divide(width, num_heads)
        self.qkv = build.linear(width, 3 * width, bias)
        zeros = nnx.initializers.zeros
        self.positions = build.param((self.grid[0] * self.grid[1], width), zeros)
        self.conv_kernel = build.param((conv_size, conv_size, head_dim), fan_in)
        self.conv_bias = build.param((head_dim,), zeros)
        self.out = build.output(width, width, bias)

    def mix(self, x):
        if x.shape[1:2] != self.positions.shape[:1]:
            raise ValueError(f"x must have the tokens of the grid {self.grid}, got {x.shape}")
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        k = k + self.positions[...].astype(k.dtype)
        y = ops.simplified_linear_attention(
            *(split_heads(part, self.num_heads) for part in (q, k, v)),
            self.conv_kernel[...],
            self.conv_bias[...],
            height=self.grid[0],
            width=self.grid[1],
            eps=self.eps,
        )
        return self.out(y.reshape(x.shape))
