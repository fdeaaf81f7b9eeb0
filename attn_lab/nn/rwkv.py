"""Attention-free token mixing of RWKV."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer
from attn_lab.ops.running import LOWEST


class RWKVTimeMixing(Mixer):
    """The time mixing of RWKV-4: `W_o(sigmoid(r) wkv(k, v))`, each of a mixture of two tokens.

    `k = W_k(m_k x_t + (1 - m_k) x_{t-1})`, and so v and r with mixtures of their own. Mixtures,
    decays and bonuses start as in the RWKV-4 models: decays spread from -5 to 3 over the channels,
    and the deeper the layer, the more of them are slow.

    Args:
      width: C, of the input and output.
      depth: the layer's number, from 0.
      num_layers: of the model.
      build: keywords of `Build`.

    Raises:
      ValueError: if `depth` is not that of a layer.

    Source: Peng et al., RWKV, 2023, arXiv 2305.13048.
    """

    def __init__(self, width: int, *, depth: int = 0, num_layers: int = 1, **build: Any):
        if not 0 <= depth < num_layers:
            raise ValueError(f"depth must be from 0 to num_layers - 1, got {depth} of {num_layers}")
        build = Build(**build)
        deep, early = depth / max(num_layers - 1, 1), 1 - depth / num_layers
        place = jnp.arange(width) / width
        mixtures = {"k": place**early, "v": place**early + 0.3 * deep, "r": place ** (early / 2)}
        spread = jnp.arange(width) / max(width - 1, 1)
        zigzag = 0.5 * ((jnp.arange(width) + 1) % 3 - 1)

        def start(values):
            return build.param((width,), lambda key, shape, dtype: values.astype(dtype))

        self.mix_k, self.mix_v, self.mix_r = (start(mixtures[name]) for name in "kvr")
        self.time_decay = start(-5 + 8 * spread ** (0.7 + 1.3 * deep))
        self.time_first = start(math.log(0.3) + zigzag)
        self.key, self.value, self.receptance = (build.linear(width, width) for _ in range(3))
        self.out = build.output(width, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        zero = jnp.zeros((batch, self.mix_k.shape[0]), jnp.float32)
        return {"last": zero.astype(dtype), "state": (zero, zero, zero + LOWEST)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        last = jnp.zeros_like(x[:, 0]) if cache is None else cache["last"].astype(x.dtype)
        before = jnp.concatenate([last[:, None], x[:, :-1]], 1)
        if segment_ids is not None:
            same = segment_ids[:, 1:] == segment_ids[:, :-1]
            before = jnp.where(jnp.pad(same, ((0, 0), (1, 0)))[..., None], before, 0)

        def mixed(share):
            share = share[...].astype(x.dtype)
            return x * share + before * (1 - share)

        y, state = ops.wkv(
            self.key(mixed(self.mix_k)),
            self.value(mixed(self.mix_v)),
            self.time_decay[...],
            self.time_first[...],
            initial_state=None if cache is None else cache["state"],
            return_state=True,
            segment_ids=segment_ids,
        )
        y = self.out(jax.nn.sigmoid(self.receptance(mixed(self.mix_r))) * y).astype(x.dtype)
        if cache is None:
            return y
        return y, {"last": x[:, -1].astype(cache["last"].dtype), "state": state}
