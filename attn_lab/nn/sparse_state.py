"""A token mixer whose state has more partitions than parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels import recurrence
from attn_lab import ops
from attn_lab.nn.layers import Build, Mixer, divide, l2_norm, split_heads
from attn_lab.nn.recurrent import inverse_softplus_dt, log_uniform_a


class _ChannelGates(nnx.Module):
    """`logsigmoid((x W_1) W_2 + b) / normalizer` per key channel, and no write strength."""

    def __init__(self, width, num_heads, head_dim, *, low_rank, normalizer, build):
        self.num_heads, self.normalizer = num_heads, normalizer
        self.down = build.linear(width, low_rank)
        self.up = build.linear(low_rank, num_heads * head_dim, True)

    def __call__(self, x):
        logits = split_heads(self.up(self.down(x)).astype(jnp.float32), self.num_heads)
        return jax.nn.log_sigmoid(logits) / self.normalizer, None


class _HeadGates(nnx.Module):
    """`-A softplus(x W_a + dt)` and `sigmoid(x W_b)` per head."""

    def __init__(self, width, num_heads, *, build):
        self.decay, self.beta = build.linear(width, num_heads), build.linear(width, num_heads)
        self.log_a = build.param((num_heads,), log_uniform_a)
        self.dt_bias = build.param((num_heads,), inverse_softplus_dt)

    def __call__(self, x):
        step = jax.nn.softplus(self.decay(x).astype(jnp.float32) + self.dt_bias[...])
        return -jnp.exp(self.log_a[...]) * step, jax.nn.sigmoid(self.beta(x).astype(jnp.float32))


class SSE(Mixer):
    """Linear attention with one state that all tokens share and several that a router picks from.

    `y = W_o(norm(o) silu(x W_g))` per head, where o is the sum of gated linear attention and of
    `sparse_state_expansion`. Both read the values `silu(x W_v)`; the queries and keys of the second
    have a correction of low rank, and gates of their own.

    Args:
      width: of the input and output.
      num_heads: H.
      head_dim: of keys and values, by default `width / num_heads`.
      num_partitions: N, states that the router chooses from.
      num_write, num_read: how many states a token writes and reads.
      base: "gla": gates per key channel, queries `silu`, keys `softmax`; "gdn": the gated delta
        rule, one gate and write strength a head, queries and keys `silu` of norm 1.
      low_rank: of the corrections of queries and keys, by default `head_dim`.
      gate_low_rank, gate_logit_normalizer: of the gates of "gla", as in `GatedLinearAttention`.
      norm_eps: of the RMS norm of a head's output.
      build: keywords of `Build`.

    Source: Scaling Linear Attention with Sparse State Expansion, 2025, arXiv 2507.16577.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        num_partitions: int = 4,
        num_write: int = 1,
        num_read: int = 1,
        base: str = "gla",
        low_rank: int | None = None,
        gate_low_rank: int = 16,
        gate_logit_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
        **build: Any,
    ):
        if base not in ("gla", "gdn"):
            raise ValueError(f"base must be 'gla' or 'gdn', got {base!r}")
        for name, count in ("num_write", num_write), ("num_read", num_read):
            if not 1 <= count <= num_partitions:
                raise ValueError(f"{name} must be between 1 and {num_partitions}, got {count}")
        build = Build(**build)
        self.base, self.num_heads, self.num_partitions = base, num_heads, num_partitions
        self.num_write, self.num_read = num_write, num_read
        self.head_dim = divide(width, num_heads) if head_dim is None else head_dim
        inner = num_heads * self.head_dim
        rank = self.head_dim if low_rank is None else low_rank
        self.qkv = build.linear(width, 3 * inner)
        self.query_down, self.query_up = build.linear(width, rank), build.linear(rank, inner)
        self.key_down, self.key_up = build.linear(width, rank), build.linear(rank, inner)
        if base == "gla":
            part = dict(low_rank=gate_low_rank, normalizer=gate_logit_normalizer, build=build)
            gates = [_ChannelGates(width, num_heads, self.head_dim, **part) for _ in range(2)]
        else:
            gates = [_HeadGates(width, num_heads, build=build) for _ in range(2)]
        self.shared_gates, self.routed_gates = gates
        self.router = build.linear(width, num_partitions)
        self.head_norm = build.rms_norm(self.head_dim, norm_eps)
        self.output_gate = build.linear(width, inner)
        self.out = build.output(inner, width)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        shape = self.num_heads, self.head_dim, self.head_dim
        return {
            "shared": jnp.zeros((batch, *shape), jnp.float32),
            "routed": jnp.zeros((batch, self.num_partitions, *shape), jnp.float32),
        }

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids and cache exclude each other: decode one document a row")
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        v = split_heads(jax.nn.silu(v), self.num_heads)
        log_decay, beta = self.shared_gates(x)
        shared, shared_state = recurrence.linear_attention(
            *self._activated(q, k),
            v,
            log_decay=log_decay,
            beta=beta,
            initial_state=None if cache is None else cache["shared"],
            return_state=True,
            segment_ids=segment_ids,
        )
        log_decay, beta = self.routed_gates(x)
        queries, keys = q + self.query_up(self.query_down(x)), k + self.key_up(self.key_down(x))
        routed, routed_state = ops.sparse_state_expansion(
            *self._activated(queries, keys),
            v,
            log_decay,
            self.router(x),
            num_write=self.num_write,
            num_read=self.num_read,
            initial_state=None if cache is None else cache["routed"],
            return_state=True,
            beta=beta,
            segment_ids=segment_ids,
        )
        y = self.head_norm(shared + routed).reshape(*x.shape[:2], -1)
        y = self.out((y * jax.nn.silu(self.output_gate(x))).astype(x.dtype))
        return y if cache is None else (y, {"shared": shared_state, "routed": routed_state})

    def _activated(self, q, k):
        q, k = (split_heads(part, self.num_heads) for part in (q, k))
        if self.base == "gla":
            wide = k.astype(jnp.result_type(k, jnp.float32))
            return jax.nn.silu(q), jax.nn.softmax(wide, -1).astype(k.dtype)
        return l2_norm(jax.nn.silu(q)), l2_norm(jax.nn.silu(k))

    def balance_loss(self, x: jax.Array) -> jax.Array:
        """The loss that spreads writes over the states: 1 if they are even, N if all go to one.

        It is `N / num_write sum_n mean_t(e_tn) mean_t(w_tn)`, e the shares of the router and w
        whether it picks a state to be written.
        """
        shares = jax.nn.softmax(self.router(x).astype(jnp.float32), -1)
        count = self.num_write
        picked = ops.row_sparse_key(self.router(x).astype(jnp.float32), top_k=count) > 0
        both = shares.mean((0, 1)) * picked.mean((0, 1))
        return self.num_partitions / count * both.sum()
