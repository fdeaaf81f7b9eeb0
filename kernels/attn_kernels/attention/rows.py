"""Whole rows of the score matrix, a block of queries at a time: for what no tile can say."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attn_kernels.attention.mask import Mask


def map_query_blocks(
    function: Callable[..., Any], arrays: Any, *, block: int, halo: int = 0
) -> Any:
    """Applies a function of whole rows to blocks of queries, in memory `O(block S)`.

    Blocks run one after the other and are computed again in the backward pass, so nothing of size
    `T S` is kept. Arrays with keys alone may be closed over.

    Args:
      function: `function(rows, blocks)` from the numbers `[halo + block]` of the rows, and
        `arrays` cut to these rows, to arrays `[B, block, ...]`. The first `halo` rows come before
        the block. Rows below 0 or from T on do not exist: they are zeros.
      arrays: a pytree of arrays `[B, T, ...]`.
      block: the number of queries in a block.
      halo: how many rows before a block the function needs.

    Returns:
      What the function returns, as arrays `[B, T, ...]`.

    Raises:
      ValueError: if `block` or `halo` is out of range, or the arrays differ in T.
    """
    lengths = {x.shape[1] for x in jax.tree.leaves(arrays)}
    if len(lengths) != 1:
        raise ValueError(f"arrays must have one length along axis 1, got {sorted(lengths)}")
    if block < 1 or halo < 0:
        raise ValueError(f"block must be positive and halo not negative, got {block} and {halo}")
    (length,) = lengths
    block = min(block, length)
    count = math.ceil(length / block)
    end = count * block - length

    def pad(x):
        return jnp.pad(x, ((0, 0), (halo, end), *((0, 0),) * (x.ndim - 2)))

    padded = jax.tree.map(pad, arrays)

    @jax.checkpoint
    def one(start):
        def cut(x):
            return jax.lax.dynamic_slice_in_dim(x, start, halo + block, 1)

        return function(start - halo + jnp.arange(halo + block), jax.tree.map(cut, padded))

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * block, *x.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(one, jnp.arange(count) * block))


def allowed_rows(mask: Mask | None, rows: jax.Array, q_len: int, k_len: int) -> jax.Array:
    """The rows of a pattern that a block of queries needs.

    Args:
      mask: the pattern; None allows every pair.
      rows: numbers of queries `[R]`; those below 0 or from `q_len` on are allowed nothing.
      q_len, k_len: the lengths T and S of the whole.

    Returns:
      bool, which broadcasts to `[B, H, R, S]`.
    """
    exists = ((rows >= 0) & (rows < q_len))[None, None, :, None]
    if mask is None:
        return exists
    nearest = jnp.clip(rows, 0, q_len - 1)
    operands = [x[:, :, nearest] if x.shape[2] > 1 else x for x in mask.operands]
    b = jnp.arange(max([1, *(x.shape[0] for x in operands)]))[:, None, None, None]
    h = jnp.arange(max([1, *(x.shape[1] for x in operands)]))[:, None, None]
    q_index = rows[:, None] + (k_len - q_len)
    return mask.allowed(b, h, q_index, jnp.arange(k_len), operands) & exists
