"""Token mixers of long convolutions between gates: Hyena and H3."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.recurrence import diagonal_recurrence
from attn_lab import ops
from attn_lab.nn.convolution import LongConv, LongFilter
from attn_lab.nn.layers import Build, Mixer, ShortConv, divide
from attn_lab.ops.convolution import outer_pairs, read_pairs


class Hyena(Mixer):
    """A gated convolution with a filter as long as the sequence: `W_o(x2 longconv(x1 v))`.

    `[x1, x2, v] = shortconv(x W)`, and the filter is an MLP of the position with sines, under
    exponential windows.

    Args:
      width: of the input and output.
      filter_order: hidden units of the filter's MLP, which has three hidden layers.
      short_conv: taps of the convolution after the projection.
      emb_dim: features of a position, odd.
      learned_positions: whether the features within the context are learned.
      context: the training length, over which features and windows span their range.
      build: keywords of `Build`.

    Source: Poli et al., Hyena Hierarchy, 2023, arXiv 2302.10866.
    """

    packs = False

    def __init__(
        self,
        width: int,
        *,
        filter_order: int = 64,
        short_conv: int = 3,
        emb_dim: int = 3,
        learned_positions: bool = True,
        context: int = 64,
        **build: Any,
    ):
        build = Build(**build)
        self.project = build.linear(width, 3 * width, True)
        self.short = ShortConv(3 * width, short_conv, bias=True, build=build)
        self.long = LongConv(
            width,
            LongFilter(
                width,
                filter_order,
                depth=3,
                context=context,
                emb_dim=emb_dim,
                periodic=True,
                learned_positions=learned_positions,
                decays=True,
                build=build,
            ),
            build.param((width,), nnx.initializers.normal(1.0)),
        )
        self.out = build.output(width, width, True)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        short = self.short.init_state(batch, dtype)
        return {"short": short, "long": self.long.init_cache(batch, length, dtype)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if segment_ids is not None:
            raise ValueError("segment_ids need short filters: a long one spans all segments")
        if cache is None:
            x1, x2, v = jnp.split(self.short(self.project(x)), 3, -1)
            filtered = ops.hyena(x1, x2, v, self.long.filter(x.shape[1]), self.long.skip[...])
            return self.out(filtered)
        mixed, short = self.short(self.project(x), state=cache["short"])
        x1, x2, v = jnp.split(mixed, 3, -1)
        y, long = self.long(x1 * v, cache["long"])
        return self.out((x2 * y).astype(x.dtype)), {"short": short, "long": long}


class H3(Mixer):
    """Two state spaces with gates between: one shifts keys, one remembers them with values.

    `W_o h3(x W_q, x W_k, x W_v)` with a filter of `d_state` taps on keys and, on the products of
    keys and values, a complex diagonal state space, `k_j = 2 Re sum_n C_n B_n g_n a_n^j`. Training
    convolves; decoding carries the taps' past keys and the states.

    Args:
      width: of the input and output.
      d_state: taps of the first filter and size of the second one's state, whose half is kept as
        complex numbers.
      head_dim: channels of a head; all pairs of them are remembered.
      dt_min, dt_max: range of the first step sizes dt, uniform in their logarithm.
      discretization: "bilinear" (with `z = dt A / 2`, `a = (1 + z) / (1 - z)`, `g = dt / (1 - z)`)
        or "exponential" (`a = e^{dt A}`, `g = dt`).
      build: keywords of `Build`.

    Raises:
      ValueError: if `head_dim` does not divide the width, `d_state` is not even and positive, or
        the discretization is unknown.

    Source: Fu et al., 2022, arXiv 2212.14052.
    """

    packs = False

    def __init__(
        self,
        width: int,
        *,
        d_state: int = 64,
        head_dim: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        discretization: str = "bilinear",
        **build: Any,
    ):
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be even and positive, got {d_state}")
        if discretization not in ("bilinear", "exponential"):
            raise ValueError(
                f"discretization must be 'bilinear' or 'exponential', got {discretization!r}"
            )
        build = Build(**build)
        self.head_dim, self.discretization = head_dim, discretization
        self.heads = heads = divide(width, head_dim)
        self.qkv = build.linear(width, 3 * width, True)
        normal = nnx.initializers.normal(1.0)
        self.shift = build.param((width, d_state), _uniform(-(d_state**-0.5), d_state**-0.5))
        self.shift_skip = build.param((width,), normal)
        self.log_dt = build.param((heads,), _uniform(math.log(dt_min), math.log(dt_max)))
        modes = heads, d_state // 2
        self.log_damping = build.param(modes, nnx.initializers.constant(math.log(0.5)))
        self.frequency = build.param(modes, _harmonics)
        self.write = build.param((*modes, 2), _ones)
        self.read = build.param((*modes, 2), nnx.initializers.normal(math.sqrt(0.5)))
        self.skip = build.param((heads,), normal)
        self.out = build.output(width, width, True)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        width, taps = self.shift.shape
        states = batch, width * self.head_dim, taps // 2
        return {
            "keys": jnp.zeros((batch, taps - 1, width), dtype),
            "states": jnp.zeros(states, jnp.result_type(jnp.complex64, self.read[...])),
        }

    def state_bytes(self, length: int) -> int:
        width, taps = self.shift.shape
        return 4 * width * (taps - 1 + taps * self.head_dim)

    def kernel(self, length: int) -> jax.Array:
        """The second filter, `[H, length]`: what the states answer to an impulse."""
        log_decay, weight = self._modes()
        impulse = jnp.zeros((1, length, self.heads), weight.real.dtype).at[:, 0].set(1)
        return diagonal_recurrence(impulse, log_decay, write=weight)[0].T

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if segment_ids is not None:
            raise ValueError("segment_ids need states that are cleared: these go on")
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        filter, skip = (self.shift[...], self.shift_skip[...]), self.skip[...]
        if cache is None:
            return self.out(ops.h3(q, k, v, *filter, self.kernel(x.shape[1]), skip))
        seen = jnp.concatenate([cache["keys"].astype(k.dtype), k], 1)
        shifted = ops.long_conv(seen, *filter)[:, -x.shape[1] :]
        pairs = outer_pairs(shifted, v, self.heads)
        each = self.head_dim**2
        log_decay, weight = (jnp.repeat(m, each, 0) for m in self._modes())
        part = dict(write=weight, initial_state=cache["states"], return_state=True)
        y, states = diagonal_recurrence(pairs, log_decay, **part)
        y = read_pairs(q, y + jnp.repeat(skip, each) * pairs, self.heads)
        keys = seen[:, x.shape[1] :].astype(cache["keys"].dtype)
        return self.out(y.astype(x.dtype)), {"keys": keys, "states": states}

    def _modes(self):
        """Logarithms of the decays and the weights of the states, `[H, N / 2]`."""
        step = jnp.exp(self.log_dt[...])[:, None]
        rate = step * jax.lax.complex(-jnp.exp(self.log_damping[...]), self.frequency[...])
        weight = 2 * step * _complex(self.write[...]) * _complex(self.read[...])
        if self.discretization == "exponential":
            return rate, weight
        return jnp.log((1 + rate / 2) / (1 - rate / 2)), weight / (1 - rate / 2)


def _complex(x):
    return jax.lax.complex(x[..., 0], x[..., 1])


def _uniform(low, high):
    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, low, high)

    return init


def _harmonics(key, shape, dtype):
    return jnp.broadcast_to(math.pi * jnp.arange(shape[1], dtype=dtype), shape)


def _ones(key, shape, dtype):
    return jnp.broadcast_to(jnp.array([1, 0], dtype), shape)
