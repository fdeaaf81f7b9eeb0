"""A token mixer whose state is a network that learns as it reads."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab.nn.layers import Build, Mixer, ShortConv, divide, l2_norm, split_heads
from attn_lab.ops.memory import layered_memory, read_layers, start_memory


class NeuralMemory(Mixer):
    """Networks, one a head, that learn at every token to map its key to its value.

    `y = W_o(norm(M_t(q_t)) silu(x W_g))` with `q, k = l2(silu(conv(x W)))`, `v = silu(conv(x W))`
    and the rates of `neural_memory_mlp` from sigmoids of the input: that of learning is
    `max_lr sigmoid`. The network before the first token is learned.

    Args:
      width: of the input and output.
      num_heads: H.
      depth: matrices of a network, silu between; 1 is a linear memory.
      expansion: hidden units over the dimension of a head.
      chunk_size: tokens whose gradients are taken at the same network; 1 is exact and sequential.
      short_conv: taps of a causal depthwise convolution on q, k and v; None has none.
      max_lr: the largest rate of learning. A linear memory takes 0.5; in deeper ones matrices that
        grow speed each other up, and in training they may diverge from 0.2 on.
      residual: whether a network adds its input; it then diverges sooner.
      norm_eps: of the RMS norm of a head's output.
      build: keywords of `Build`.

    Raises:
      ValueError: if `num_heads` does not divide the width, or a count is not positive.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """

    packs = False
    own = ("depth",)

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        depth: int = 2,
        expansion: int = 4,
        chunk_size: int = 16,
        short_conv: int | None = 4,
        max_lr: float = 0.1,
        residual: bool = False,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        for name, count in (("depth", depth), ("expansion", expansion), ("chunk_size", chunk_size)):
            if count < 1:
                raise ValueError(f"{name} must be positive, got {count}")
        build = Build(**build)
        self.num_heads, self.head_dim = num_heads, divide(width, num_heads)
        self.max_lr, self.residual, self.chunk_size = max_lr, residual, chunk_size
        self.qkv = build.linear(width, 3 * width)
        none = nnx.data(None)
        self.conv = ShortConv(3 * width, short_conv, build=build) if short_conv else none
        self.rates = build.linear(width, 3 * num_heads)
        self.rate_bias = build.param((3, num_heads), _keep_most)
        dims = [self.head_dim, *[expansion * self.head_dim] * (depth - 1), self.head_dim]
        self.start = nnx.List(
            build.param((num_heads, a, b), nnx.initializers.normal(a**-0.5))
            for a, b in itertools.pairwise(dims)
        )
        self.head_norm = build.rms_norm(self.head_dim, norm_eps)
        self.gate = build.linear(width, width)
        self.out = build.output(width, width)

    def _first(self, batch):
        """The state before the first token."""
        return start_memory(tuple(w[...].astype(jnp.float32) for w in self.start), batch)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        cache = {"state": self._first(batch)._replace(index=jnp.zeros((), jnp.int32))}
        if self.conv is not None:
            cache["conv"] = self.conv.init_state(batch, dtype)
        return cache

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if segment_ids is not None:
            raise ValueError("segment_ids need a state that is cleared: this one learns on")
        qkv, new = self.qkv(x), {}
        if self.conv is not None and cache is not None:
            qkv, new["conv"] = self.conv(qkv, state=cache["conv"])
        elif self.conv is not None:
            qkv = self.conv(qkv)
        q, k, v = (split_heads(y, self.num_heads) for y in jnp.split(jax.nn.silu(qkv), 3, -1))
        y, new["state"] = layered_memory(
            l2_norm(q),
            l2_norm(k),
            v,
            *self._rates(x),
            self._first(len(x)) if cache is None else cache["state"],
            residual=self.residual,
            chunk_size=self.chunk_size,
        )
        y = self._finish(y, x)
        return y if cache is None else (y, new)

    def recall(self, x: jax.Array, memory: tuple[jax.Array, ...]) -> jax.Array:
        """What networks answer to tokens `[B, T, width]`, each by itself, learning nothing.

        Args:
          x: `[B, T, width]`.
          memory: the networks, from the cache's `state.memory`.
        """
        q = split_heads(jax.nn.silu(jnp.split(self.qkv(x), 3, -1)[0]), self.num_heads)
        return self._finish(read_layers(memory, l2_norm(q), residual=self.residual), x)

    def _rates(self, x):
        """Of learning, momentum and forgetting, `[B, T, H]` each."""
        logits = self.rates(x).astype(jnp.float32).reshape(*x.shape[:2], 3, self.num_heads)
        lr, momentum, decay = jnp.moveaxis(jax.nn.sigmoid(logits + self.rate_bias[...]), 2, 0)
        return self.max_lr * lr, momentum, decay

    def _finish(self, y, x):
        y = self.head_norm(y).reshape(x.shape) * jax.nn.silu(self.gate(x))
        return self.out(y.astype(x.dtype))


def _keep_most(key, shape, dtype):
    """Biases under which a memory first forgets a fiftieth at every token."""
    return jnp.broadcast_to(jnp.array([[0.0], [0.0], [-4.0]], dtype), shape)
