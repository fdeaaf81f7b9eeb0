"""Multi-head attention with fewer heads out of a trained one, by sums of its projections."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.heads import DecoupledHeadAttention


def group_heads(
    mixer: MultiHeadAttention,
    num_kv_heads: int,
    key_weight: jax.Array | None = None,
    value_weight: jax.Array | None = None,
) -> MultiHeadAttention:
    """Grouped attention out of multi-head attention: every key and value head a sum of a block.

    Args:
      mixer: of K key and value heads; it stays as it is.
      num_kv_heads: of the result, which divides K.
      key_weight, value_weight: of the heads in the sums, `[K]` or `[K, D]` as in
        `ops.merge_key_value_heads`; by default all `num_kv_heads / K`, the mean.

    Returns:
      A new module.

    Raises:
      ValueError: if `mixer` is a subclass, or numbers do not fit.

    Source: Ainslie et al., 2023, arXiv 2305.13245; weighted: 2024, arXiv 2407.10855.
    """
    _check(mixer)
    heads = mixer.num_kv_heads
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must divide the {heads} of the mixer")
    mean = jnp.full(heads, num_kv_heads / heads)
    grouped = nnx.clone(mixer)
    merge = functools.partial(ops.merge_key_value_heads, num_groups=num_kv_heads)
    _apply(grouped.key, heads, merge, mean if key_weight is None else key_weight)
    _apply(grouped.value, heads, merge, mean if value_weight is None else value_weight)
    grouped.num_kv_heads = num_kv_heads
    return grouped


def decouple_heads(
    mixer: MultiHeadAttention,
    key_mix: jax.Array,
    value_mix: jax.Array,
    key_head: Sequence[int],
    value_head: Sequence[int],
) -> DecoupledHeadAttention:
    """Decoupled-head attention out of multi-head attention: fused heads are sums of its heads.

    Args:
      mixer: of K key and value heads; it stays as it is.
      key_mix, value_mix: `[Kk, K]` and `[Kv, K]`, the weights of the heads in each fused one.
      key_head, value_head: which fused head every query head reads.

    Returns:
      A new module.

    Raises:
      ValueError: if `mixer` is a subclass or has dropout, or numbers do not fit.

    Source: Chen et al., DHA, 2024, arXiv 2406.06567.
    """
    _check(mixer)
    kernel, param_dtype = mixer.query.kernel, mixer.query.param_dtype
    fused = DecoupledHeadAttention(
        kernel.shape[0],
        num_heads=mixer.num_heads,
        num_key_heads=len(key_mix),
        num_value_heads=len(value_mix),
        key_head=key_head,
        value_head=value_head,
        head_dim=mixer.head_dim,
        value_dim=mixer.value_dim,
        qk_norm=None if mixer.query_norm is None else "rms",
        rope_theta=mixer.rope_theta,
        rotary_dim=mixer.rotary_dim,
        causal=mixer.causal,
        window=mixer.window,
        bias=mixer.query.bias is not None,
        out_bias=mixer.out.bias is not None,
        dropout=mixer.dropout,
        rngs=nnx.Rngs(0),
        dtype=mixer.query.dtype,
        param_dtype=param_dtype,
    )
    copy = nnx.clone(mixer)
    fused.query, fused.out = copy.query, copy.out
    fused.query_norm, fused.key_norm = copy.query_norm, copy.key_norm
    fused.key, fused.value = copy.key, copy.value
    _apply(fused.key, mixer.num_kv_heads, ops.mix_heads, key_mix)
    _apply(fused.value, mixer.num_kv_heads, ops.mix_heads, value_mix)
    return fused


def _check(mixer):
    if type(mixer) is not MultiHeadAttention:
        raise ValueError(f"mixer must be a MultiHeadAttention itself, got {type(mixer).__name__}")
    if mixer.attention is not ops.dot_product_attention:
        raise ValueError("mixer must have attention=ops.dot_product_attention")


def _apply(layer, heads, merge, weight):
    """Merges the heads that a projection writes, `[1, in, heads, D]`."""
    for name in ("kernel", "bias"):
        param = getattr(layer, name)
        if param is not None:
            rows = param[...].reshape(1, -1, heads, layer.out_features // heads)
            merged = merge(rows, weight).reshape(*param.shape[:-1], -1)
            setattr(layer, name, nnx.Param(merged))
    layer.out_features = layer.kernel.shape[1]
