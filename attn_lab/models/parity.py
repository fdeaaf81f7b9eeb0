"""Transformers with weights set by hand that decide PARITY and FIRST at every length."""

import math

import jax
import jax.numpy as jnp

from attn_lab.ops import dot_product_attention, length_scaled_attention


def parity_logit(bits: jax.Array, *, big: float = 1.0) -> jax.Array:
    """The logit of an exact two-layer transformer: positive if the number of ones is odd.

    Uniform attention counts the ones, a feed-forward network marks the position of that number,
    and two heads at the last token, which favour even and odd positions by `+-big cos(pi i) /
    sqrt(5)`, read off whether it is odd.

    Args:
      bits: integers 0 and 1, `[B, n]`.
      big: the size of the scores.

    Returns:
      `[B]`; its magnitude falls with the length as `1 / n^2`.

    Source: Chiang and Cholak, 2022, arXiv 2202.12172.
    """
    batch, length = bits.shape[0], bits.shape[1] + 1
    one = jnp.pad(bits, ((0, 0), (0, 1))).astype(jnp.result_type(float))
    end = jnp.zeros_like(one).at[:, -1].set(1)
    index = jnp.arange(length)
    flat = jnp.zeros((batch, length, 1, 1), one.dtype)
    counts = dot_product_attention(flat, flat, jnp.stack([one, end], -1)[:, :, None])
    ones, step = counts[:, :, 0, 0], counts[:, :, 0, 1]
    away = ones - index / length
    relu = jax.nn.relu
    marked = relu(away - step) - 2 * relu(away) + relu(away + step)
    q = jnp.broadcast_to(big * jnp.array([1.0, -1.0])[:, None], (batch, 1, 2, 1))
    k = jnp.broadcast_to((1.0 - 2 * (index % 2))[:, None, None], flat.shape)
    even, odd = dot_product_attention(q, k, marked[..., None, None], scale=5**-0.5)[:, 0, :, 0].T
    return odd - even


def first_logit(bits: jax.Array, *, big: float = 1.0, log_scale: bool = False) -> jax.Array:
    """The logit of an exact two-layer transformer: positive if the first bit is 1.

    A feed-forward network marks whether the bit after the start token is 1, and the start token
    attends to that position by scores of `big / sqrt(6)`.

    Args:
      bits: integers 0 and 1, `[B, n]`.
      big: the size of the scores.
      log_scale: whether scores grow with the logarithm of the length, which keeps the logit from
        falling as `1 / n`.

    Returns:
      `[B]`.

    Source: Chiang and Cholak, 2022, arXiv 2202.12172.
    """
    one = jnp.pad(bits, ((0, 0), (1, 0))).astype(jnp.result_type(float))
    first = jnp.zeros_like(one).at[:, 1].set(1)
    value = jax.nn.relu(one + first - 1) - 0.5 * first
    q = jnp.full((bits.shape[0], 1, 1, 1), big, one.dtype)
    attention = length_scaled_attention if log_scale else dot_product_attention
    k, v = first[..., None, None], value[..., None, None]
    return attention(q, k, v, scale=1 / math.sqrt(6))[:, 0, 0, 0]
