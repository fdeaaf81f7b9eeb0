"""Attention with few projections: heads share them, or take the tokens as they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import Build, append, divide, fan_in, split_heads
from attn_lab.ops.heads import project


class LeanAttention(MultiHeadAttention):
    """Multi-head attention without a value projection, and perhaps without a key projection.

    Args:
      width, arguments: as `MultiHeadAttention`, without `num_kv_heads`, `head_dim`, `value_dim`.
      num_heads: H, which divides the width; by default 4 if optimised, otherwise 1.
      kind: "optimised" has keys of its own, "efficient" takes the tokens as keys too, and "super"
        mixes the values along the sequence by a learned matrix of positions as well.
      context: the length of that matrix. Without causality all calls must be of that length; with
        it, where the matrix is lower triangular, of at most that length.
      out_bias: of the output projection.

    Raises:
      ValueError: if the kind is unknown, or "super" has no `context`, or has `rope_theta` or
        `qk_norm`; and for calls of a length that it does not have.

    Source: Hosseini and Hosseini, 2024, arXiv 2403.01643.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int | None = None,
        kind: str = "optimised",
        context: int | None = None,
        out_bias: bool = True,
        **arguments: Any,
    ):
        if kind not in ("optimised", "efficient", "super"):
            raise ValueError(f"kind must be 'optimised', 'efficient' or 'super', got {kind!r}")
        for name in ("num_kv_heads", "head_dim", "value_dim"):
            if arguments.get(name) is not None:
                raise ValueError(f"{name} is not free: heads are slices of the width")
        self.kind = kind
        if num_heads is None:
            num_heads = 4 if kind == "optimised" else 1
        super().__init__(width, num_heads=num_heads, out_bias=out_bias, **arguments)
        plain = self.rope_theta is None and self.query_norm is None
        self.tied = kind == "efficient" and plain
        self.align = nnx.data(None)
        if kind == "super":
            if context is None:
                raise ValueError("kind='super' needs context, the length of its matrix")
            if not plain:
                raise ValueError("kind='super' has positions: without rope_theta and qk_norm")
            build = Build.of(arguments)
            self.align = build.param((context, context), fan_in)

    def _make_projections(self, width, bias, out_bias, build):
        self.query = build.linear(width, width, bias)
        own = self.kind == "optimised"
        self.key = build.linear(width, width, bias) if own else nnx.data(None)
        self.out = build.output(width, width, out_bias)

    def _heads(self, x, segment_ids, cache):
        q, values = self.query(x), x
        x = x.astype(q.dtype)
        k = x if self.key is None else self.key(x)
        if self.align is not None:
            values = self._aligned(x, segment_ids, cache)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, values.astype(q.dtype)))
        return q, k, v, {}

    def _aligned(self, x, segment_ids, cache):
        """The values of these tokens: of every position a mix of those (before) it."""
        (context, _), (batch, length, width) = self.align.shape, x.shape
        if length > context or (not self.causal and length != context):
            limit = "at most" if self.causal else "exactly"
            raise ValueError(f"kind='super' takes {limit} context={context} tokens, got {length}")
        align = self.align[...].astype(x.dtype)
        align = jnp.tril(align) if self.causal else align
        if cache is not None:
            seen = append(cache["key"], split_heads(x, self.num_heads), cache["index"])
            seen = seen.reshape(batch, -1, width)[:, :context].astype(x.dtype)
            here = cache["index"] + jnp.arange(length)
            rows = jnp.take(align, here, 0, mode="fill", fill_value=jnp.nan)
            return project("bsm,ts->btm", seen, rows[:, : seen.shape[1]])
        if segment_ids is None:
            return project("bsm,ts->btm", x, align[:length, :length])
        here = _within(segment_ids)
        same = segment_ids[:, :, None] == segment_ids[:, None]
        own = jnp.where(same, align[here[:, :, None], here[:, None]], 0)
        return project("bsm,bts->btm", x, own)


def _within(segment_ids):
    """Positions counted from the start of each segment."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    change = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(change, index, 0), 1)


class HeadEmbeddingAttention(MultiHeadAttention):
    """Multi-head attention whose heads share one projection each of queries, keys and values.

    Heads differ by embeddings. Without `rope_theta` an added embedding of keys shifts all scores
    of a row alike, which has no effect.

    Args:
      width, arguments: as `MultiHeadAttention`.
      mode: "multiply" or "add", as in `ops.head_embedding`.

    Source: Xue and Aletras, Pit One Against Many, 2023, arXiv 2310.07911.
    """

    def __init__(self, width: int, *, mode: str = "multiply", **arguments: Any):
        if mode not in ("add", "multiply"):
            raise ValueError(f"mode must be 'add' or 'multiply', got {mode!r}")
        self.mode = mode
        super().__init__(width, **arguments)
        build, normal = Build.of(arguments), nnx.initializers.normal(0.02)
        self.query_embedding = build.param((self.query_heads, self.head_dim), normal)
        self.key_embedding = build.param((self.key_heads, self.key_dim), normal)
        self.value_embedding = build.param((self.value_heads, self.value_dim), normal)

    def _make_projections(self, width, bias, out_bias, build):
        self.query = build.linear(width, self.head_dim, bias)
        self.key = build.linear(width, self.key_dim, bias)
        self.value = build.linear(width, self.value_dim, bias)
        self.out = build.output(self.num_heads * self.value_dim, width, out_bias)

    def _heads(self, x, segment_ids, cache):
        shared = self.query(x), self.key(x), self.value(x)
        embeddings = self.query_embedding, self.key_embedding, self.value_embedding
        q, k, v = (
            ops.head_embedding(part, e[...], mode=self.mode) for part, e in zip(shared, embeddings)
        )
        return q, k, v, {}


class SimilaritySelfAttention(MultiHeadAttention):
    """Attention of tokens over tokens as they are, by one matrix a head; the heads are summed.

    Args:
      width: of the input and output.
      num_heads: H.
      symmetric: whether the similarity of two tokens is the same both ways.
      rank: of symmetric similarities, by default `width / num_heads`.
      projected: whether an output projection of all heads takes the place of their sum.
      rope_theta, rotary_dim, causal, window, dropout: as `MultiHeadAttention`.
      build: keywords of `Build`.

    Source: Reducing the Transformer Architecture to a Minimum, 2024, arXiv 2410.13732.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        symmetric: bool = False,
        rank: int | None = None,
        projected: bool = False,
        rope_theta: float | None = None,
        rotary_dim: int | None = None,
        causal: bool = True,
        window: int | None = None,
        dropout: float = 0.0,
        **build: Any,
    ):
        if rank is not None and not symmetric:
            raise ValueError(f"rank={rank} needs symmetric=True: others are of full rank")
        self.symmetric, self.projected = symmetric, projected
        self.rank = divide(width, num_heads) if symmetric and rank is None else rank or width
        super().__init__(
            width,
            num_heads=num_heads,
            num_kv_heads=1,
            head_dim=width,
            rope_theta=rope_theta,
            rotary_dim=rotary_dim,
            causal=causal,
            window=window,
            dropout=dropout,
            **build,
        )
        self.tied = rope_theta is None

    def _make_projections(self, width, bias, out_bias, build):
        self.similarity = build.linear(width, self.num_heads * self.rank)
        wide = self.num_heads * width
        self.out = build.output(wide, width) if self.projected else nnx.data(None)

    def matrices(self) -> jax.Array:
        """The similarities as `ops.similarity_self_attention` takes them, `[H, width, ...]`."""
        return jnp.swapaxes(split_heads(self.similarity.kernel[...], self.num_heads), 0, 1)

    def _heads(self, x, segment_ids, cache):
        q = split_heads(self.similarity(x), self.num_heads)
        if self.symmetric:  # tokens stay the keys, of which the cache has but one head
            q = project("bthr,hmr->bthm", q, self.matrices().astype(q.dtype))
        x = x[:, :, None].astype(q.dtype)
        return q, x, x, {}

    def _project(self, heads, x):
        return heads.sum(2) if self.out is None else super()._project(heads, x)


class LowRankAttentionPooling(nnx.Module):
    """One vector out of a sequence: `[B, T, width]` to `[B, num_heads * width]`.

    Args:
      width: of the tokens.
      num_heads: means of the tokens.
      rank: of the scores.
      context: what the scores compare with: "learned", or the "mean" or the "last" of the tokens.
      build: keywords of `Build`.

    Source: Mehta et al., LAMA, 2019, arXiv 1912.00835.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        rank: int = 16,
        context: str = "learned",
        **build: Any,
    ):
        if context not in ("learned", "mean", "last"):
            raise ValueError(f"context must be 'learned', 'mean' or 'last', got {context!r}")
        build = Build(**build)
        self.context = context
        own = context == "learned"
        normal = nnx.initializers.normal(1.0)
        self.vector = build.param((width,), normal) if own else nnx.data(None)
        self.token = build.param((width, rank), build.kernel_init)
        self.compare = build.param((width, rank), build.kernel_init)
        self.head = build.param((rank, num_heads), build.kernel_init)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """`mask`, bool `[B, T]`, is False at tokens that do not count."""
        allowed = jnp.ones(x.shape[:2], bool) if mask is None else mask
        if self.context == "mean":
            count = jnp.maximum(allowed.sum(1), 1)[:, None]
            context = (jnp.where(allowed[..., None], x, 0).sum(1) / count).astype(x.dtype)
        elif self.context == "last":
            last = x.shape[1] - 1 - jnp.argmax(allowed[:, ::-1], 1)
            context = x[jnp.arange(len(x)), last]
        else:
            context = jnp.broadcast_to(self.vector[...].astype(x.dtype), (len(x), x.shape[-1]))
        weights = (part[...].astype(x.dtype) for part in (self.token, self.compare, self.head))
        pooled = ops.low_rank_attention_pooling(x, context, *weights, mask=mask)
        return pooled.reshape(len(x), -1)
