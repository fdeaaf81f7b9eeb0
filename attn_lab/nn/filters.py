"""Multi-head attention that filters noisy observations of a process."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, append, cache_mask, divide

EPS = 1e-5


class AdaptiveFilterAttention(Mixer):
    """Multi-head attention whose keys and values are observations of a process in time.

    Queries, keys and values have complex channels, which decay and turn on the way from one token
    to another. Every head learns its decay rate `mu = -(1 - sigmoid(p)) 5 / context - 1e-5`, its
    angular frequencies in pairs w, -w, its variances and its temperature.

    Args:
      width: of the input and output.
      num_heads: H, which divides half the width; a head has `width / (2 H)` complex channels.
      robust: as in `ops.adaptive_filter_attention`.
      context: the length over which a process may decay.
      theta: the first frequencies are `theta^(-2 i / D)`, as of rotary positions.
      causal: whether a token sees its past alone.
      build: keywords of `Build`.

    Source: Attention as an Adaptive Filter, 2025, arXiv 2509.04154.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        robust: bool = True,
        context: int = 512,
        theta: float = 10000.0,
        causal: bool = True,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads, self.robust, self.context = num_heads, robust, context
        self.causal = causal
        dim = divide(divide(width, 2), num_heads, "half of the width")
        self.head_dim = dim
        self.query = build.linear(width, width)
        self.key = build.linear(width, width)
        self.value = build.linear(width, width)
        self.out = build.output(width, width)
        pairs = (dim + 1) // 2
        rotary = theta ** (-2 * jnp.arange(pairs) / dim)

        def frequencies(key, shape, dtype):
            return jnp.broadcast_to(rotary, shape).astype(dtype)

        normal, ones = nnx.initializers.normal(1.0), nnx.initializers.ones
        self.frequency = build.param((num_heads, pairs), frequencies)
        self.rate = build.param((num_heads,), normal)
        names = "process_noise", "key_noise", "query_noise"
        self.noise = nnx.Dict({name: build.param((num_heads,), normal) for name in names})
        self.residual_scale = build.param((num_heads,), ones)
        self.temperature = build.param((num_heads,), ones)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        shape = batch, length, self.num_heads, self.head_dim, 2
        kept = {name: jnp.zeros(shape, dtype) for name in ("key", "value")}
        return {"index": jnp.zeros((), jnp.int32), **kept}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and not self.causal:
            raise ValueError("cache needs causal=True: later tokens change earlier outputs")
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        shape = *x.shape[:2], self.num_heads, self.head_dim, 2
        q, k, v = (layer(x).reshape(shape) for layer in (self.query, self.key, self.value))
        past, new = 0, None
        mask = None if segment_ids is None else ops.segment_mask(segment_ids)
        if cache is not None:
            past = cache["index"]
            k, v = append(cache["key"], k, past), append(cache["value"], v, past)
            mask = cache_mask(past, x.shape[1], k.shape[1])
            new = {"index": past + x.shape[1], "key": k, "value": v}
        y = ops.adaptive_filter_attention(
            q,
            k,
            v,
            jnp.arange(k.shape[1], dtype=jnp.float32),
            **self._process(),
            causal=self.causal and cache is None,
            robust=self.robust,
            query_times=(past + jnp.arange(x.shape[1])).astype(jnp.float32),
            mask=mask,
        )
        y = self.out(y.reshape(x.shape))
        return y if cache is None else (y, new)

    def _process(self):
        """The positive and negative numbers that the parameters stand for, in float32."""
        f = self.frequency[...]
        omega = jnp.stack([f, -f], -1).reshape(self.num_heads, -1)[:, : self.head_dim]
        noise = {name: jax.nn.softplus(p[...]) for name, p in self.noise.items()}
        return dict(
            mu=(jax.nn.sigmoid(self.rate[...]) - 1) * 5 / self.context - EPS,
            omega=omega,
            sigma2=noise["process_noise"],
            eta2=noise["key_noise"] + EPS,
            gamma2=noise["query_noise"] + EPS,
            nu=jax.nn.softplus(self.residual_scale[...]) + EPS,
            tau=self.temperature[...],
        )
