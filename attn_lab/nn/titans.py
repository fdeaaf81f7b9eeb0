"""Attention over few tokens beside a neural memory of all: the layers of Titans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import Mask
from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import Build, Mixer
from attn_lab.nn.memory import NeuralMemory
from attn_lab.ops.predicates import Below


class PrefixAttention(MultiHeadAttention):
    """Multi-head attention in which all tokens see the first ones, whatever their window.

    Args:
      width, arguments: as `MultiHeadAttention`.
      prefix: how many tokens stand first.
    """

    def __init__(self, width: int, *, prefix: int, **arguments: Any):
        super().__init__(width, **arguments)
        self.prefix = prefix

    def state_bytes(self, length: int) -> int:
        return Mixer.state_bytes(self, min(length, self.window + self.prefix))

    def _inputs(self, x, segment_ids, cache):
        q, k, v, mask, cache = super()._inputs(x, segment_ids, cache)
        return q, k, v, mask | Mask(Below(self.prefix)), cache


class MemoryMixer(Mixer):
    """A neural memory, attention and learned tokens that stand before every sequence: the base.

    Args:
      width: of the input and output.
      num_heads: of the attention.
      num_persistent: learned tokens.
      memory: the memory's class, `NeuralMemory` or one derived from it.
      memory_args: its arguments.
      norm_eps: of the RMS norms of the two factors, if they are multiplied.
      build: keywords of `Build`.

    Attributes:
      multiplies: whether the output is a product of attention and memory.
    """

    packs = False
    multiplies = True

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_persistent: int = 4,
        memory: type[NeuralMemory] = NeuralMemory,
        memory_args: Mapping[str, Any] | None = None,
        norm_eps: float = 1e-5,
        **arguments: Any,
    ):
        if num_persistent < 0:
            raise ValueError(f"num_persistent must not be negative, got {num_persistent}")
        built = Build.of(arguments)
        build = vars(built)
        arguments = {name: x for name, x in arguments.items() if name not in build}
        self.persistent = built.param((num_persistent, width), nnx.initializers.normal(0.02))
        self.attention = self._attention(width, num_heads=num_heads, **arguments, **build)
        self.memory = memory(width, **dict(memory_args or {}), **build)
        if self.multiplies:
            self.attention_norm = built.rms_norm(width, norm_eps)
            self.memory_norm = built.rms_norm(width, norm_eps)

    def _attention(self, width, **arguments):
        return MultiHeadAttention(width, **arguments)

    def _prefix(self, batch, dtype):
        tokens = self.persistent[...].astype(dtype)
        return jnp.broadcast_to(tokens, (batch, *tokens.shape))

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if segment_ids is not None:
            raise ValueError("segment_ids need a memory that is cleared: this one learns on")
        return self._full(x) if cache is None else self._continue(x, cache)


class MemoryAsLayer(MemoryMixer):
    """Windowed attention over what a neural memory makes of the tokens (MAL).

    `attention(memory([persistent, x]))`, in which the persistent tokens stay visible.

    Args:
      width, num_heads, num_persistent, memory, memory_args: as in `MemoryMixer`.
      window: how many tokens one sees back, its own included.
      build: keywords of `Build`.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """

    multiplies = False

    def __init__(self, width: int, *, window: int = 64, **arguments: Any):
        super().__init__(width, window=window, **arguments)

    def _attention(self, width, **arguments):
        return PrefixAttention(width, prefix=self.persistent.shape[0], **arguments)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        prefix = self._prefix(batch, dtype)
        count = prefix.shape[1]
        cache = {
            "memory": self.memory.init_cache(batch, count + length, dtype),
            "attention": self.attention.init_cache(batch, count + length, dtype),
        }
        return self._continue(prefix, cache)[1] if count else cache

    def state_bytes(self, length: int) -> int:
        length += self.persistent.shape[0]
        return self.memory.state_bytes(length) + self.attention.state_bytes(length)

    def _full(self, x):
        prefix = self._prefix(len(x), x.dtype)
        return self._both(jnp.concatenate([prefix, x], 1))[:, prefix.shape[1] :]

    def _both(self, x):
        return self.attention(self.memory(x))

    def _continue(self, x, cache):
        m, memory = self.memory(x, cache=cache["memory"])
        y, attention = self.attention(m, cache=cache["attention"])
        return y, {"memory": memory, "attention": attention}


class MemoryAsGate(MemoryAsLayer):
    """Windowed attention times a neural memory of the same tokens (MAG).

    `silu(norm(attention(x'))) silu(norm(memory(x')))` with `x' = [persistent, x]`, of which the
    first positions are dropped.

    Args:
      width, num_heads, num_persistent, window, memory, memory_args: as in `MemoryAsLayer`.
      norm_eps: of the RMS norms of both branches.
      build: keywords of `Build`.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """

    multiplies = True

    def _both(self, x):
        return self._join(self.attention(x), self.memory(x))

    def _continue(self, x, cache):
        y, attention = self.attention(x, cache=cache["attention"])
        m, memory = self.memory(x, cache=cache["memory"])
        return self._join(y, m), {"memory": memory, "attention": attention}

    def _join(self, y, m):
        return jax.nn.silu(self.attention_norm(y)) * jax.nn.silu(self.memory_norm(m))


class MemoryAsContext(MemoryMixer):
    """Attention within a segment, over it and what a neural memory of those before says (MAC).

    With M the memory on entry of the segment S, which has seen the segments before:

        h = M(S),  y = attention(S over [persistent, h, S]),  out = norm(y) norm(memory(y))

    A token sees the persistent ones and, of h and S, the positions up to its own. The memory goes
    on to learn from y token by token, so its answer at a token knows none later.

    Args:
      width, num_heads, num_persistent, memory, memory_args: as in `MemoryMixer`.
      segment_len: tokens of a segment.
      norm_eps: of the RMS norms of both factors.
      build: keywords of `Build`.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """

    def __init__(self, width: int, *, segment_len: int = 64, **arguments: Any):
        if segment_len < 1:
            raise ValueError(f"segment_len must be positive, got {segment_len}")
        super().__init__(width, **arguments)
        self.segment_len = segment_len

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        memory = self.memory.init_cache(batch, length, dtype)
        _, k, v, _ = self.attention._heads(self._prefix(batch, dtype), None, None)
        room = (0, 0), (0, 2 * self.segment_len), (0, 0), (0, 0)
        return {
            "index": jnp.zeros((), jnp.int32),
            "memory": memory,
            "entry": memory["state"].memory,
            "key": jnp.pad(k.astype(dtype), room),
            "value": jnp.pad(v.astype(dtype), room),
        }

    def _full(self, x):
        (batch, length, width), size = x.shape, self.segment_len
        count = -(-length // size)
        parts = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0)))
        parts = jnp.moveaxis(parts.reshape(batch, count, size, width), 1, 0)
        prefix = self._prefix(batch, x.dtype)
        ranks = self._ranks()
        mask = ops.dense_mask(ranks <= jnp.arange(size)[:, None])
        aligned = size % self.memory.chunk_size == 0

        def segment(memory, x):
            if aligned:
                memory = memory | {"state": memory["state"]._replace(index=0)}
            h = self.memory.recall(x, memory["state"].memory)
            q, k, v, _ = self.attention._heads(jnp.concatenate([prefix, h, x], 1), None, None)
            y = self._attend(q[:, -size:], k, v, mask, x)
            m, memory = self.memory(y, cache=memory)
            return memory, self._join(y, m)

        _, y = jax.lax.scan(segment, self.memory.init_cache(batch, length, x.dtype), parts)
        return jnp.moveaxis(y, 0, 1).reshape(batch, -1, width)[:, :length]

    def _continue(self, x, cache):
        cache, y = jax.lax.scan(self._step, cache, jnp.swapaxes(x[:, :, None], 0, 1))
        return jnp.swapaxes(y[:, :, 0], 0, 1), cache

    def _step(self, cache, x):
        """One token `[B, 1, width]`."""
        place, first = cache["index"] % self.segment_len, self.persistent.shape[0]
        entry = jax.tree.map(
            lambda new, old: jnp.where(place == 0, new, old),
            cache["memory"]["state"].memory,
            cache["entry"],
        )
        h = self.memory.recall(x, entry)
        q, *both, _ = self.attention._heads(jnp.concatenate([h, x], 1), None, None)
        kept = []
        for new, old in zip(both, (cache["key"], cache["value"])):
            new = new.astype(old.dtype)
            for n, start in enumerate((first, first + self.segment_len)):
                one = new[:, n : n + 1]
                old = jax.lax.dynamic_update_slice_in_dim(old, one, start + place, 1)
            kept.append(old)
        mask = ops.dense_mask((self._ranks() <= place)[None])
        y = self._attend(q[:, 1:], *kept, mask, x)
        m, memory = self.memory(y, cache=cache["memory"])
        cache = {"index": cache["index"] + 1, "memory": memory, "entry": entry}
        return cache | dict(zip(("key", "value"), kept)), self._join(y, m)

    def _ranks(self):
        """From which place in the segment every key is visible; -1 is always."""
        places = jnp.arange(self.segment_len)
        always = jnp.full(self.persistent.shape[0], -1)
        return jnp.concatenate([always, places, places])

    def _attend(self, q, k, v, mask, x):
        return self.attention._project(self.attention._attend(q, k, v, mask, None), x)

    def _join(self, y, m):
        return self.attention_norm(y) * self.memory_norm(m)
