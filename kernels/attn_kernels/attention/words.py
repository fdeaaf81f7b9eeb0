"""What a mask says of the pairs of partial tiles, 32 of them in a number.

A kernel evaluates a predicate on every pair of a tile, and takes longer for that than for the
products if the predicate has several conditions. Bits that were found before it takes as they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from attn_kernels.attention.elementwise import stand_ins, steps
from attn_kernels.attention.mask import Mask

SIZE = 32
WORTH = 6  # steps for every pair; a kernel takes fewer itself, if no operand has to be loaded


def worth(mask: Mask) -> bool:
    """Whether a kernel would take more steps for the predicate of a pair than for its bit.

    It is not said to where an operand has a number for every pair, which bits would be made of.
    """
    if any(x.shape[2] > 1 < x.shape[3] for x in mask.operands):
        return False
    loaded = any(max(x.shape[2:]) > 1 for x in mask.operands)
    return loaded or steps(mask.predicate, stand_ins(mask.operands)) > WORTH


@functools.partial(jax.jit, static_argnames=("most", "lengths", "sizes", "rows"))
def words(mask: Mask, order, first, *, most: int, lengths, sizes, rows: str) -> jax.Array:
    """Bits of the tiles in a part of a list, for blocks of rows.

    Args:
      mask: the pattern.
      order, first: int32 `[B|1, H|1, R, n]` and `[B|1, H|1, R]`: the blocks that each of the R
        blocks of rows meets, and where among them the part begins.
      most: m, how long it is at most; what comes after its end is of no use.
      lengths: T and S.
      sizes: how many queries and keys a tile has; of columns it has a multiple of 32.
      rows: "q" or "k", along which rows are.

    Returns:
      int32 `[B|1, H|1, R, m, columns / 32, rows]`: bit c of a number is that of the c-th of its
      columns, 1 where the pair is allowed.
    """
    # Known lists are not worth folding what is made of them.
    order, first = lax.optimization_barrier((order, first))
    held, columns = sizes if rows == "q" else sizes[::-1]
    met = jnp.minimum(first[..., None] + jnp.arange(most), order.shape[3] - 1)
    met = jnp.take_along_axis(order, met, 3)
    at = jnp.arange(columns).reshape(-1, 1, SIZE)
    along_columns = met[..., None, None, None] * columns + at
    along_rows = jnp.arange(order.shape[2])[:, None, None, None, None] * held
    along_rows = along_rows + jnp.arange(held)[:, None]
    q, k = (along_rows, along_columns)[:: 1 if rows == "q" else -1]
    b, h = (
        jnp.arange(max([size, *(x.shape[n] for x in mask.operands)])).reshape(-1, *[1] * (6 - n))
        for n, size in enumerate(order.shape[:2])
    )

    def operand(x):
        at = b, h, jnp.minimum(q, lengths[0] - 1), jnp.minimum(k, lengths[1] - 1)
        return jnp.squeeze(x)[tuple(i for i, n in zip(at, x.shape) if n > 1)]

    shift = lengths[1] - lengths[0]
    allowed = mask.allowed(b, h, q + shift, k, [operand(x) for x in mask.operands])
    allowed = allowed & (q < lengths[0]) & (k < lengths[1])
    bits = jnp.left_shift(allowed.astype(jnp.uint32), jnp.arange(SIZE, dtype=jnp.uint32))
    return lax.bitcast_convert_type(bits.sum(-1, dtype=jnp.uint32), jnp.int32)
