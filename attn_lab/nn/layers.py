"""What token mixers are built from: projections, norms, dropout and short convolutions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import Mask, operand
from attn_lab import ops

fan_in = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class Build:
    """How the parameters of a module are made; every mixer takes these as keywords.

    Attributes:
      rngs: where parameters draw from.
      dtype: of the computation; None is that of the parameters.
      param_dtype: of the parameters.
      kernel_init: initialiser of projections.
      out_init: initialiser of projections back to the residual stream, by default `kernel_init`.
    """

    rngs: nnx.Rngs
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = fan_in
    out_init: Callable[..., jax.Array] | None = None

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> Build:
        """From those of a module's keywords that say how to build it."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: x for name, x in arguments.items() if name in names})

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> nnx.Linear:
        return self._linear(inputs, outputs, bias, self.kernel_init)

    def output(self, inputs: int, outputs: int, bias: bool = False) -> nnx.Linear:
        return self._linear(inputs, outputs, bias, self.out_init or self.kernel_init)

    def _linear(self, inputs, outputs, bias, init):
        return nnx.Linear(
            inputs,
            outputs,
            use_bias=bias,
            kernel_init=init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def rms_norm(self, dim: int, eps: float = 1e-5, weight: bool = True) -> nnx.RMSNorm:
        return nnx.RMSNorm(
            dim,
            epsilon=eps,
            use_scale=weight,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def layer_norm(self, dim: int, eps: float = 1e-5, bias: bool = True) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            dim,
            epsilon=eps,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def param(self, shape: tuple[int, ...], init: Callable[..., jax.Array]) -> nnx.Param:
        return nnx.Param(init(self.rngs.params(), shape, self.param_dtype))


class Mixer(nnx.Module):
    """A token mixer: `mixer(x, segment_ids=, cache=, rngs=)` from `[B, T, width]` to the same.

    With `cache`, from `init_cache`, a call continues a sequence by T tokens and returns
    `(y, cache)`. `segment_ids`, integers `[B, T]`, keep the documents of a packed row apart.
    `rngs` turns dropout on.

    Attributes:
      decodes: whether it has a causal form, and so a cache.
      packs: whether it keeps segments apart; if not, `segment_ids` raise ValueError.
      own: keywords with a meaning of their own, which a model does not fill in.
    """

    decodes = True
    packs = True
    own: tuple[str, ...] = ()

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Any:
        """What decoding `batch` sequences of at most `length` tokens keeps: a pytree of arrays."""
        raise NotImplementedError

    def weights(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """The attention weights `[B, H, T, T]` that a call on `x` uses.

        Raises:
          ValueError: if the mixer has none.
        """
        raise ValueError(f"{type(self).__name__} has no attention weights to capture")

    def scores(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """The scores `[B, H, T, T]` from which those weights come; ValueError as there."""
        raise ValueError(f"{type(self).__name__} has no scores to capture")

    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps for one sequence of that length, at 4 bytes a number."""
        cache = jax.eval_shape(lambda: self.init_cache(1, length))
        return sum(4 * x.size for x in jax.tree.leaves(cache) if x.ndim)


class ShortConv(nnx.Module):
    """A causal depthwise convolution over `[B, T, C]`, which a segment does not look beyond.

    Its parameters are first uniform within `1 / sqrt(size)`.

    Args:
      channels: C.
      size: taps, the present token included.
      bias: whether to add one.
      build: how to make the parameters.
    """

    def __init__(self, channels: int, size: int, *, bias: bool = False, build: Build):
        limit = size**-0.5
        uniform = nnx.initializers.uniform(2 * limit)

        def centred(*args):
            return uniform(*args) - limit

        self.kernel = build.param((size, channels), centred)
        self.bias = build.param((channels,), centred) if bias else nnx.data(None)
        self.dtype = build.dtype

    def init_state(self, batch: int, dtype: Any) -> jax.Array:
        size, channels = self.kernel.shape
        return jnp.zeros((batch, size - 1, channels), dtype)

    def __call__(self, x, *, segment_ids=None, state=None):
        kernel = self.kernel[...].astype(x.dtype)
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        if segment_ids is None:
            return ops.short_conv(x, kernel, bias, state=state)
        taps = zip(reversed(range(kernel.shape[0])), kernel)
        own = (weight * _shifted(x, n) * _reaches(segment_ids, n)[..., None] for n, weight in taps)
        y = sum(own)
        return y if bias is None else y + bias


def _shifted(x, n):
    """`x[:, t - n]` at t, 0 before the start."""
    return jnp.pad(x, ((0, 0), (n, 0), (0, 0)))[:, : x.shape[1]]


def _reaches(segment_ids, n):
    """Whether token t - n is of the segment of t."""
    before = jnp.pad(segment_ids, ((0, 0), (n, 0)), constant_values=-1)[:, : segment_ids.shape[1]]
    return before == segment_ids


def l2_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`x / sqrt(sum x^2 + eps)` over the last axis."""
    wide = x.astype(jnp.result_type(x, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, -1, keepdims=True) + eps)).astype(x.dtype)


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Zeroes entries with probability `rate` and divides the others by `1 - rate`; None: no-op."""
    if rngs is None or not rate:
        return x
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def append(buffer: jax.Array, new: jax.Array, past: jax.Array) -> jax.Array:
    """A cache `[B, length, ...]` of which `past` entries are filled, and then `new` ones.

    Entries beyond its length, which only the running program can see, are NaN and so is all that
    reads them.

    Raises:
      ValueError: if the new entries alone exceed the length.
    """
    length, count = buffer.shape[1], new.shape[1]
    if count > length:
        raise ValueError(f"a cache of length {length} cannot take {count} tokens")
    new = jnp.where(past + count <= length, new, jnp.nan).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, past, 1)


def cache_mask(past: jax.Array, count: int, length: int, back: int = -1, dilation: int = 1) -> Mask:
    """What `count` tokens after `past` ones see of a cache of that length.

    They see themselves and `back` tokens, or all (-1), and of these every `dilation`-th. The engine
    aligns the last query with the last slot; these queries stand before.
    """
    return Mask(_shifted_window(back, dilation), (operand(past + count - length, ""),))


@functools.lru_cache
def _shifted_window(back: int, dilation: int) -> Callable[..., jax.Array]:
    """A causal window of the queries that stand `shift` (negative) before the end of the keys."""

    def allowed(b, h, q_index, k_index, shift):
        distance = q_index + shift - k_index
        near = (distance >= 0) & ((distance <= back) if back >= 0 else True)
        return near & (distance % dilation == 0) if dilation > 1 else near

    return allowed


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, T, heads * D]` to `[B, T, heads, D]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def divide(width: int, num_heads: int, what: str = "width") -> int:
    """The dimension of a head; ValueError if `num_heads` does not divide `width`."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the {what} {width}")
    return width // num_heads
