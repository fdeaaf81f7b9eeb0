"""Attention whose weights come from another stream than its output: layout, or an encoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_kernels.attention import attention_weights, normalize, softmax
from attn_lab import ops
from attn_lab.nn.layers import Build, divide, split_heads


class SkimAttention(nnx.Module):
    """Attention weights of a layout alone, which all layers share: `softmax(l W_q (l W_k)^T)`.

    The scores are over `sqrt(D)`. A call takes `layout [B, T, layout_width]`, and `segment_ids`
    `[B, T]` to keep documents (or padding) apart, and returns weights `[B, H, T, T]`.

    Args:
      layout_width: of the layout stream.
      num_heads: H.
      head_dim: D, by default `layout_width / num_heads`.
      causal: whether a token sees its past alone.
      bias: of the projections.
      build: keywords of `Build`.

    Raises:
      ValueError: if `num_heads` does not divide the width and there is no `head_dim`.

    Source: Nguyen et al., 2021, arXiv 2109.01078.
    """

    def __init__(
        self,
        layout_width: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        **build: Any,
    ):
        build = Build(**build)
        head_dim = divide(layout_width, num_heads) if head_dim is None else head_dim
        self.num_heads, self.causal = num_heads, causal
        self.query = build.linear(layout_width, num_heads * head_dim, bias)
        self.key = build.linear(layout_width, num_heads * head_dim, bias)

    def __call__(self, layout: jax.Array, *, segment_ids: jax.Array | None = None) -> jax.Array:
        mask = ops.causal_mask() if self.causal else None
        if segment_ids is not None:
            segments = ops.segment_mask(segment_ids)
            mask = segments if mask is None else mask & segments
        q, k = (split_heads(part(layout), self.num_heads) for part in (self.query, self.key))
        return attention_weights(q, k, mask=mask)


class SkimLayer(nnx.Module):
    """Values of the text, averaged with weights given from outside: `concat_h(A_h x W_v) W_o`.

    A call takes `x [B, T, width]` and weights `[B, H, T, T]`; residual and norms stay outside.

    Args:
      width: of the input and output.
      num_heads: H.
      value_dim: of a head, by default `width / num_heads`.
      bias: of the projections.
      build: keywords of `Build`.

    Raises:
      ValueError: if the weights have other heads, or `num_heads` does not divide the width and
        there is no `value_dim`.

    Source: Nguyen et al., 2021, arXiv 2109.01078.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int = 4,
        value_dim: int | None = None,
        bias: bool = False,
        **build: Any,
    ):
        build = Build(**build)
        value_dim = divide(width, num_heads) if value_dim is None else value_dim
        self.num_heads = num_heads
        self.value = build.linear(width, num_heads * value_dim, bias)
        self.out = build.output(num_heads * value_dim, width, bias)

    def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        if weights.shape[1] != self.num_heads:
            raise ValueError(
                f"weights {weights.shape} must have {self.num_heads} heads, [B, H, T, T]"
            )
        v = split_heads(self.value(x), self.num_heads)
        y = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)
        return self.out(y.reshape(*y.shape[:2], -1))


class PredictedCenter(nnx.Module):
    """The place that a decoder state looks at: `p_t = S sigmoid(v^T tanh(W h_t))`.

    A call takes `h [B, T, width]` and the length S, an integer or `[B]`, and returns
    `[B, T, H]`: the centres of `ops.gaussian_local_attention`.

    Args:
      width: of the states.
      hidden: outputs of W, by default `width`.
      num_heads: H.
      build: keywords of `Build`.

    Source: Luong et al., 2015, arXiv 1508.04025.
    """

    def __init__(self, width: int, *, hidden: int | None = None, num_heads: int = 1, **build: Any):
        build = Build(**build)
        hidden = width if hidden is None else hidden
        self.hidden = build.linear(width, hidden)
        self.place = build.linear(hidden, num_heads)

    def __call__(self, h: jax.Array, length: int | jax.Array) -> jax.Array:
        share = jax.nn.sigmoid(_wide(self.place(jnp.tanh(self.hidden(h)))))
        return jnp.reshape(length, (-1, 1, 1)) * share


class LuongAttention(nnx.Module):
    """Decoder states read encoder states, all or a window: `tanh(W_c [c_t; h_t])`.

    `c_t = sum_j w_tj m_j` with `w_t = softmax(score(h_t, m))`, over all keys or those with
    `|j - p_t| <= half_width`. The predicted window multiplies the weights by
    `exp(-(j - p_t)^2 / (2 sigma^2))`, `sigma = half_width / 2`, and does not normalise again.

    Args:
      width: of the decoder states and the output.
      memory_width: of the encoder states, by default `width`.
      method: "dot", "general", "concat" or "location", as in `ops.luong_scores`.
      local: "none" (all keys), "monotonic" (`p_t = t`) or "predicted" (by `PredictedCenter`).
      half_width: of the window.
      hidden: channels of "concat" and of the predicted place, by default `width`.
      max_keys: the most encoder states that "location" can score; it needs one.
      build: keywords of `Build`.

    Raises:
      ValueError: on an unknown method or window, widths that "dot" cannot multiply, "location"
        without `max_keys` or with more keys, or a half width of 0 or less.

    Source: Luong et al., 2015, arXiv 1508.04025.
    """

    def __init__(
        self,
        width: int,
        *,
        memory_width: int | None = None,
        method: str = "general",
        local: str = "none",
        half_width: float = 10,
        hidden: int | None = None,
        max_keys: int | None = None,
        **build: Any,
    ):
        memory_width = width if memory_width is None else memory_width
        hidden = width if hidden is None else hidden
        shapes = {
            "dot": None,
            "general": (width, memory_width),
            "concat": (width + memory_width, hidden),
            "location": (width, max_keys),
        }
        if method not in shapes:
            raise ValueError(f"method must be one of {', '.join(shapes)}, got {method!r}")
        if local not in ("none", "monotonic", "predicted"):
            raise ValueError(f"local must be 'none', 'monotonic' or 'predicted', got {local!r}")
        if half_width <= 0:
            raise ValueError(f"half_width must be positive, got {half_width}")
        if method == "dot" and memory_width != width:
            raise ValueError(f"memory_width={memory_width} must be width={width} for method 'dot'")
        if method == "location" and max_keys is None:
            raise ValueError("max_keys must be a number for method 'location', got None")
        made, none = Build(**build), nnx.data(None)
        self.method, self.local, self.half_width = method, local, half_width
        init = made.kernel_init
        self.score = none if method == "dot" else made.param(shapes[method], init)
        concat = method == "concat"
        self.score_out = made.param((hidden, 1), init) if concat else none
        predicted = local == "predicted"
        self.center = PredictedCenter(width, hidden=hidden, **build) if predicted else none
        self.out = made.output(memory_width + width, width)

    def __call__(
        self,
        h: jax.Array,
        memory: jax.Array,
        *,
        mask: jax.Array | None = None,
        start: int | jax.Array = 0,
    ) -> jax.Array:
        """Attentional states `[B, T, width]`.

        Args:
          h: decoder states `[B, T, width]`.
          memory: encoder states `[B, S, memory_width]`.
          mask: bool `[B, S]`, True at encoder states that are not padding; these come first.
          start: the step t of the first decoder state, for the monotonic window.
        """
        weights = self.weights(h, memory, mask=mask, start=start).astype(memory.dtype)
        context = jnp.einsum("bts,bsd->btd", weights[:, 0], memory)
        return jnp.tanh(self.out(jnp.concatenate([context, h], -1)))

    def weights(
        self,
        h: jax.Array,
        memory: jax.Array,
        *,
        mask: jax.Array | None = None,
        start: int | jax.Array = 0,
    ) -> jax.Array:
        """The weights `[B, 1, T, S]` of a call; arguments as there."""
        (batch, steps), keys = h.shape[:2], memory.shape[1]
        w, v = (None if p is None else p[...].astype(h.dtype) for p in (self.score, self.score_out))
        v = None if v is None else v[:, 0]
        scores = ops.luong_scores(h, memory, method=self.method, w=w, v=v)[:, None]
        allowed = jnp.ones((batch, 1, 1, keys), bool) if mask is None else mask[:, None, None]
        distance = jnp.arange(keys)
        if self.local == "monotonic":
            distance = distance - (start + jnp.arange(steps))[:, None]
        elif self.local == "predicted":
            center = self.center(h, keys if mask is None else mask.sum(-1))
            distance = distance - jnp.swapaxes(center, 1, 2)[..., None]
        if self.local != "none":
            allowed = allowed & (jnp.abs(distance) <= self.half_width)
        weights = normalize(jnp.where(allowed, scores, -jnp.inf), softmax)
        if self.local == "predicted":
            weights = weights * jnp.exp(-2 * (distance / self.half_width) ** 2)
        return weights


def _wide(x):
    return x.astype(jnp.result_type(x, jnp.float32))
