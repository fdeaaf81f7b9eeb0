"""Token mixers around a matrix state: gates, feature maps and norms about engine 2."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels import recurrence
from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, ShortConv, divide, l2_norm, split_heads

ACTIVATIONS = {"silu": jax.nn.silu, "identity": lambda x: x}
GATES = {"swish": jax.nn.silu, "linear": lambda x: x}


class MatrixStateMixer(Mixer):
    """Queries, keys and values around a state that decays and is written: the family's base.

    `q, k, v = act(conv(x W))`, heads of which go through `linear_attention` of engine 2 with the
    gates of the subclass; the output is normed per head, gated by `gate(x W_g)` and projected.

    Args:
      width: of the input and output.
      num_heads: H, which divides the widths of keys and values.
      key_width, value_width: all heads together.
      short_conv: taps of a causal depthwise convolution on q, k and v; None has none.
      activation: of q, k and v, "silu" or "identity".
      qk_norm: "l2" gives q and k unit norm per head; None leaves them.
      output_gate: "swish", "linear" (without an activation) or None.
      norm_eps: of the RMS norm of a head's output; None has no norm.
      learned_initial_state: whether the state before the first token is a parameter of rank 1,
        `start.a start.b`; `segment_ids` then raise ValueError.
      build: keywords of `Build`.
    """

    scale: float | None = None

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        key_width: int,
        value_width: int,
        short_conv: int | None,
        activation: str,
        qk_norm: str | None,
        output_gate: str | None,
        norm_eps: float | None,
        learned_initial_state: bool = False,
        **build: Any,
    ):
        build = Build(**build)
        self.num_heads = num_heads
        self.head_dim = divide(key_width, num_heads, "key width")
        self.value_dim = divide(value_width, num_heads, "value width")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        for name, given, known in (
            ("qk_norm", qk_norm, ("l2",)),
            ("output_gate", output_gate, tuple(GATES)),
        ):
            if given not in (None, *known):
                raise ValueError(f"{name} must be None or of {', '.join(known)}, got {given!r}")
        self.splits = key_width, 2 * key_width
        self.activation, self.qk_norm = activation, qk_norm
        self.qkv = build.linear(width, 2 * key_width + value_width)
        channels = 2 * key_width + value_width
        none = nnx.data(None)
        self.conv = ShortConv(channels, short_conv, build=build) if short_conv else none
        self.head_norm = build.rms_norm(self.value_dim, norm_eps) if norm_eps else none
        self.output_gate = build.linear(width, value_width) if output_gate else none
        self.gate_activation = output_gate
        self.out = build.output(value_width, width)
        self.start, self.packs = none, not learned_initial_state
        if learned_initial_state:
            shapes = {"a": (self.head_dim, 1), "b": (1, self.value_dim)}
            small = nnx.initializers.normal(0.02)
            factors = {name: build.param((num_heads, *s), small) for name, s in shapes.items()}
            self.start = nnx.Dict(factors)

    def _start(self, batch):
        """The state before the first token."""
        shape = self.num_heads, self.head_dim, self.value_dim
        if self.start is None:
            return jnp.zeros((batch, *shape), jnp.float32)
        a, b = (self.start[name][...].astype(jnp.float32) for name in "ab")
        return jnp.broadcast_to(a * b, (batch, *shape))

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        cache = {"state": self._start(batch)}
        if self.conv is not None:
            cache["conv"] = self.conv.init_state(batch, dtype)
        return cache

    def gates(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """The log decay `[B, T, H]` or `[B, T, H, D]` and write strength `[B, T, H]`, or None."""
        return None, None

    def heads(self, q, k, v, positions):
        """The last change of queries, keys and values `[B, T, H, D]` before the recurrence."""
        return q, k, v

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        if segment_ids is not None and self.start is not None:
            raise ValueError("segment_ids need learned_initial_state=False: it starts a row, once")
        start = None if self.start is None else self._start(x.shape[0])
        qkv, new = self.qkv(x), {}
        if self.conv is not None and cache is not None:
            qkv, new["conv"] = self.conv(qkv, state=cache["conv"])
        elif self.conv is not None:
            qkv = self.conv(qkv, segment_ids=segment_ids)
        q, k, v = jnp.split(ACTIVATIONS[self.activation](qkv), self.splits, -1)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))
        if self.qk_norm:
            q, k = l2_norm(q), l2_norm(k)
        past = 0 if cache is None else cache.get("index", 0)
        positions = past + jnp.arange(x.shape[1])
        q, k, v = self.heads(q, k, v, positions)
        log_decay, beta = self.gates(x, positions)
        y, state = recurrence.linear_attention(
            q,
            k,
            v,
            log_decay=log_decay,
            beta=beta,
            scale=self.scale,
            initial_state=start if cache is None else cache["state"],
            return_state=True,
            segment_ids=segment_ids,
        )
        y = self.finish(y)
        y = y if self.head_norm is None else self.head_norm(y)
        y = y.reshape(*x.shape[:2], -1)
        if self.output_gate is not None:
            y = y * GATES[self.gate_activation](self.output_gate(x))
        y = self.out(y.astype(x.dtype))
        if cache is None:
            return y
        if "index" in cache:
            new["index"] = past + x.shape[1]
        return y, {"state": state, **new}

    def finish(self, y):
        """A change of the heads' outputs `[B, T, H, Dv]` before the norm."""
        return y


class LinearAttention(MatrixStateMixer):
    """Linear attention: `phi(q_t)^T sum_{s <= t} phi(k_s) v_s^T`, divided by its weights' sum.

    Args:
      width, num_heads: of the layer.
      feature_map: a name in `ops.feature_maps`.
      short_conv, qk_norm, output_gate: as in `MatrixStateMixer`.
      eps: added to the sum of a row's weights.

    Source: Katharopoulos et al., 2020, arXiv 2006.16236.
    """

    scale = 1.0

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        feature_map: str = "elu1",
        short_conv: int | None = None,
        qk_norm: str | None = None,
        output_gate: str | None = None,
        eps: float = 1e-6,
        **build: Any,
    ):
        self.feature_map, self.eps = feature_map, eps
        ops.feature_map(feature_map)
        super().__init__(
            width,
            num_heads=num_heads,
            key_width=width,
            value_width=width,
            short_conv=short_conv,
            activation="identity",
            qk_norm=qk_norm,
            output_gate=output_gate,
            norm_eps=None,
            **build,
        )

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        features = jax.eval_shape(ops.feature_map(self.feature_map), jnp.zeros(self.head_dim))
        shape = batch, self.num_heads, features.shape[0], self.value_dim + 1
        return super().init_cache(batch, length, dtype) | {"state": jnp.zeros(shape, jnp.float32)}

    def heads(self, q, k, v, positions):
        phi = ops.feature_map(self.feature_map)
        v = v.astype(jnp.result_type(v, jnp.float32))  # the sum of weights is not to be rounded
        return phi(q), phi(k), jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)

    def finish(self, y):
        return y[..., :-1] / (y[..., -1:] + self.eps)


class MultiScaleRetention(MatrixStateMixer):
    """Retention: one fixed decay a head, rotary queries and keys, a norm and a swish gate.

    Args:
      width: of the input and output.
      num_heads: H.
      expand_k, expand_v: widths of keys and values over `width`.
      gate: "swish" or None.
      rope_base: of the rotary positions.
      norm_eps: of the RMS norm of a head.
      short_conv: as in `MatrixStateMixer`.

    Source: Sun et al., 2023, arXiv 2307.08621.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        gate: str | None = "swish",
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        short_conv: int | None = None,
        **build: Any,
    ):
        self.rope_base = rope_base
        super().__init__(
            width,
            num_heads=num_heads,
            key_width=round(width * expand_k),
            value_width=round(width * expand_v),
            short_conv=short_conv,
            activation="identity",
            qk_norm=None,
            output_gate=gate,
            norm_eps=norm_eps,
            **build,
        )

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        return super().init_cache(batch, length, dtype) | {"index": jnp.zeros((), jnp.int32)}

    def gates(self, x, positions):
        log_decay = jnp.log1p(-(2.0 ** (-5 - jnp.arange(self.num_heads))))
        return jnp.broadcast_to(log_decay, (*x.shape[:2], self.num_heads)), None

    def heads(self, q, k, v, positions):
        rotate = lambda x: ops.apply_rotary(x, positions, theta=self.rope_base)  # noqa: E731
        return rotate(q), rotate(k), v


class DeltaNet(MatrixStateMixer):
    """The delta rule: each write first erases what its key reads; `beta = sigmoid(x W_b)`.

    Args:
      width: of the input and output.
      num_heads: H.
      expand_k, expand_v: widths of keys and values over `width`.
      short_conv, qk_norm, norm_eps: as in `MatrixStateMixer`.
      qk_activation: of q, k and v after the convolution, "silu" or "identity".
      beta: False writes with strength 1.
      allow_neg_eigval: doubles beta, so that a write may also flip what it erases.
      output_gate: whether a swish gate multiplies the output.

    Source: Yang et al., 2024, arXiv 2406.06484.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        short_conv: int | None = 4,
        qk_activation: str = "silu",
        qk_norm: str | None = "l2",
        beta: bool = True,
        allow_neg_eigval: bool = False,
        output_gate: bool = False,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        super().__init__(
            width,
            num_heads=num_heads,
            key_width=round(width * expand_k),
            value_width=round(width * expand_v),
            short_conv=short_conv,
            activation=qk_activation,
            qk_norm=qk_norm,
            output_gate="swish" if output_gate else None,
            norm_eps=norm_eps,
            **build,
        )
        self.strength = 2.0 if allow_neg_eigval else 1.0
        self.beta = Build(**build).linear(width, num_heads) if beta else nnx.data(None)

    def gates(self, x, positions):
        shape = *x.shape[:2], self.num_heads
        logits = None if self.beta is None else self.beta(x).astype(jnp.float32)
        beta = jnp.ones(shape) if logits is None else jax.nn.sigmoid(logits)
        return None, self.strength * beta


class GatedDeltaNet(DeltaNet):
    """The delta rule on a state that decays first: `log_decay = -A softplus(x W_a + dt)`.

    Args:
      width: of the input and output.
      num_heads: H.
      head_dim: of keys, by default `0.75 width / num_heads`.
      expand_v: the dimension of values over that of keys.
      short_conv, allow_neg_eigval, norm_eps: as in `DeltaNet`.
      output_gate: whether a swish gate multiplies the output.

    Source: Yang et al., 2024, arXiv 2412.06464.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 6,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        short_conv: int | None = 4,
        output_gate: bool = True,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        head_dim = max(1, 3 * width // (4 * num_heads)) if head_dim is None else head_dim
        expand_k = num_heads * head_dim / width
        super().__init__(
            width,
            num_heads=num_heads,
            expand_k=expand_k,
            expand_v=expand_k * expand_v,
            short_conv=short_conv,
            allow_neg_eigval=allow_neg_eigval,
            output_gate=output_gate,
            norm_eps=norm_eps,
            **build,
        )
        build = Build(**build)
        self.decay = build.linear(width, num_heads)
        self.log_a = build.param((num_heads,), log_uniform_a)
        self.dt_bias = build.param((num_heads,), inverse_softplus_dt)

    def gates(self, x, positions):
        step = jax.nn.softplus(self.decay(x).astype(jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.log_a[...]) * step, super().gates(x, positions)[1]


def log_uniform_a(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Logarithms of decay rates that are uniform up to 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1e-4, 16.0))


def inverse_softplus_dt(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What softplus takes to steps log-uniform in [1e-3, 0.1]."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))
