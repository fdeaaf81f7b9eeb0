"""Linear attention through maps of its own: rectified, log-normal and polynomial weights."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp

from attn_kernels import recurrence as engine
from attn_lab.ops.linear import linear_attention
from attn_lab.ops.normed import block_diagonal_attention
from attn_lab.ops.running import running_exp

__all__ = [
    "causal_log_normal_attention",
    "fastmax_attention",
    "linear_log_normal_attention",
    "linear_log_normal_diag_attention",
    "log_normal_temperatures",
    "polynomial_feature_map",
    "simplified_linear_attention",
    "standardize",
]

# log-variance of a log-normal attention matrix against that of softmax, fitted by a line
SLOPE, OFFSET = 0.14855178144710912, -0.35487039130661086


def simplified_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    conv_kernel: jax.Array,
    conv_bias: jax.Array,
    *,
    height: int,
    width: int,
    eps: float = 1e-6,
) -> jax.Array:
    """Linear attention of the pixels of an image by relu, plus a convolution of their values.

        o_t = sum_s <relu(q_t), relu(k_s)> v_s / (sum_s <relu(q_t), relu(k_s)> + eps) + conv(v)_t

    Args:
      q: `[B, N, H, D]`, the pixels row by row.
      k: `[B, N, K, D]`; K divides H.
      v: `[B, N, K, Dv]`.
      conv_kernel: `[5, 5, Dv]`, or another odd size: one filter a channel, for all heads. The image
        is 0 beyond its edges.
      conv_bias: `[Dv]`.
      height, width: of the image, with N their product.
      eps: added to the sum of a row's weights.

    Returns:
      `[B, N, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Guo et al., SLAB, 2024, arXiv 2405.11582.
    """
    batch, pixels, heads, dim = v.shape
    if pixels != height * width or q.shape[1] != pixels:
        raise ValueError(f"q {q.shape} and v {v.shape} must have {height} * {width} positions")
    if conv_kernel.ndim != 3 or conv_kernel.shape[2] != dim or conv_bias.shape != (dim,):
        raise ValueError(
            f"conv_kernel must be [size, size, {dim}] and conv_bias [{dim}], "
            f"got {conv_kernel.shape} and {conv_bias.shape}"
        )
    if not all(size % 2 for size in conv_kernel.shape[:2]):
        raise ValueError(f"conv_kernel must have odd sizes, got {conv_kernel.shape}")
    wide = jnp.result_type(jnp.float32, q, k, v, conv_kernel, conv_bias)
    values = v.astype(wide)
    images = jnp.swapaxes(values, 1, 2).reshape(batch * heads, height, width, dim)
    local = jax.lax.conv_general_dilated(
        images,
        conv_kernel.astype(wide)[:, :, None],
        (1, 1),
        [(size // 2, size // 2) for size in conv_kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=dim,
        precision="highest",
    )
    local = jnp.swapaxes(local.reshape(batch, heads, pixels, dim), 1, 2) + conv_bias.astype(wide)
    out = linear_attention(q, k, values, feature_map="relu", eps=eps)
    return (out + engine.match_heads(local, out)[0]).astype(v.dtype)


def log_normal_temperatures(
    q_std: float | jax.Array, k_std: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Temperatures with which exponential features vary as softmax attention does.

        s^2 = (q_std^2 k_std^2 - b) / (2 a),    alpha = s / q_std,    beta = s / k_std

    a and b are of a line fitted to the variance of the logs of the weights.

    Args:
      q_std, k_std: standard deviations of queries and keys.

    Returns:
      alpha of queries and beta of keys.

    Source: Nahshan et al., 2023, arXiv 2311.13541.
    """
    s = jnp.sqrt((jnp.square(q_std * k_std) - OFFSET) / (2 * SLOPE))
    return s / q_std, s / k_std


def linear_log_normal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    alpha: float | jax.Array | None = None,
    beta: float | jax.Array | None = None,
    causal: bool = False,
    eps: float = 1e-8,
) -> jax.Array:
    """Linear attention by exponentials, as concentrated as softmax attention.

        Q_t = exp(alpha q_t - max_D),    K_s = exp(beta k_s - max over s and D)
        o_t = sum_s <Q_t, K_s> v_s / (<Q_t, sum_s K_s> + eps)

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      alpha, beta: temperatures, by default `log_normal_temperatures` of the standard deviations of
        all of q and of k, the batch included, as constants to derivatives.
      causal: query t sees the keys `s <= t + S - T`. The maximum of keys, and temperatures that are
        not given, are still those of whole arrays.
      eps: added to the sum of a row's weights.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Nahshan et al., 2023, arXiv 2311.13541.
    """
    wide = jnp.result_type(jnp.float32, q, k, v)
    queries, keys = q.astype(wide), k.astype(wide)
    matched = jax.lax.stop_gradient(log_normal_temperatures(_std(queries), _std(keys)))
    alpha, beta = (
        own if given is None else jnp.asarray(given, wide)
        for given, own in zip((alpha, beta), matched)
    )
    return linear_attention(
        _below_one(alpha * queries, -1),
        _below_one(beta * keys, (1, 3)),
        v,
        feature_map="identity",
        causal=causal,
        eps=eps,
    )


def causal_log_normal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    alpha: float | jax.Array,
    beta: float | jax.Array,
    eps: float = 1e-8,
    initial_state: tuple[jax.Array, jax.Array] | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Causal linear log-normal attention that does not look ahead and goes on from a state.

    It is `linear_log_normal_attention`, but for eps, which is added in units of the largest key so
    far in place of the largest of all.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, T, K, D]`; K divides H.
      v: `[B, T, K, Dv]`.
      alpha, beta: temperatures.
      eps: added to the sum of a row's weights.
      initial_state: from an earlier call, whose positions these follow.
      segment_ids: integers `[B, T]`: documents of a packed row, as in `linear_attention` of engine
        2.

    Returns:
      `[B, T, H, Dv]` in the dtype of v, and the state: sums `[B, H, D, Dv + 1]` of keys times
      values, in the last column of keys alone, and the largest key `[B, K]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Nahshan et al., 2023, arXiv 2311.13541.
    """
    wide = jnp.result_type(jnp.float32, q, k, v)
    sums, peak = (None, None) if initial_state is None else initial_state
    keys, log_decay, peak = running_exp(
        beta * k.astype(wide),
        shared=True,
        peak=None if peak is None else peak[:, None, :, None],
        segment_ids=segment_ids,
    )
    values = v.astype(wide)
    out, sums = engine.linear_attention(
        _below_one(alpha * q.astype(wide), -1),
        keys,
        jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1),
        log_decay=log_decay[..., 0],
        scale=1.0,
        initial_state=sums,
        return_state=True,
        segment_ids=segment_ids,
    )
    total = out[..., -1:] + eps
    out = out[..., :-1] / jnp.where(total == 0, 1, total)
    return out.astype(v.dtype), (sums, peak[:, 0, :, 0])


def linear_log_normal_diag_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block_size: int,
    causal: bool = False,
    alpha: float | jax.Array | None = None,
    beta: float | jax.Array | None = None,
    eps: float = 1e-8,
    implementation: str | None = None,
) -> jax.Array:
    """The mean of linear log-normal attention and of softmax attention within blocks.

    Args:
      q, k, v, alpha, beta, causal, eps: as in `linear_log_normal_attention`, with as many keys as
        queries.
      block_size: tokens a block; the last one may be shorter.
      implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Nahshan et al., 2023, arXiv 2311.13541.
    """
    values = v.astype(jnp.result_type(jnp.float32, v))
    far = linear_log_normal_attention(q, k, values, alpha=alpha, beta=beta, causal=causal, eps=eps)
    near = block_diagonal_attention(
        q, k, values, block_size=block_size, causal=causal, implementation=implementation
    )
    return ((far + near) / 2).astype(v.dtype)


def fastmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    order: int = 2,
    causal: bool = False,
    normalize: str = "standardize",
    limit: float = 1.0,
) -> jax.Array:
    """Attention with the Taylor polynomial of exp as weights, in time linear in the length.

        f(x) = sum_{l <= order} x^l / l!,    o_t = sum_s f(<q_t, k_s>) v_s / sum_s f(<q_t, k_s>)

    Weights of an even order are positive. Those of an odd one may cancel.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      order: of the polynomial; there are `binomial(D + order, order)` features.
      causal: query t sees the keys `s <= t + S - T`.
      normalize: what is done to q and k first: "standardize" (see `standardize`), "max" (the
        longest vector of a sequence and head gets the norm `limit`, which looks ahead) or "none".
      limit: see "max".

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit, the order is negative, or a name is unknown.

    Source: Gerami et al., FAST, 2024, arXiv 2402.07901.
    """
    ways = {
        "standardize": standardize,
        "max": functools.partial(_within, limit=limit),
        "none": lambda x: x,
    }
    if normalize not in ways:
        raise ValueError(f"normalize must be one of {', '.join(ways)}, got {normalize!r}")
    wide = jnp.result_type(jnp.float32, q, k, v)
    return linear_attention(
        ways[normalize](q.astype(wide)),
        ways[normalize](k.astype(wide)),
        v,
        feature_map=functools.partial(polynomial_feature_map, order=order),
        causal=causal,
        eps=0.0,
    )


def polynomial_feature_map(x: jax.Array, *, order: int = 2) -> jax.Array:
    """Features whose inner product is the Taylor polynomial of exp at that of x and y.

    They are the monomials `x^a / sqrt(a!)` of degree `|a| <= order`, each once:
    `sum_a x^a y^a / a! = sum_{l <= order} <x, y>^l / l!`.

    Args:
      x: `[..., D]`.
      order: of the polynomial.

    Returns:
      `[..., binomial(D + order, order)]` in the dtype of x.

    Raises:
      ValueError: if the order is negative.

    Source: Gerami et al., FAST, 2024, arXiv 2402.07901.
    """
    if order < 0:
        raise ValueError(f"order must be at least 0, got {order}")
    parts = [jnp.ones_like(x[..., :1])]
    for degree in range(1, order + 1):
        powers = list(itertools.combinations_with_replacement(range(x.shape[-1]), degree))
        factors = (x[..., jnp.array(column)] for column in zip(*powers))
        product = functools.reduce(jnp.multiply, factors)
        repeats = (math.prod(map(math.factorial, Counter(power).values())) for power in powers)
        parts.append(product * jnp.array([n**-0.5 for n in repeats], x.dtype))
    return jnp.concatenate(parts, -1)


def standardize(x: jax.Array) -> jax.Array:
    """Subtracts the mean of the last axis and divides by its standard deviation, without a weight.

    Args:
      x: `[..., D]`.

    Returns:
      The shape and dtype of x; 0 where all entries are alike.

    Source: Gerami et al., FAST, 2024, arXiv 2402.07901.
    """
    wide = x.astype(jnp.result_type(jnp.float32, x))
    wide = wide - wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True)
    return (wide / jnp.sqrt(jnp.where(variance == 0, 1, variance))).astype(x.dtype)


def _within(x, limit):
    """`x [B, S, K, D]` such that the longest vector of each sequence and head has norm `limit`."""
    square = jnp.square(x).sum(-1, keepdims=True).max(1, keepdims=True)
    return x * (limit / jnp.sqrt(jnp.where(square == 0, 1, square)))


def _below_one(x, axes):
    """`exp(x - max x)`; beside eps the maximum matters, to derivatives too."""
    return jnp.exp(x - x.max(axes, keepdims=True))


def _std(x):
    """Of all entries, without bias; 1 where they are alike."""
    variance = jnp.square(x - x.mean()).sum() / max(x.size - 1, 1)
    return jnp.sqrt(jnp.where(variance == 0, 1, variance))
