"""Attention in which a weight or a message depends on several queries and keys."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask, allowed_rows, map_query_blocks, softmax
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.masks import as_mask

__all__ = ["key_query_convolution", "multi_token_attention", "relational_attention"]

ROWS = 128
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
}


def relational_attention(
    q: jax.Array,
    k: jax.Array,
    q_rel: jax.Array,
    k_rel: jax.Array,
    w_rel: jax.Array,
    symbols: jax.Array,
    *,
    relation_activation: str = "identity",
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    relation_scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention that retrieves relations: `sum_j A_tj (W_h r_tj + s_j)`.

    `r_tj = act(relation_scale <q_rel_t^l, k_rel_j^l>)` has an entry for each relation l. Without
    an activation it is linear in `k_rel_j`, which attention then carries as values.

    Args:
      q, k, mask, causal, scale, implementation: of the weights A, as in `dot_product_attention`.
      q_rel, k_rel: `[B, T, R, Dr]` and `[B, S, R, Dr]`.
      w_rel: `[H, Dv, R]`.
      symbols: what identifies the sender, `[B, S, K, Dv]`; K divides H.
      relation_activation: "identity", or "relu", "sigmoid", "silu", "gelu" or "tanh", which run by
        blocks of query rows and have no other `implementation`.
      relation_scale: by default `1 / sqrt(Dr)`.

    Returns:
      `[B, T, H, Dv]` in the dtype of `symbols`.

    Raises:
      ValueError: if the activation is unknown or shapes do not fit.
      NotImplementedError: if an implementation is asked for with an activation.

    Source: Altabaa and Lafferty, Dual Attention Transformer, 2024, arXiv 2405.16727.
    """
    if relation_activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"relation_activation {relation_activation!r} must be one of {known}")
    if implementation is not None and relation_activation != "identity":
        raise NotImplementedError(
            f"implementation {implementation!r} needs relation_activation='identity'; drop it"
        )
    heads, dim = q.shape[2], symbols.shape[-1]
    relations, relation_dim = q_rel.shape[2:]
    if w_rel.shape != (heads, dim, relations) or k_rel.shape[2:] != q_rel.shape[2:]:
        raise ValueError(
            f"w_rel must be {[heads, dim, relations]} and k_rel [B, S, {relations}, "
            f"{relation_dim}], got {list(w_rel.shape)} and {list(k_rel.shape)}"
        )
    relation_scale = 1 / math.sqrt(relation_dim) if relation_scale is None else relation_scale
    mask, dtype = as_mask(mask, causal), symbols.dtype
    wide = jnp.result_type(q, k, q_rel, k_rel, symbols, jnp.float32)
    part = dict(mask=mask, scale=scale)
    if relation_activation == "identity":
        senders = k_rel.reshape(*k_rel.shape[:2], 1, -1).astype(wide)
        senders = jnp.broadcast_to(senders, (*symbols.shape[:3], senders.shape[-1]))
        values = jnp.concatenate([symbols.astype(wide), senders], -1)
        read = dot_product_attention(q, k, values, implementation=implementation, **part)
        symbol, sender = jnp.split(read, [dim], -1)
        sender = sender.reshape(*sender.shape[:3], relations, relation_dim)
        relation = relation_scale * jnp.einsum("btrd,bthrd->bthr", q_rel.astype(wide), sender)
    else:
        act = ACTIVATIONS[relation_activation]
        symbol = dot_product_attention(q, k, symbols.astype(wide), **part)

        def block(rows, blocks):
            q, q_rel = blocks
            weights = _weights(q, k, mask, rows, q_len, scale)
            related = jnp.einsum("btrd,bsrd->brts", q_rel.astype(wide), k_rel.astype(wide))
            return jnp.einsum("bhts,brts->bthr", weights, act(relation_scale * related))

        q_len = q.shape[1]
        relation = map_query_blocks(block, (q, q_rel), block=ROWS)
    return (symbol + jnp.einsum("bthr,hvr->bthv", relation, w_rel.astype(wide))).astype(dtype)


def key_query_convolution(
    scores: jax.Array, kernel: jax.Array, *, causal: bool = True
) -> jax.Array:
    """Convolves scores over neighbouring queries and keys, each head by its own kernel.

    `out[h, i, j] = sum_ab kernel[h, a, b] X[h, i - (cq - 1) + a, j - (ck - 1) / 2 + b]`, where X
    is 0 outside and, if causal, at future keys.

    Args:
      scores: `[B, H, T, S]`.
      kernel: `[H, cq, ck]` with ck odd; its last row is the present query.
      causal: whether scores of keys `j > t + S - T` count as 0.

    Returns:
      `[B, H, T, S]`.

    Raises:
      ValueError: if the kernel does not fit.

    Source: Golovneva et al., Multi-Token Attention, 2025, arXiv 2504.00927.
    """
    q_len, k_len = scores.shape[-2:]
    allowed = allowed_rows(as_mask(None, causal), jnp.arange(q_len), q_len, k_len)
    before = _kernel_rows("kernel", kernel, scores.shape[1])
    scores = jnp.pad(jnp.where(allowed, scores, 0), ((0, 0), (0, 0), (before, 0), (0, 0)))
    return _convolve(scores, kernel)


def multi_token_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kernel: jax.Array,
    *,
    kernel_post: jax.Array | None = None,
    head_mix_pre: jax.Array | None = None,
    head_mix_post: jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    mask: Mask | jax.Array | None = None,
) -> jax.Array:
    """Softmax attention whose scores, and weights, are convolved and mixed between heads.

    Scores go through `key_query_convolution`, `head_mix_pre`, softmax over the allowed keys, the
    convolution `kernel_post` of the weights, `head_mix_post`, and meet the values.

    Args:
      q, k, v, causal, scale, mask: as in `dot_product_attention`; what is not allowed counts as 0
        in the convolutions, and with a mask so do keys of earlier rows that a row may not see.
      kernel: `[H, cq, ck]` with ck odd.
      kernel_post: None, or as `kernel`.
      head_mix_pre, head_mix_post: None, or `[H / c, c, c]`: in a group of c heads, head i becomes
        `sum_h M[g, i, h]` times head h.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Golovneva et al., 2025, arXiv 2504.00927.
    """
    (q_len, heads), k_len = q.shape[1:3], k.shape[1]
    before = _kernel_rows("kernel", kernel, heads)
    after = 0 if kernel_post is None else _kernel_rows("kernel_post", kernel_post, heads)
    for name, mix in ("head_mix_pre", head_mix_pre), ("head_mix_post", head_mix_post):
        if mix is not None and (
            mix.ndim != 3 or mix.shape[1] != mix.shape[2] or mix.shape[0] * mix.shape[1] != heads
        ):
            raise ValueError(f"{name} must be [{heads} / c, c, c], got {list(mix.shape)}")
    pattern = as_mask(mask, causal)
    v = jnp.repeat(v, heads // v.shape[2], axis=2)

    def block(rows, q):
        allowed = allowed_rows(pattern, rows, q_len, k_len)
        scores = jnp.where(allowed, _scores(q, k, scale), 0)
        allowed = allowed[:, :, before:]
        scores = _convolve(scores, kernel, None if mask is None else allowed)
        weights = _softmax(jnp.where(allowed, _mix(scores, head_mix_pre), -jnp.inf))
        if kernel_post is not None:
            allowed = allowed[:, :, after:]
            weights = _convolve(weights, kernel_post, None if mask is None else allowed)
            weights = jnp.where(allowed, weights, 0)
        weights = _mix(weights, head_mix_post)
        return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)

    return map_query_blocks(block, q, block=ROWS, halo=before + after)


def _kernel_rows(name, kernel, heads):
    """How many rows before its own a kernel reads."""
    if kernel.ndim != 3 or kernel.shape[0] != heads or kernel.shape[2] % 2 == 0:
        raise ValueError(f"{name} must be [{heads}, cq, ck] with ck odd, got {list(kernel.shape)}")
    return kernel.shape[1] - 1


def _convolve(scores, kernel, allowed=None):
    """Without padding along the queries, with zeros along the keys.

    If `allowed` of the rows that come out is given, they read allowed keys alone.
    """
    if allowed is not None:
        rows = allowed.shape[2]
        taps = ((scores[:, :, n : n + rows], kernel[:, n : n + 1]) for n in range(kernel.shape[1]))
        return sum(_convolve(jnp.where(allowed, x, 0), tap) for x, tap in taps)
    side = kernel.shape[2] // 2
    dtype = jnp.result_type(scores, kernel)
    return jax.lax.conv_general_dilated(
        scores.astype(dtype),
        kernel[:, None].astype(dtype),
        (1, 1),
        ((0, 0), (side, side)),
        feature_group_count=kernel.shape[0],
    )


def _mix(x, matrix):
    if matrix is None:
        return x
    groups = x.reshape(x.shape[0], *matrix.shape[:2], *x.shape[2:])
    return jnp.einsum("gih,bghts->bgits", matrix, groups).reshape(x.shape)


def _scores(q, k, scale):
    """The scaled products `[B, H, T, S]` in float32 or better."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = jnp.result_type(q, k, jnp.float32)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return scale * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)


def _softmax(scores):
    return softmax.weight(scores, softmax.partial(scores))


def _weights(q, k, mask, rows, q_len, scale):
    allowed = allowed_rows(mask, rows, q_len, k.shape[1])
    return _softmax(jnp.where(allowed, _scores(q, k, scale), -jnp.inf))
