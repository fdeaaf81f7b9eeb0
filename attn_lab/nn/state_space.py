"""Selective state spaces as token mixers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels import recurrence
from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, ShortConv, divide
from attn_lab.nn.recurrent import inverse_softplus_dt


class Mamba2(Mixer):
    """The layer of Mamba-2: `W_out(norm(ssd(x, dt, a, B, C) * silu(z)))`, the norm by groups.

    `z, x, B, C, dt = u W_in`; x, B and C go through a short convolution and silu, and
    `dt = softplus(dt + bias)`.

    Args:
      width: of the input and output.
      d_state: N, the dimension of B and C.
      d_conv: taps of the convolution.
      expand: the inner width over `width`.
      headdim: P, which divides the inner width.
      ngroups: G, in each of which heads share B and C; it divides the number of heads.
      norm_eps: of the norm.
      build: keywords of `Build`.

    Raises:
      ValueError: if a size does not divide.

    Source: Dao and Gu, 2024, arXiv 2405.21060.
    """

    def __init__(
        self,
        width: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        build = Build(**build)
        inner = round(expand * width)
        if headdim < 1 or inner % headdim:
            raise ValueError(f"headdim={headdim} must divide the inner width {inner}")
        heads = inner // headdim
        divide(heads, ngroups, "number of heads; ngroups:")
        self.shape, self.inner = (heads, headdim), inner
        self.groups, self.d_state, self.norm_eps = ngroups, d_state, norm_eps
        self.splits = inner, 2 * inner + 2 * ngroups * d_state
        self.project = build.linear(width, self.splits[1] + heads)
        self.conv = ShortConv(self.splits[1] - inner, d_conv, bias=True, build=build)
        self.dt_bias = build.param((heads,), inverse_softplus_dt)
        self.log_a = build.param((heads,), _log_uniform)
        self.skip = build.param((heads,), nnx.initializers.ones)
        self.norm_scale = build.param((inner,), nnx.initializers.ones)
        self.out = build.output(inner, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        state = jnp.zeros((batch, self.shape[0], self.d_state, self.shape[1]), jnp.float32)
        return {"state": state, "conv": self.conv.init_state(batch, dtype)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        gate, mixed, dt = jnp.split(self.project(x), self.splits, -1)
        new = {}
        if cache is None:
            mixed = self.conv(mixed, segment_ids=segment_ids)
        else:
            mixed, new["conv"] = self.conv(mixed, state=cache["conv"])
        mixed, keys = jax.nn.silu(mixed), self.groups * self.d_state
        values, b, c = jnp.split(mixed, (self.inner, self.inner + keys), -1)
        values = values.reshape(*x.shape[:2], *self.shape).astype(jnp.float32)
        b, c = (part.reshape(*x.shape[:2], self.groups, self.d_state) for part in (b, c))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...])
        # ops.ssd without its skip, which knows no segments
        y, new["state"] = recurrence.linear_attention(
            c,
            b,
            dt[..., None] * values,
            log_decay=-dt * jnp.exp(self.log_a[...]),
            scale=1.0,
            initial_state=None if cache is None else cache["state"],
            return_state=True,
            segment_ids=segment_ids,
        )
        y = y + self.skip[...][:, None] * values
        y = y.reshape(*x.shape[:2], -1) * jax.nn.silu(gate.astype(jnp.float32))
        grouped = y.reshape(*x.shape[:2], self.groups, -1)
        y = ops.simple_rms_norm(grouped, eps=self.norm_eps).reshape(y.shape) * self.norm_scale[...]
        y = self.out(y.astype(x.dtype))
        return y if cache is None else (y, new)


def _log_uniform(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
