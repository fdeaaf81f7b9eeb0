"""A token mixer that reads a learned memory beside a short convolution, and its block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab.nn.layers import Build, Mixer, ShortConv
from attn_lab.ops.associative import join_memory


class GatedAssociativeMemory(Mixer):
    """A short convolution and a look-up in learned memories, each under a gate, added.

    Args:
      width: C, of the input, which should be normalised, and of the output.
      num_slots: memories, each key and value.
      kernel_size: taps of the convolution.
      build: keywords of `Build`.

    Source: Acharya, 2025, arXiv 2509.00605.
    """

    def __init__(self, width: int, *, num_slots: int = 512, kernel_size: int = 3, **build: Any):
        build = Build(**build)
        self.conv = ShortConv(width, kernel_size, bias=True, build=build)
        self.memory = build.param((num_slots, width), nnx.initializers.xavier_uniform())
        self.gates = build.linear(width, 2 * width, True)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        return {"conv": self.conv.init_state(batch, dtype)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        if cache is None:
            return self._join(self.conv(x, segment_ids=segment_ids), x)
        local, state = self.conv(x, state=cache["conv"])
        return self._join(local, x), {"conv": state}

    def _join(self, local, x):
        gates = (p[...].astype(x.dtype) for p in (self.gates.kernel, self.gates.bias))
        return join_memory(local, x, self.memory[...], *gates)


class GAMBlock(nnx.Module):
    """A residual block: `GatedAssociativeMemory`, then an MLP with gelu, each after a layer norm.

    Args:
      width: C.
      num_slots, kernel_size: of the memory.
      mlp_ratio: hidden units of the MLP over C.
      norm_eps: of the layer norms.
      build: keywords of `Build`.

    Source: Acharya, 2025, arXiv 2509.00605.
    """

    def __init__(
        self,
        width: int,
        *,
        num_slots: int = 512,
        kernel_size: int = 3,
        mlp_ratio: float = 4,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        sizes = dict(num_slots=num_slots, kernel_size=kernel_size)
        self.mixer = GatedAssociativeMemory(width, **sizes, **build)
        build = Build(**build)
        self.mixer_norm = build.layer_norm(width, norm_eps)
        self.mlp_norm = build.layer_norm(width, norm_eps)
        self.up = build.linear(width, int(mlp_ratio * width), True)
        self.down = build.output(int(mlp_ratio * width), width, True)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        x = x + self.mixer(self.mixer_norm(x), segment_ids=segment_ids)
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x)), approximate=False))
