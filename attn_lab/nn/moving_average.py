"""Gated attention behind moving averages: the layers of Mega and Megalodon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, append, cache_mask, divide, split_heads

SPANS = "segment_ids need another mixer: moving averages and chunks span all segments of a row"


class MegaLayer(Mixer):
    """A layer of Mega: moving averages, gated attention of one head behind them, a gated residual.

    Queries and keys come from damped moving averages of the normed input, values from the input
    itself; `ops.mega_gated_output` brings the outcome back to the stream, which the layer has in
    its own hands.

    Args:
      width: C, of the input and output.
      z_dim: of queries and keys.
      h_dim: of values, by default `2 C`.
      ema_dim: N, averages a channel.
      chunk_size: tokens see those of their own chunk alone, and earlier ones by the averages; None
        is no chunks.
      attention: "softmax", "laplace" or "relu2".
      rel_pos: "simple", a bias for each distance, or "rotary", products of two rotated vectors.
      norm: "layernorm", "rmsnorm" or None.
      prenorm: whether it is the input that is normed, or the output.
      causal: whether a token sees its past alone; if not, averages run both ways.
      context: distances that the bias "simple" tells apart, if there are no chunks; greater ones
        share one.
      build: keywords of `Build`.

    Raises:
      ValueError: if a name is unknown.

    Source: Ma et al., Mega, 2022, arXiv 2209.10655.
    """

    packs = False

    def __init__(
        self,
        width: int,
        *,
        z_dim: int = 64,
        h_dim: int | None = None,
        ema_dim: int = 16,
        chunk_size: int | None = None,
        attention: str = "softmax",
        rel_pos: str = "simple",
        norm: str | None = "layernorm",
        prenorm: bool = True,
        causal: bool = True,
        context: int = 1024,
        **build: Any,
    ):
        for name, given, known in (
            ("attention", attention, ("softmax", "laplace", "relu2")),
            ("rel_pos", rel_pos, ("simple", "rotary")),
            ("norm", norm, ("layernorm", "rmsnorm", None)),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {known}, got {given!r}")
        build = Build(**build)
        h_dim = 2 * width if h_dim is None else h_dim
        self.chunk_size, self.attention, self.causal = chunk_size, attention, causal
        self.z_dim, self.h_dim, self.prenorm = z_dim, h_dim, prenorm
        norms = {"layernorm": build.layer_norm, "rmsnorm": build.rms_norm}
        self.norm = norms[norm](width) if norm else nnx.data(None)
        self.average = DampedAverage(width, ema_dim, bidirectional=not causal, build=build)
        self.value = build.linear(width, h_dim, True)
        self.project = build.linear(width, 2 * width + z_dim + h_dim, True)
        self.splits = width, width + z_dim, width + z_dim + h_dim
        self.out = build.output(h_dim, width, True)
        small = nnx.initializers.normal(0.02)
        self.gamma = build.param((2, z_dim), small)
        self.beta = build.param((2, z_dim), nnx.initializers.zeros)
        self.reach = None if rel_pos == "rotary" else chunk_size or context
        shape = (2, z_dim) if self.reach is None else (2 * self.reach - 1,)
        self.positions = build.param(shape, small)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        if not self.causal:
            raise ValueError("a cache needs causal=True")
        slots = min(length, self.chunk_size or length)
        return {
            "index": jnp.zeros((), jnp.int32),
            "average": jnp.zeros((batch, *self.average.alpha.shape), jnp.float32),
            "k": jnp.zeros((batch, slots, 1, self.z_dim), dtype),
            "v": jnp.zeros((batch, slots, 1, self.h_dim), dtype),
        }

    def bias(self, rows: jax.Array, keys: int) -> jax.Array:
        """What is added to the scores of queries at `rows` and the first keys, `[T, S]`."""
        columns = jnp.arange(keys)
        if self.reach is None:
            ends = zip(self.positions[...], (rows, columns))
            a, b = (
                ops.apply_rotary(jnp.tile(vector, (1, len(place), 1, 1)), place)[0, :, 0]
                for vector, place in ends
            )
            return a @ b.T
        apart = jnp.clip(columns - rows[:, None], 1 - self.reach, self.reach - 1)
        return self.positions[...][apart + self.reach - 1]

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if segment_ids is not None:
            raise ValueError(SPANS)
        normed = x if self.norm is None or not self.prenorm else self.norm(x)
        v = jax.nn.silu(self.value(normed))[:, :, None]
        averages, state = self.average(normed, None if cache is None else cache["average"])
        u, z, r, hx = jnp.split(self.project(averages), self.splits, -1)
        z, r = jax.nn.silu(z)[:, :, None], jax.nn.silu(r)
        q, k = (z * self.gamma[i].astype(z.dtype) + self.beta[i].astype(z.dtype) for i in (0, 1))

        def attend(q, k, v, rows, **part):
            bias = self.bias(rows, k.shape[1] if part.get("chunk_size") is None else len(rows))
            return ops.elementwise_attention(q, k, v, bias, activation=self.attention, **part)

        past = None if cache is None else cache
        attended, new = in_chunks(attend, q, k, v, past, self.chunk_size, causal=self.causal)
        w_h, b_h = (p[...].astype(x.dtype) for p in (self.out.kernel, self.out.bias))
        y = ops.mega_gated_output(x, attended[:, :, 0], r, hx, u, w_h, b_h)
        y = y if self.norm is None or self.prenorm else self.norm(y)
        return y if cache is None else (y, {"average": state, **new})


class DampedAverage(nnx.Module):
    """`ops.damped_ema` with its parameters, as Mega starts them.

    Args:
      width: C.
      size: N, averages a channel.
      bidirectional: whether they run both ways.
      build: how to make the parameters.
    """

    def __init__(self, width: int, size: int, *, bidirectional: bool, build: Build):
        shape, normal = (width * (2 if bidirectional else 1), size), nnx.initializers.normal

        def alternate(*args):
            return normal(0.02)(*args) + (1 - 2 * (jnp.arange(size) % 2))

        self.bidirectional = bidirectional
        self.alpha, self.delta = build.param(shape, normal(0.2)), build.param(shape, normal(0.2))
        self.beta, self.gamma = build.param(shape, alternate), build.param(shape, normal(1.0))
        self.omega = build.param((width,), normal(1.0))

    def __call__(self, x, state=None):
        parts = (self.alpha, self.delta, self.beta, self.gamma, self.omega)
        parts = [part[...] for part in parts]
        if self.bidirectional:
            return ops.damped_ema(x, *parts, bidirectional=True), None
        return ops.damped_ema(x, *parts, initial_state=state, return_state=True)


class MegalodonAttention(Mixer):
    """The attention of Megalodon: within chunks, behind turning averages of a normed sequence.

        t = timestep_norm(x),    m = rms_norm(complex_ema(t)),    q, k from W_z m
        y = W_1 m + W_2(silu(W_r m) attention(q, k, silu(W_v t)))

    Queries and keys are normalised and share their projection; rotary positions start anew in
    every chunk.

    Args:
      width: C, of the input and output.
      num_heads: H, which divides `z_dim` and `value_dim`.
      z_dim: of queries and keys, all heads together.
      value_dim: of values, all heads together, by default `2 C`.
      ema_dim: N, averages a channel.
      chunk_size: tokens of a chunk.
      num_groups: of the timestep norm; they divide C.
      rope_theta: base of the rotary positions.
      norm_eps: of the norms.
      build: keywords of `Build`.

    Raises:
      ValueError: if a size does not divide.

    Source: Ma et al., Megalodon, 2024, arXiv 2404.08801.
    """

    packs = False

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        z_dim: int = 256,
        value_dim: int | None = None,
        ema_dim: int = 16,
        chunk_size: int = 2048,
        num_groups: int = 32,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        build = Build(**build)
        value_dim = 2 * width if value_dim is None else value_dim
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be positive, got {chunk_size}")
        divide(width, num_groups, "width; num_groups:")
        self.heads = num_heads, divide(z_dim, num_heads, "z_dim")
        self.value_heads = num_heads, divide(value_dim, num_heads, "value_dim")
        self.chunk_size, self.num_groups = chunk_size, num_groups
        self.rope_theta, self.norm_eps = rope_theta, norm_eps
        zeros, normal = nnx.initializers.zeros, nnx.initializers.normal
        self.step_scale, self.step_bias = (build.param((width,), zeros) for _ in range(2))
        self.alpha, self.delta = (build.param((width, ema_dim), normal(0.2)) for _ in range(2))
        self.theta = build.param((width,), _spread_angles)
        self.read = build.param((width, ema_dim, 2), _real_normal)
        self.omega = build.param((width,), _truncated)
        self.average_norm = build.rms_norm(width, norm_eps)
        self.z = build.linear(width, z_dim, True)
        self.value = build.linear(width, value_dim, True)
        self.gate = build.linear(width, value_dim, True)
        self.gamma, self.beta = (build.param((2, *self.heads), zeros) for _ in range(2))
        self.skip = build.output(width, width, True)
        self.out = build.output(value_dim, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        slots, groups = min(length, self.chunk_size), (batch, self.num_groups)
        return {
            "index": jnp.zeros((), jnp.int32),
            "moments": (jnp.zeros(groups, jnp.float32), jnp.ones(groups, jnp.float32)),
            "average": jnp.zeros((batch, *self.read.shape), jnp.float32),
            "k": jnp.zeros((batch, slots, *self.heads), dtype),
            "v": jnp.zeros((batch, slots, *self.value_heads), dtype),
        }

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if segment_ids is not None:
            raise ValueError(SPANS)
        past = 0 if cache is None else cache["index"]
        normed, *moments = ops.timestep_norm(
            x,
            self.step_scale[...],
            self.step_bias[...],
            *(() if cache is None else cache["moments"]),
            num_groups=self.num_groups,
            prior_count=past,
            eps=self.norm_eps,
            return_state=True,
        )
        parameters = (self.alpha, self.delta, self.theta, self.read, self.omega)
        averages, state = ops.complex_ema(
            normed,
            *(p[...] for p in parameters),
            initial_state=None if cache is None else cache["average"],
            return_state=True,
        )
        averages = self.average_norm(averages)
        z = split_heads(self.z(averages), self.heads[0])
        q, k = ops.normalized_shared_qk(z, self.gamma[...], self.beta[...], eps=self.norm_eps)
        places = (past + jnp.arange(x.shape[1])) % self.chunk_size
        q, k = (ops.apply_rotary(a, places, theta=self.rope_theta) for a in (q, k))
        v = split_heads(jax.nn.silu(self.value(normed)), self.heads[0])

        def attend(q, k, v, rows, **part):
            return ops.elementwise_attention(q, k, v, activation="softmax", scale=1.0, **part)

        attended, new = in_chunks(attend, q, k, v, cache, self.chunk_size)
        gated = attended.reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(averages))
        y = (self.skip(averages) + self.out(gated)).astype(x.dtype)
        return y if cache is None else (y, {"moments": tuple(moments), "average": state, **new})


class MegalodonLayer(nnx.Module):
    """A layer of Megalodon: attention, and an FFN whose residual is the input of the layer.

        y = x + attention(x),    out = x + ffn(layer_norm(y))

    Args:
      width: of the input and output.
      ffn_dim: hidden units of the FFN, `W_2(silu(W_1 y) W_3 y)`; by default `2 width`.
      arguments: those of `MegalodonAttention`, and keywords of `Build`.

    Source: Ma et al., Megalodon, 2024, arXiv 2404.08801.
    """

    def __init__(self, width: int, *, ffn_dim: int | None = None, **arguments: Any):
        build, ffn_dim = Build.of(arguments), 2 * width if ffn_dim is None else ffn_dim
        self.attention = MegalodonAttention(width, **arguments)
        self.norm = build.layer_norm(width)
        self.up, self.gate = (build.linear(width, ffn_dim) for _ in range(2))
        self.down = build.output(ffn_dim, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        return self.attention.init_cache(batch, length, dtype)

    def __call__(self, x, *, segment_ids=None, cache=None):
        mixed = self.attention(x, segment_ids=segment_ids, cache=cache)
        mixed, new = (mixed, None) if cache is None else mixed
        y = self.norm(x + mixed)
        out = x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))
        return out if cache is None else (out, new)


def in_chunks(
    attend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: dict[str, jax.Array] | None,
    size: int | None,
    *,
    causal: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attention within consecutive chunks of a sequence, and what to keep for its next tokens.

    Args:
      attend: `attend(q, k, v, rows, causal=, chunk_size=)` or `attend(q, k, v, rows, mask=)`, where
        `rows` are the places of queries in their chunk and keys start at place 0.
      q, k, v: `[B, T, H, D]`.
      cache: the "index" of the first token, and "k" and "v" of its chunk.
      size: of a chunk; None for one chunk.
      causal: whether a token sees its past alone.

    Returns:
      `[B, T, H, Dv]`, and the new cache, empty without one.
    """
    length = q.shape[1]
    if cache is None:
        if size is None or size >= length:
            return attend(q, k, v, jnp.arange(length), causal=causal), {}
        more = -length % size if causal else 0
        q, k, v = (jnp.pad(a, ((0, 0), (0, more), (0, 0), (0, 0))) for a in (q, k, v))
        out = attend(q, k, v, jnp.arange(size), causal=causal, chunk_size=size)
        return out[:, :length], {}
    past, slots = cache["index"], cache["k"].shape[1]
    new = {"index": past + length}
    if size is None or slots < size or length == 1:
        first = past if size is None or slots < size else past % size
        new |= {name: append(cache[name], a, first) for name, a in (("k", k), ("v", v))}
        kept = (new[name].astype(v.dtype) for name in "kv")
        rows = first + jnp.arange(length)
        return attend(q, *kept, rows, mask=cache_mask(first, length, slots)), new
    # The present chunk from its start, the new tokens, and room for where they may end.
    first = past % size
    room = jnp.zeros((q.shape[0], -(-(size - 1 + length) // size) * size, 1, 1), v.dtype)

    def laid_out(name, a):
        whole = jnp.broadcast_to(room, (*room.shape[:2], *a.shape[2:]))
        if name in cache:
            whole = whole.at[:, :size].set(cache[name].astype(v.dtype))
        return jax.lax.dynamic_update_slice_in_dim(whole, a.astype(v.dtype), first, 1)

    q, k, v = (laid_out(name, a) for name, a in (("q", q), ("k", k), ("v", v)))
    out, _ = in_chunks(attend, q, k, v, None, size)
    last = (first + length) // size * size
    for name, a in (("k", k), ("v", v)):
        kept = jax.lax.dynamic_slice_in_dim(a, last, size, 1)
        new[name] = kept.astype(cache[name].dtype)
    return jax.lax.dynamic_slice_in_dim(out, first, length, 1), new


def _spread_angles(key, shape, dtype):
    """Logits of `C^(-i / C)`, i = 1..C, in random order."""
    places = jax.random.permutation(key, jnp.arange(1, shape[0] + 1)) / shape[0]
    logs = -math.log(shape[0]) * places
    return (logs - jnp.log(-jnp.expm1(logs))).astype(dtype)


def _real_normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype).at[..., 1].set(0)


def _truncated(key, shape, dtype):
    """Normal of deviation 0.25 within [-1, 1]."""
    return 0.25 * jax.random.truncated_normal(key, -4, 4, shape, dtype)
