"""Token mixers over explicit weights: projections, positions, gates and a cache around an op."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import Mask, Pointwise, attention_weights
from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, append, cache_mask, divide, dropout, split_heads
from attn_lab.ops.predicates import Multiple

identity = Pointwise(lambda scores: scores)


class MultiHeadAttention(Mixer):
    """Multi-head attention with grouped heads: `concat_h attention(x W_q, x W_k, x W_v) W_o`.

    Args:
      width: of the input and output.
      num_heads: query heads H.
      num_kv_heads: key and value heads K, which divide H; by default H.
      head_dim: by default `width / num_heads`.
      value_dim: by default `head_dim`.
      qk_norm: "rms" normalises queries and keys per head, before the rotation.
      rope_theta: base of rotary positions; None has none.
      rotary_dim: how many channels of a head rotate, by default all.
      causal: whether a token sees its past alone.
      window: how many tokens it sees back, its own included (and, if not causal, as many ahead).
      bias, out_bias: of the projections.
      dropout: rate on the weights; needs softmax attention.
      attention: the operator, `dot_product_attention` or one with its signature.
      implementation: of the operator; None chooses.
      build: keywords of `Build`.

    Raises:
      ValueError: if head counts do not divide.

    Source: Vaswani et al., 2017, arXiv 1706.03762; Ainslie et al., 2023, arXiv 2305.13245.
    """

    drops = True
    tied = False  # whether the keys are the values as well, and are kept once

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        qk_norm: str | None = None,
        rope_theta: float | None = None,
        rotary_dim: int | None = None,
        causal: bool = True,
        window: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        attention: Callable[..., jax.Array] = ops.dot_product_attention,
        implementation: str | None = None,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        divide(num_heads, self.num_kv_heads, "number of query heads; num_kv_heads:")
        self.head_dim = divide(width, num_heads) if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.rope_theta, self.rotary_dim = rope_theta, rotary_dim
        self.causal, self.window, self.dropout = causal, window, dropout
        self.attention, self.implementation = attention, implementation
        if dropout and not (self.drops and attention is ops.dot_product_attention):
            raise ValueError(f"dropout={dropout} on the weights needs plain softmax attention")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self._make_projections(width, bias, out_bias, build)
        if qk_norm not in (None, "rms"):
            raise ValueError(f"qk_norm must be None or 'rms', got {qk_norm!r}")
        none = nnx.data(None)
        self.query_norm = build.rms_norm(self.head_dim, 1e-6) if qk_norm else none
        self.key_norm = build.rms_norm(self.key_dim, 1e-6) if qk_norm else none

    def _make_projections(self, width, bias, out_bias, build):
        self.query = build.linear(width, self.query_heads * self.head_dim, bias)
        self.key = build.linear(width, self.key_heads * self.key_dim, bias)
        self.value = build.linear(width, self.value_heads * self.value_dim, bias)
        self.out = build.output(self.num_heads * self.value_dim, width, out_bias)

    @property
    def query_heads(self) -> int:
        return self.num_heads

    @property
    def key_heads(self) -> int:
        return self.num_kv_heads

    @property
    def value_heads(self) -> int:
        return self.num_kv_heads

    @property
    def key_dim(self) -> int:
        return self.head_dim

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        cache = {
            "index": jnp.zeros((), jnp.int32),
            "key": jnp.zeros((batch, length, self.key_heads, self.key_dim), dtype),
        }
        if not self.tied:
            cache["value"] = jnp.zeros((batch, length, self.value_heads, self.value_dim), dtype)
        return cache

    def state_bytes(self, length: int) -> int:
        kept = length if self.window is None else min(length, self.window)
        return super().state_bytes(kept)

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        q, k, v, mask, cache = self._inputs(x, segment_ids, cache)
        y = self._project(self._attend(q, k, v, mask, rngs), x)
        return y if cache is None else (y, cache)

    def weights(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """The weights `[B, H, T, T]` that a call on `x` uses, without dropout.

        They are read off the operator itself: its outputs for the unit vectors as values.
        """
        q, k, v, mask, _ = self._inputs(x, segment_ids, None)
        length = v.shape[1]
        unit = jnp.broadcast_to(jnp.eye(length)[:, None], (*v.shape[:3], length))
        return jnp.swapaxes(self._attend(q, k, unit, mask, None), 1, 2)

    def scores(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """The scaled scores `[B, H, T, T]` of a call on `x`, -inf where not allowed."""
        q, k, _, mask, _ = self._inputs(x, segment_ids, None)
        return self._scores(q, k, mask)

    def _scores(self, q, k, mask):
        return attention_weights(q, k, mask=mask, normalizer=identity)

    def _inputs(self, x, segment_ids, cache):
        """Queries, keys, values, mask, and the cache after these tokens."""
        if cache is not None and not self.causal:
            raise ValueError("cache needs causal=True: later tokens change earlier outputs")
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        q, k, v, state = self._heads(x, segment_ids, cache)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = self._modulate(q, k, v, x)
        past, count = 0 if cache is None else cache["index"], x.shape[1]
        if self.rope_theta is not None:
            rotate = functools.partial(
                ops.apply_rotary,
                positions=past + jnp.arange(count),
                theta=self.rope_theta,
                rotary_dim=self.rotary_dim,
            )
            q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v, mask, kept = self._continue(cache, k, v)
            return q, k, v, mask, {"index": past + count, **kept, **state}
        mask = self._pattern(count)
        if segment_ids is not None:
            segments = ops.segment_mask(segment_ids)
            mask = segments if mask is None else mask & segments
        return q, k, v, mask, None

    def _continue(self, cache, k, v):
        """All keys and values that these tokens see, which of them, and what is kept for later."""
        past, count = cache["index"], k.shape[1]
        kept = {"key": append(cache["key"], k, past)}
        if not self.tied:
            kept["value"] = append(cache["value"], v, past)
        k, v = kept["key"], kept.get("value", kept["key"])
        return k, v, self._cache_mask(past, count, k.shape[1]), kept

    def _cache_mask(self, past, count, length):
        """What these tokens see of a cache of that length."""
        return cache_mask(past, count, length, self._reach()[0])

    def _heads(self, x, segment_ids, cache):
        """Queries, keys and values before positions, and what else the cache keeps."""
        q = split_heads(self.query(x), self.query_heads)
        k = split_heads(self.key(x), self.key_heads)
        return q, k, split_heads(self.value(x), self.value_heads), {}

    def _pattern(self, length):
        """The mask of tokens in a row, None if all see each other."""
        return ops.sliding_window_mask(*self._reach()) if self.causal or self.window else None

    def _reach(self):
        """How far back and ahead a token sees; negative is without bound."""
        back = -1 if self.window is None else self.window - 1
        return back, 0 if self.causal else back

    def _attend(self, q, k, v, mask, rngs):
        if rngs is None or not self.dropout:
            chosen = {"implementation": self.implementation} if self.implementation else {}
            return self.attention(q, k, v, mask=mask, **chosen)
        _, weights = ops.dot_product_attention(q, k, v, mask=mask, return_weights=True)
        weights = dropout(weights, self.dropout, rngs).astype(v.dtype)
        v = jnp.repeat(v, weights.shape[1] // v.shape[2], axis=2)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def _modulate(self, q, k, v, x):
        """A change of queries, keys and values by the input, before positions."""
        return q, k, v

    def _project(self, heads, x):
        """`[B, T, H, Dv]` to `[B, T, width]`."""
        return self.out(heads.reshape(*heads.shape[:2], -1))


class NeighborhoodAttention(MultiHeadAttention):
    """Multi-head attention of every token to the `window` nearest of its residue mod `dilation`.

    Causal ones are a token and those before it; others surround it, and at the ends of a sequence
    move inwards, so that it must have at least `window * dilation` tokens.

    Args:
      width, arguments: as `MultiHeadAttention`.
      window: how many tokens a token sees, its own included, at least 2.
      dilation: the distance of the tokens that see each other.

    Source: Hassani et al., 2022, arXiv 2204.07143; Hassani and Shi, 2022, arXiv 2209.15001.
    """

    def __init__(self, width: int, *, window: int = 8, dilation: int = 1, **arguments: Any):
        super().__init__(width, window=window, **arguments)
        if window < 2 or dilation < 1:
            raise ValueError(
                f"window must be at least 2 and dilation at least 1, got {window} and {dilation}"
            )
        self.dilation = dilation

    def state_bytes(self, length: int) -> int:
        reach = self._reach()[0] + 1
        return Mixer.state_bytes(self, min(length, reach))

    def _reach(self):
        back = (self.window - 1) * self.dilation
        return back, 0 if self.causal else back

    def _pattern(self, length):
        if not self.causal:
            return ops.neighborhood_mask(length, self.window, dilation=self.dilation)
        same = Mask(Multiple(self.dilation))
        return ops.sliding_window_mask(*self._reach()) & same

    def _cache_mask(self, past, count, length):
        return cache_mask(past, count, length, self._reach()[0], self.dilation)


class SigmoidAttention(MultiHeadAttention):
    """Multi-head attention with sigmoid weights of bias `-log(context)`.

    Args:
      width, arguments: as `MultiHeadAttention`.
      context: the training length n; by default the number of keys of each call.

    Source: Ramapuram et al., 2024, arXiv 2409.04431.
    """

    def __init__(self, width: int, *, context: int | None = None, **arguments: Any):
        bias = None if context is None else -math.log(context)
        attention = functools.partial(ops.sigmoid_attention, logit_bias=bias)
        super().__init__(width, attention=attention, **arguments)


class SinkAttention(MultiHeadAttention):
    """Multi-head softmax attention with a learned sink for each head.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      kind: "logit" (a score alone), "key" (a key of value 0) or "key_value".

    Source: Gu et al., 2024, arXiv 2410.10781.
    """

    drops = False

    def __init__(self, width: int, *, kind: str = "logit", **arguments: Any):
        shapes = {"logit": ("sink_logit",), "key": ("sink_key",)}
        shapes["key_value"] = ("sink_key", "sink_value")
        if kind not in shapes:
            raise ValueError(f"kind must be one of {', '.join(shapes)}, got {kind!r}")
        super().__init__(width, **arguments)
        build, heads = Build.of(arguments), self.num_kv_heads
        sizes = {"sink_logit": (self.num_heads,), "sink_key": (1, heads, self.head_dim)}
        sizes["sink_value"] = (1, heads, self.value_dim)
        normal = nnx.initializers.normal(0.02)
        self.sinks = nnx.Dict({name: build.param(sizes[name], normal) for name in shapes[kind]})

    def _attend(self, q, k, v, mask, rngs):
        sinks = {name: param[...] for name, param in self.sinks.items()}
        return ops.sink_attention(q, k, v, mask=mask, **sinks)

    def weights(self, x, *, segment_ids=None):
        if "sink_value" in self.sinks:
            raise ValueError(
                "weights need kind='logit' or 'key': a sink's value is no key's weight"
            )
        return super().weights(x, segment_ids=segment_ids)


class GatedAttention(MultiHeadAttention):
    """Multi-head attention with a gate, computed from the input, in one of five places.

    Args:
      width, arguments: as `MultiHeadAttention`.
      position: "G1" gates the heads' outputs, "G2" the values, "G3" the keys, "G4" the queries,
        "G5" the projected output.
      granularity: "elementwise", or "headwise" (one gate a head; not for G5).
      head_specific: False gives all heads the mean of their gates.
      activation, mode: as in `ops.apply_gate`.

    Source: Qiu et al., 2025, arXiv 2505.06708.
    """

    def __init__(
        self,
        width: int,
        *,
        position: str = "G1",
        granularity: str = "elementwise",
        head_specific: bool = True,
        activation: str = "sigmoid",
        mode: str = "multiply",
        **arguments: Any,
    ):
        super().__init__(width, **arguments)
        heads = {
            "G1": (self.num_heads, self.value_dim),
            "G2": (self.num_kv_heads, self.value_dim),
            "G3": (self.key_heads, self.head_dim),
            "G4": (self.query_heads, self.head_dim),
            "G5": (1, width),
        }
        if position not in heads:
            raise ValueError(f"position must be one of {', '.join(heads)}, got {position!r}")
        if granularity not in ("elementwise", "headwise") or (position, granularity) == (
            "G5",
            "headwise",
        ):
            raise ValueError(
                f"granularity must be 'elementwise', or 'headwise' before G5, got {granularity!r}"
            )
        self.position, self.head_specific = position, head_specific
        self.activation, self.mode = activation, mode
        self.gate_heads, dim = heads[position]
        outputs = self.gate_heads * (dim if granularity == "elementwise" else 1)
        self.gate = Build.of(arguments).linear(width, outputs)

    def _gated(self, y, x):
        gate = split_heads(self.gate(x), self.gate_heads)
        gated = ops.apply_gate(y, gate, activation=self.activation, mode=self.mode)
        if self.head_specific:
            return gated
        unit = jnp.zeros_like(y) if self.mode == "add" else jnp.ones_like(y)
        shared = ops.apply_gate(unit, gate, activation=self.activation, mode=self.mode)
        shared = shared.mean(2, keepdims=True)
        return y + shared if self.mode == "add" else y * shared

    def _modulate(self, q, k, v, x):
        parts = {"G4": q, "G3": k, "G2": v}
        if self.position in parts:
            parts[self.position] = self._gated(parts[self.position], x)
        return tuple(parts.values())

    def _project(self, heads, x):
        if self.position == "G1":
            heads = self._gated(heads, x)
        y = super()._project(heads, x)
        return self._gated(y[:, :, None], x)[:, :, 0] if self.position == "G5" else y


class DifferentialAttention(MultiHeadAttention):
    """Multi-head differential attention, with a norm and a constant factor on every head.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout; `num_heads` counts signal heads,
        `head_dim` is by default `width / (2 num_heads)` and values are twice as wide.
      depth: the layer's index from 0, which sets the first weight of the noise maps.
      num_noise_heads: noise maps, which divide the signal heads; by default as many.

    Source: Ye et al., 2024, arXiv 2410.05258; grouped: 2025, arXiv 2510.06949.
    """

    drops = False

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        depth: int = 0,
        num_noise_heads: int | None = None,
        **arguments: Any,
    ):
        self.num_noise_heads = num_heads if num_noise_heads is None else num_noise_heads
        repeats = divide(num_heads, self.num_noise_heads, "signal heads; num_noise_heads:")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.noise_key_heads = max(kv_heads // repeats, 1)
        divide(self.num_noise_heads, self.noise_key_heads, "noise heads; noise key heads:")
        head_dim = divide(width, 2 * num_heads) if head_dim is None else head_dim
        super().__init__(
            width,
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=2 * head_dim,
            **arguments,
        )
        build = Build.of(arguments)
        self.lambda_init = ops.differential_lambda_init(depth)
        normal = nnx.initializers.normal(0.1)
        self.lambdas = nnx.List([build.param((head_dim,), normal) for _ in range(4)])
        self.head_norm = build.rms_norm(self.value_dim)

    @property
    def query_heads(self) -> int:
        return self.num_heads + self.num_noise_heads

    @property
    def key_heads(self) -> int:
        return self.num_kv_heads + self.noise_key_heads

    def _attend(self, q, k, v, mask, rngs):
        q1, q2 = jnp.split(q, [self.num_heads], axis=2)
        k1, k2 = jnp.split(k, [self.num_kv_heads], axis=2)
        vectors = (param[...] for param in self.lambdas)
        lam = ops.differential_lambda(*vectors, lambda_init=self.lambda_init)
        return ops.differential_attention(q1, k1, q2, k2, v, lam, mask=mask)

    def _scores(self, q, k, mask):
        """Those of the signal maps, then those of the noise maps."""
        pairs = (jnp.split(q, [self.num_heads], 2), jnp.split(k, [self.num_kv_heads], 2))
        return jnp.concatenate([MultiHeadAttention._scores(self, *p, mask) for p in zip(*pairs)], 1)

    def _project(self, heads, x):
        return super()._project((1 - self.lambda_init) * self.head_norm(heads), x)
