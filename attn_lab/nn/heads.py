"""Multi-head attention whose heads are shared, windowed, weighed or routed in other ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import attention_weights
from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention, identity
from attn_lab.nn.layers import Build, cache_mask, divide
from attn_lab.ops.heads import attend_in_parts, pick_heads


class DecoupledHeadAttention(MultiHeadAttention):
    """Multi-head attention whose query heads each name the key and the value head they read.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout and `num_kv_heads`.
      num_heads: query heads H.
      num_key_heads, num_value_heads: by default H / 2 (at least 1) and H.
      key_head, value_head: for every query head a key and a value head; by default blocks, as
        even as can be.

    Source: Chen et al., DHA, 2024, arXiv 2406.06567.
    """

    drops = False

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        num_value_heads: int | None = None,
        key_head: Sequence[int] | None = None,
        value_head: Sequence[int] | None = None,
        **arguments: Any,
    ):
        if arguments.get("num_kv_heads") is not None:
            raise ValueError("num_kv_heads: give num_key_heads and num_value_heads instead")
        self.num_key_heads = max(num_heads // 2, 1) if num_key_heads is None else num_key_heads
        self.num_value_heads = num_heads if num_value_heads is None else num_value_heads
        self.key_head = _map("key_head", key_head, num_heads, self.num_key_heads)
        self.value_head = _map("value_head", value_head, num_heads, self.num_value_heads)
        super().__init__(width, num_heads=num_heads, **arguments)

    @property
    def key_heads(self) -> int:
        return self.num_key_heads

    @property
    def value_heads(self) -> int:
        return self.num_value_heads

    def _attend(self, q, k, v, mask, rngs):
        return ops.decoupled_head_attention(q, k, v, self.key_head, self.value_head, mask=mask)

    def _scores(self, q, k, mask):
        return super()._scores(q, pick_heads(k, self.key_head, self.num_heads, "key_head"), mask)


def _map(name, heads, queries, count):
    """The given map of query heads, checked, or the default one."""
    if count < 1:
        raise ValueError(f"num_{name}s must be at least 1, got {count}")
    if heads is None:
        return tuple(h * count // queries for h in range(queries))
    if len(heads) != queries or not all(0 <= h < count for h in heads):
        raise ValueError(f"{name} must be {queries} integers of 0 to {count - 1}, got {heads}")
    return tuple(int(h) for h in heads)


class DifferentialQKVAttention(MultiHeadAttention):
    """Multi-head attention with fewer, perhaps narrower, keys than values, and a wider query.

    Queries go through two projections, `x W_1 W_2`, with `query_width` channels between.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout and `num_kv_heads`.
      num_heads: query heads H.
      num_key_heads, num_value_heads: divide H; by default H / 8 and H / 2 (at least 1).
      head_dim: of queries, by default `width / num_heads`.
      key_dim: of keys in the cache, by default `head_dim`; a narrower key is lifted by a map that
        heads share, which excludes `rope_theta`: the map and the rotation do not commute.
      query_width: by default `3 width / 2`.

    Source: Lin et al., Sigma, 2025, arXiv 2501.13629.
    """

    drops = False

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        key_dim: int | None = None,
        query_width: int | None = None,
        rope_theta: float | None = None,
        **arguments: Any,
    ):
        if arguments.get("num_kv_heads") is not None:
            raise ValueError("num_kv_heads: give num_key_heads and num_value_heads instead")
        self.num_key_heads = max(num_heads // 8, 1) if num_key_heads is None else num_key_heads
        divide(num_heads, self.num_key_heads, "number of query heads; num_key_heads:")
        if num_value_heads is None:
            num_value_heads = max(num_heads // 2, 1)
        head_dim = divide(width, num_heads) if head_dim is None else head_dim
        self.narrow_dim = head_dim if key_dim is None else key_dim
        if rope_theta is not None and self.narrow_dim != head_dim:
            raise ValueError(
                f"rope_theta needs key_dim = head_dim = {head_dim}, got {key_dim}: the map that "
                "lifts narrow keys does not commute with the rotation"
            )
        self.query_width = 3 * width // 2 if query_width is None else query_width
        super().__init__(
            width,
            num_heads=num_heads,
            num_kv_heads=num_value_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            **arguments,
        )
        build, shape = Build.of(arguments), (self.key_dim, head_dim)
        same = self.key_dim == head_dim
        self.key_up = nnx.data(None) if same else build.param(shape, build.kernel_init)

    @property
    def key_heads(self) -> int:
        return self.num_key_heads

    @property
    def key_dim(self) -> int:
        return self.narrow_dim

    def _make_projections(self, width, bias, out_bias, build):
        super()._make_projections(width, bias, out_bias, build)
        self.query = nnx.Sequential(
            build.linear(width, self.query_width, bias),
            build.linear(self.query_width, self.num_heads * self.head_dim, bias),
        )

    def _key_up(self, dtype):
        return None if self.key_up is None else self.key_up[...].astype(dtype)

    def _attend(self, q, k, v, mask, rngs):
        return ops.differential_qkv_attention(q, k, v, self._key_up(q.dtype), mask=mask)

    def _scores(self, q, k, mask):
        if self.key_up is not None:
            q = q @ self._key_up(q.dtype).T
        return super()._scores(q, k, mask)


class MixtureOfHeads(MultiHeadAttention):
    """Multi-head attention whose tokens weigh their heads: some always on, some of the others.

    Args:
      width, arguments: as `MultiHeadAttention`.
      num_heads: H, the shared heads first.
      num_shared_heads: heads that are always on, by default H / 4; a single one has no router.
      top_k: how many of the others a token uses, by default half of H, and at most all of them.

    Source: Jin et al., MoH, 2024, arXiv 2410.11842.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_shared_heads: int | None = None,
        top_k: int | None = None,
        **arguments: Any,
    ):
        super().__init__(width, num_heads=num_heads, **arguments)
        self.num_shared_heads = num_heads // 4 if num_shared_heads is None else num_shared_heads
        if not 0 <= self.num_shared_heads < num_heads:
            raise ValueError(
                f"num_shared_heads must be of 0 to {num_heads - 1}, got {num_shared_heads}"
            )
        routed = num_heads - self.num_shared_heads
        self.top_k = min(max(num_heads // 2, 1), routed) if top_k is None else top_k
        if not 1 <= self.top_k <= routed:
            raise ValueError(f"top_k must be of 1 to {routed}, the routed heads; got {top_k}")
        build = Build.of(arguments)
        build = dataclasses.replace(build, dtype=build.param_dtype)  # rounding changes the choice
        self.routed = build.linear(width, routed)
        none, shared = nnx.data(None), self.num_shared_heads
        self.shared = build.linear(width, shared) if shared > 1 else none
        self.balance = build.linear(width, 2) if shared else none

    def gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The factors of heads `[B, T, H]` that a call on `x` uses, and the loss that balances."""
        shared = balance = None
        if self.num_shared_heads:
            balance = self.balance(x)
            shared = jnp.zeros_like(balance[..., :1]) if self.shared is None else self.shared(x)
        return ops.mixture_of_heads_gates(self.routed(x), shared, balance, top_k=self.top_k)

    def balance_loss(self, x: jax.Array) -> jax.Array:
        """What evens out the routed heads over the tokens of `x`; the authors add 0.01 of it."""
        return self.gates(x)[1]

    def _project(self, heads, x):
        gates = self.gates(x)[0]
        return super()._project(heads * gates[..., None].astype(heads.dtype), x)


class MixtureOfAttentiveExperts(MultiHeadAttention):
    """Multi-head attention as a mixture of experts, each of which lacks one head.

    The gate is a tanh MLP of the mean of the tokens: if causal of those so far, otherwise of all
    of the segment. Training alternates between steps that update `gate_in` and `gate_out` alone
    and steps, with `sample_experts`, that update the rest.

    Args:
      width, arguments: as `MultiHeadAttention`; at least two heads.
      gate_width: hidden units of the gate.
      sample_experts: whether calls with `rngs` draw one expert a sequence instead of mixing them.

    Source: Peng et al., 2020, arXiv 2005.06537.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        gate_width: int = 256,
        sample_experts: bool = False,
        **arguments: Any,
    ):
        if num_heads < 2:
            raise ValueError(f"num_heads must be at least 2, got {num_heads}")
        super().__init__(width, num_heads=num_heads, **arguments)
        build = Build.of(arguments)
        self.sample_experts = sample_experts
        self.gate_in = build.linear(width, gate_width, True)
        self.gate_out = build.linear(gate_width, num_heads, True)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32):
        total = jnp.zeros((batch, self.gate_in.in_features + 1), jnp.float32)
        return {"total": total, **super().init_cache(batch, length, dtype)}

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        q, k, v, mask, new = self._inputs(x, segment_ids, cache)
        gates, total = self._gates(x, segment_ids, cache, rngs)
        heads = self._attend(q, k, v, mask, rngs) * gates[..., None].astype(v.dtype)
        y = self._project(heads, x)
        return y if cache is None else (y, {**new, "total": total})

    def gates(self, x: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        """The factors of heads, `[B, T, H]`, that a call on `x` uses."""
        return self._gates(x, segment_ids, None, None)[0]

    def _gates(self, x, segment_ids, cache, rngs):
        before = None if cache is None else cache["total"]
        mean, total = _means(x, segment_ids, before, self.causal)
        logits = self.gate_out(jnp.tanh(self.gate_in(mean)))
        if rngs is not None and self.sample_experts:
            noise = jax.random.gumbel(rngs.dropout(), (len(x), 1, self.num_heads), jnp.float32)
            drawn = jnp.argmax(logits + noise, -1)
            one = jax.nn.one_hot(drawn, self.num_heads, dtype=bool)
            logits = jnp.where(one, 0, -jnp.inf).astype(logits.dtype)
        return ops.leave_one_out_head_gates(logits), total


def _means(x, segment_ids, before, causal):
    """Means over the tokens of the segment (so far), and the sum and count after the last one."""
    wide = x.astype(jnp.result_type(x, jnp.float32))
    wide = jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], -1)
    change = jnp.zeros((len(x), x.shape[1] - 1), bool)
    if segment_ids is not None:
        change = segment_ids[:, 1:] != segment_ids[:, :-1]
    sums = _sums(wide, jnp.pad(change, ((0, 0), (1, 0))))
    if before is not None:
        sums = sums + before[:, None]
    if not causal:
        ends = jnp.pad(change, ((0, 0), (0, 1)))
        sums = sums + _sums(wide[:, ::-1], ends[:, ::-1])[:, ::-1] - wide
    return (sums[..., :-1] / sums[..., -1:]).astype(x.dtype), sums[:, -1]


def _sums(x, starts):
    """Running sums over axis 1, which begin anew at `starts`."""

    def join(a, b):
        (left, _), (right, anew) = a, b
        return jnp.where(anew, right, left + right), a[1] | anew

    return jax.lax.associative_scan(join, (x, starts[..., None]), axis=1)[0]


class LongShortAttention(MultiHeadAttention):
    """Multi-head attention of local heads, which see a window, and global ones, which see all.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      num_heads: H, the local heads first.
      num_local_heads: by default all but one.
      window: how many tokens a local head sees back, its own included (and, if not causal, as many
        ahead).

    Source: LS-attention, 2025, arXiv 2505.15548.
    """

    drops = False

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        num_local_heads: int | None = None,
        window: int = 100,
        **arguments: Any,
    ):
        super().__init__(width, num_heads=num_heads, **arguments)
        self.num_local_heads = num_heads - 1 if num_local_heads is None else num_local_heads
        if not 0 <= self.num_local_heads <= num_heads:
            raise ValueError(f"num_local_heads must be of 0 to {num_heads}, got {num_local_heads}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.local_window = window

    def state_bytes(self, length: int) -> int:
        local = self.num_local_heads // (self.num_heads // self.num_kv_heads)
        numbers = 4 * (self.key_dim + self.value_dim)
        window = min(length, self.local_window)
        return numbers * (local * window + (self.num_kv_heads - local) * length)

    def _inputs(self, x, segment_ids, cache):
        """The mask is a pair: of the local heads and of the global ones."""
        q, k, v, mask, new = super()._inputs(x, segment_ids, cache)
        back = self.local_window - 1
        if cache is None:
            near = ops.sliding_window_mask(back, 0 if self.causal else back)
        else:
            near = cache_mask(cache["index"], x.shape[1], k.shape[1], back)
        return q, k, v, (near if mask is None else near & mask, mask), new

    def _attend(self, q, k, v, mask, rngs):
        return attend_in_parts(q, k, v, self.num_local_heads, mask)

    def _scores(self, q, k, mask):
        k = jnp.repeat(k, self.num_heads // k.shape[2], 2)
        near, far = (attention_weights(q, k, mask=part, normalizer=identity) for part in mask)
        return jnp.concatenate([near[:, : self.num_local_heads], far[:, self.num_local_heads :]], 1)
