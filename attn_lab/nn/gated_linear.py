"""Linear attention whose state decays by gates of the input."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels import recurrence
from attn_kernels.recurrence.segments import boundaries
from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, divide, split_heads
from attn_lab.nn.recurrent import MatrixStateMixer

LOWEST = -1e30  # below all keys; differences of it stay finite


class GatedLinearAttention(MatrixStateMixer):
    """Linear attention whose state decays by a gate of the input, per key channel or per head.

    `log_decay = logsigmoid((x W_1) W_2 + b_2) / gate_logit_normalizer`.

    Args:
      width: of the input and output.
      num_heads: H.
      expand_k, expand_v: widths of keys and values over `width`.
      gate: "channel", or "scalar" (one decay a head).
      gate_low_rank: the rank of the gate's projection.
      gate_logit_normalizer: divides the log of the gate.
      output_gate, short_conv, qk_norm, activation, norm_eps: as in `MatrixStateMixer`.
      learned_initial_state: as there; training it alone adapts a frozen model.

    Source: Yang et al., 2023, arXiv 2312.06635; the initial state: Lina-Speech, 2024, arXiv
    2410.23320.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate: str = "channel",
        gate_low_rank: int = 16,
        gate_logit_normalizer: float = 16.0,
        output_gate: str | None = "swish",
        short_conv: int | None = None,
        qk_norm: str | None = None,
        activation: str = "identity",
        norm_eps: float = 1e-5,
        learned_initial_state: bool = False,
        **build: Any,
    ):
        if gate not in ("channel", "scalar"):
            raise ValueError(f"gate must be 'channel' or 'scalar', got {gate!r}")
        key_width = round(width * expand_k)
        super().__init__(
            width,
            num_heads=num_heads,
            key_width=key_width,
            value_width=round(width * expand_v),
            short_conv=short_conv,
            activation=activation,
            qk_norm=qk_norm,
            output_gate=output_gate,
            norm_eps=norm_eps,
            learned_initial_state=learned_initial_state,
            **build,
        )
        build = Build(**build)
        self.gate, self.gate_logit_normalizer = gate, gate_logit_normalizer
        self.gate_in = build.linear(width, gate_low_rank)
        self.gate_out = build.linear(
            gate_low_rank, key_width if gate == "channel" else num_heads, True
        )

    def gates(self, x, positions):
        logits = self.gate_out(self.gate_in(x)).astype(jnp.float32)
        log_decay = jax.nn.log_sigmoid(logits) / self.gate_logit_normalizer
        return split_heads(log_decay, self.num_heads) if self.gate == "channel" else log_decay, None


class ReGLA(Mixer):
    """Gated linear attention of exponential features whose gate does not saturate, normed per head.

    `S_t = Diag(f_t) S_{t-1} + exp(k_t) v_t^T` with `f_t = refined_gate(g_t, r_t)`, and the output
    is `LayerNorm(S_t^T exp(q_t - max q_t)) W_o`. What is kept is `S_t exp(-m_t)`, where m is the
    greatest key entry of the head so far: it only scales the outputs, of which the norm takes it
    off. `ops.refined_gated_linear_attention` uses the maximum over the whole sequence, which looks
    ahead.

    Args:
      width: of the input and output.
      num_heads: H, which divides the width.
      norm_eps: of the layer norm of a head's output.
      build: keywords of `Build`. The bias of the gate is first 1, that of the refining gate 0.

    Source: Lu et al., ReGLA, 2025, arXiv 2502.01578.
    """

    def __init__(self, width: int, *, num_heads: int = 4, norm_eps: float = 1e-5, **build: Any):
        build = Build(**build)
        self.num_heads, self.head_dim = num_heads, divide(width, num_heads)
        self.qkv = build.linear(width, 3 * width)
        self.gates = build.linear(width, 2 * width)
        self.gate_bias = build.param((width,), nnx.initializers.ones)
        self.refine_bias = build.param((width,), nnx.initializers.zeros)
        self.norm = build.layer_norm(self.head_dim, norm_eps)
        self.out = build.output(width, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        shape = batch, self.num_heads, self.head_dim, self.head_dim
        peak = jnp.full((batch, 1, self.num_heads, 1), LOWEST, jnp.float32)
        return {"state": jnp.zeros(shape, jnp.float32), "peak": peak}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        q, k, v = (split_heads(part, self.num_heads) for part in jnp.split(self.qkv(x), 3, -1))
        gate, refine = jnp.split(self.gates(x).astype(jnp.float32), 2, -1)
        logits = gate + self.gate_bias[...], refine + self.refine_bias[...]
        log_decay = ops.log_refined_gate(*(split_heads(part, self.num_heads) for part in logits))
        k = k.astype(jnp.float32)
        highest = jax.lax.stop_gradient(k).max(-1, keepdims=True)
        start = jnp.full_like(highest[:, :1], LOWEST) if cache is None else cache["peak"]
        peaks = _running_max(start, highest, segment_ids)
        y, state = recurrence.linear_attention(
            ops.safe_exp_feature_map(q, axes=-1),
            jnp.exp(k - jnp.maximum(peaks[:, 1:], highest)),  # the peak passes over padding
            v,
            log_decay=log_decay + jnp.minimum(peaks[:, :-1] - peaks[:, 1:], 0),
            scale=1 / (math.e * math.sqrt(self.head_dim * (math.e**2 - 1))),
            initial_state=None if cache is None else cache["state"],
            return_state=True,
            segment_ids=segment_ids,
        )
        y = self.norm(y).reshape(x.shape)
        y = self.out(y.astype(x.dtype))
        return y if cache is None else (y, {"state": state, "peak": peaks[:, -1:]})


def _running_max(start, x, segment_ids):
    """`start`, and at every position the greatest x since then or since its segment began."""
    if segment_ids is None:
        return jax.lax.cummax(jnp.concatenate([start, x], 1), axis=1)
    starts, real = (y[..., None, None] for y in boundaries(segment_ids, x.shape[:2]))

    def join(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    pairs = starts, jnp.where(real, x, LOWEST)
    return jnp.concatenate([start, jax.lax.associative_scan(join, pairs, axis=1)[1]], 1)
