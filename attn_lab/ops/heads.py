"""How heads are shared, mixed, windowed and routed, around the same attention."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attn_kernels.attention import Mask
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.masks import as_mask, sliding_window_mask

__all__ = [
    "decoupled_head_attention",
    "differential_qkv_attention",
    "leave_one_out_head_gates",
    "long_short_attention",
    "merge_key_value_heads",
    "mix_heads",
    "mixture_of_heads_gates",
]


def merge_key_value_heads(x: jax.Array, weight: jax.Array, *, num_groups: int) -> jax.Array:
    """Weighted sums of the heads of every group: `y_g = sum_{h in group g} weight_h x_h`.

    Groups are blocks of `H / num_groups` heads. The weights `num_groups / H` give the mean. On
    keys and values, or on their projections as `[1, width, H, D]`, this makes grouped attention
    out of multi-head attention.

    Args:
      x: `[B, S, H, D]`.
      weight: `[H]`, or `[H, D]` for a weight a channel.
      num_groups: K, which divides H.

    Returns:
      `[B, S, K, D]` in the dtype of x.

    Raises:
      ValueError: if K does not divide H, or `weight` does not fit.

    Source: Chinnakonduru and Mohapatra, 2024, arXiv 2407.10855; the mean: Ainslie et al., 2023,
    arXiv 2305.13245.
    """
    batch, length, heads, dim = x.shape
    if num_groups < 1 or heads % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {heads} heads of x")
    if weight.shape not in ((heads,), (heads, dim)):
        raise ValueError(f"weight must be [{heads}] or [{heads}, {dim}], got {list(weight.shape)}")
    wide = _wide(x, weight)
    scaled = x.astype(wide) * weight.astype(wide).reshape(heads, -1)
    return scaled.reshape(batch, length, num_groups, -1, dim).sum(3).astype(x.dtype)


def mix_heads(x: jax.Array, weight: jax.Array, *, axis: int = 2) -> jax.Array:
    """A linear map across heads: `y_n = sum_h weight[n, h] x_h`.

    Args:
      x: `[B, T, H, D]`, or any array with H heads along `axis`.
      weight: `[N, H]`.
      axis: of the heads.

    Returns:
      `[B, T, N, D]` in the dtype of x.

    Raises:
      ValueError: if `weight` does not fit.

    Source: Shazeer et al., Talking-Heads Attention, 2020, arXiv 2003.02436.
    """
    if weight.ndim != 2 or weight.shape[1] != x.shape[axis]:
        raise ValueError(f"weight must be [N, {x.shape[axis]}], got {list(weight.shape)}")
    wide = _wide(x, weight)
    mixed = jnp.tensordot(x.astype(wide), weight.astype(wide), ((axis,), (1,)))
    return jnp.moveaxis(mixed, -1, axis).astype(x.dtype)


def decoupled_head_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_head: Sequence[int] | jax.Array,
    value_head: Sequence[int] | jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention in which every query head names the key head and the value head that it reads.

    `out_h = softmax(scale q_h k_{key_head[h]}^T) v_{value_head[h]}`.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, Kk, D]`; any number of heads.
      v: `[B, S, Kv, Dv]`; any number of heads.
      key_head, value_head: integers `[H]`.
      mask, causal, scale, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if a map has not one head for every query head, or names one that is not there.

    Source: Chen et al., DHA, 2024, arXiv 2406.06567.
    """
    k = pick_heads(k, key_head, q.shape[2], "key_head")
    v = pick_heads(v, value_head, q.shape[2], "value_head")
    part = dict(mask=mask, causal=causal, scale=scale, implementation=implementation)
    return dot_product_attention(q, k, v, **part)


def pick_heads(x: jax.Array, heads: Sequence[int] | jax.Array, count: int, name: str) -> jax.Array:
    """The named heads of `[B, S, K, D]`; ValueError under `name` if they are not `count` of them.

    The indices of a traced map cannot be checked; a head that is not there is then NaN.
    """
    traced = isinstance(heads, jax.core.Tracer)
    heads = heads if traced else np.asarray(heads)
    if heads.shape != (count,) or not jnp.issubdtype(heads.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers [{count}], got {heads.dtype}{list(heads.shape)}")
    if not traced and not ((heads >= 0) & (heads < x.shape[2])).all():
        raise ValueError(f"{name} must be of 0 to {x.shape[2] - 1}, got {heads.tolist()}")
    return jnp.take(x, jnp.asarray(heads), axis=2)


def differential_qkv_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_up: jax.Array | None = None,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with fewer, and perhaps narrower, key heads than value heads.

    `out_h = softmax(q_h (k_{h // (H / Kk)} key_up)^T / sqrt(Dk)) v_{h // (H / Kv)}`. The map meets
    the queries, so that keys stay narrow.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, Kk, Dk]`; Kk divides H, and Dk = D without `key_up`.
      v: `[B, S, Kv, Dv]`; Kv divides H.
      key_up: `[Dk, D]`, shared by the heads.
      mask, causal, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Lin et al., Sigma, 2025, arXiv 2501.13629.
    """
    if key_up is not None:
        if key_up.shape != (k.shape[-1], q.shape[-1]):
            wanted = [k.shape[-1], q.shape[-1]]
            raise ValueError(f"key_up must be [Dk, D] = {wanted}, got {list(key_up.shape)}")
        q = project("bthd,cd->bthc", q, key_up)
    scale = 1 / math.sqrt(k.shape[-1])
    part = dict(mask=mask, causal=causal, scale=scale, implementation=implementation)
    return dot_product_attention(q, k, v, **part)


def mixture_of_heads_gates(
    routed_logits: jax.Array,
    shared_logits: jax.Array | None = None,
    balance_logits: jax.Array | None = None,
    *,
    top_k: int,
) -> tuple[jax.Array, jax.Array]:
    """The factor of every head's output when tokens route to heads, and the loss that balances.

        p = softmax(routed);  r = top_k p sel / sum(p sel), sel the top_k largest p
        gates = [a_1 Hs softmax(shared), a_2 r],  a = 2 softmax(balance);  without shared: r
        loss = Hr^2 mean_e(mean_tokens p_e mean_tokens sel_e)

    Args:
      routed_logits: `[B, T, Hr]`.
      shared_logits: `[B, T, Hs]`, of heads that are always on, which come first.
      balance_logits: `[B, T, 2]`, of the shared and the routed heads.
      top_k: how many routed heads a token uses; ties go to the lower index.

    Returns:
      Gates `[B, T, Hs + Hr]` in the dtype of `routed_logits`, and the loss, a number in float32 or
      better.

    Raises:
      ValueError: if `top_k` is not of 1 to Hr, or one of the other logits comes alone.

    Source: Jin et al., MoH, 2024, arXiv 2410.11842.
    """
    heads = routed_logits.shape[-1]
    if not 1 <= top_k <= heads:
        raise ValueError(f"top_k must be of 1 to {heads}, the routed heads; got {top_k}")
    if (shared_logits is None) != (balance_logits is None):
        raise ValueError("shared_logits and balance_logits come together")
    wide = _wide(routed_logits)
    p = jax.nn.softmax(routed_logits.astype(wide), -1)
    chosen = jax.nn.one_hot(jax.lax.top_k(p, top_k)[1], heads, dtype=wide).sum(-2)
    gates = top_k * p * chosen / (p * chosen).sum(-1, keepdims=True)
    tokens = tuple(range(p.ndim - 1))
    loss = heads**2 * (p.mean(tokens) * chosen.mean(tokens)).mean()
    if shared_logits is not None:
        shared = shared_logits.shape[-1] * jax.nn.softmax(shared_logits.astype(wide), -1)
        a = 2 * jax.nn.softmax(balance_logits.astype(wide), -1)
        gates = jnp.concatenate([a[..., :1] * shared, a[..., 1:] * gates], -1)
    return gates.astype(routed_logits.dtype), loss


def leave_one_out_head_gates(logits: jax.Array) -> jax.Array:
    """Factors of heads that mix the experts "all heads but one": `H / (H - 1) (1 - softmax(l))`.

    Expert j is attention without head j, scaled by `H / (H - 1)`; the softmax weighs the experts.
    The factors sum to H.

    Args:
      logits: `[B, H]`, or with more axes before the last; at least two heads.

    Returns:
      The shape and dtype of `logits`.

    Raises:
      ValueError: if there is only one head.

    Source: Peng et al., A Mixture of h - 1 Heads is Better than h Heads, 2020, arXiv 2005.06537.
    """
    heads = logits.shape[-1]
    if heads < 2:
        raise ValueError(f"logits must be of at least two heads, got shape {logits.shape}")
    weights = jax.nn.softmax(logits.astype(_wide(logits)), -1)
    return (heads / (heads - 1) * (1 - weights)).astype(logits.dtype)


def long_short_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    num_local_heads: int,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    mask: Mask | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention whose first heads see a window of `window` tokens, and the others everything.

    Args:
      q, k, v, causal, scale, implementation: as in `dot_product_attention`.
      num_local_heads: how many heads are local, 0 to H.
      window: how many tokens a local head sees back, the query's own included; and as many ahead
        if not causal.
      mask: for all heads, as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if `num_local_heads` or `window` is out of range.

    Source: LS-attention, 2025, arXiv 2505.15548.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    mask = as_mask(mask, causal)
    near = sliding_window_mask(window - 1, 0 if causal else window - 1)
    masks = near if mask is None else near & mask, mask
    return attend_in_parts(
        q, k, v, num_local_heads, masks, scale=scale, implementation=implementation
    )


def attend_in_parts(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: int,
    masks: tuple[Mask | None, Mask | None],
    **keywords,
) -> jax.Array:
    """`dot_product_attention` with one mask for the `first` heads and one for the others.

    They are calls of their own, so that each skips what its mask leaves out.
    """
    heads = q.shape[2]
    if not 0 <= first <= heads:
        raise ValueError(f"num_local_heads must be of 0 to {heads}, got {first}")
    for name, x in ("k", k), ("v", v):
        if heads % x.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} heads, which do not divide the {heads} of q")
    shares = [heads // x.shape[2] for x in (k, v)]
    k, v = (jnp.repeat(x, n, 2) if first % n else x for x, n in zip((k, v), shares))
    parts = []
    for start, stop, mask in (0, first, masks[0]), (first, heads, masks[1]):
        if start < stop:
            own = (
                x[:, :, start * x.shape[2] // heads : stop * x.shape[2] // heads] for x in (k, v)
            )
            mask = _of_heads(mask, start, stop)
            parts.append(dot_product_attention(q[:, :, start:stop], *own, mask=mask, **keywords))
    return jnp.concatenate(parts, 2)


def _of_heads(mask: Mask | None, start: int, stop: int) -> Mask | None:
    """The pattern of some heads, numbered from 0."""
    if mask is None:
        return None
    own = tuple(x[:, start:stop] if x.shape[1] > 1 else x for x in mask.operands)
    return Mask(_From(mask.predicate, start), own)


@dataclasses.dataclass(frozen=True)
class _From:
    predicate: Callable
    first: int

    def __call__(self, b, h, *rest):
        return self.predicate(b, h + self.first, *rest)

    def tile(self, *ranges):
        return Mask(self.predicate).tile(*ranges)


def project(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum with sums in float32 or better, in the dtype of x."""
    wide = _wide(x, weight)
    return jnp.einsum(equation, x, weight, preferred_element_type=wide).astype(x.dtype)


def _wide(*arrays):
    return jnp.result_type(jnp.float32, *arrays)
