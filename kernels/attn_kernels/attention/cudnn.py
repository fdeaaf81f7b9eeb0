"""Attention by the fixed kernels of cuDNN: plain softmax over all keys or a causal window."""

import jax
import jax.numpy as jnp

from attn_kernels.attention.normalizer import Softmax
from attn_kernels.attention.tile import Tile


def refusal(tile: Tile) -> str | None:
    """Why cuDNN cannot serve a tile, None if it may; what else it lacks JAX says itself."""
    dtypes = {x.dtype for x in (tile.q, tile.k, tile.v)}
    length, known = tile.q.shape[2], tile.k.shape[2]
    if jax.default_backend() != "gpu":
        return f"it needs a GPU, this is a {jax.default_backend()}"
    if tile.score is not None or tile.score_mod is not None:
        return "scores are unmodified inner products"
    if not isinstance(tile.normalizer, Softmax) or tile.normalizer.sink is not None:
        return f"the normalizer is softmax without a sink, got {tile.normalizer}"
    if tile.summing or tile.place is not None:
        return "it has no statistics of rows"
    if not dtypes < {jnp.dtype("bfloat16"), jnp.dtype("float16")}:
        return f"q, k and v are all in bfloat16 or all in float16, got {sorted(map(str, dtypes))}"
    if tile.k.shape[1::2] != tile.v.shape[1::2]:
        return f"k and v have the same heads and dimensions, got {tile.k.shape}, {tile.v.shape}"
    if isinstance(tile.scale, jax.Array):
        return "scale is a number that is known when the program is traced"
    if tile.mask is not None:
        _, ahead = tile.mask.window or (0, 1)
        if ahead or length != known:
            return "the mask is None, or a causal window with as many queries as keys"
    return None


def attend(tile: Tile):
    """The output `[B, H, T, Dv]` in the dtype of v; statistics there are none."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (tile.q, tile.k, tile.v))
    left = -1 if tile.mask is None else tile.mask.window[0]
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=float(tile.scale),
        is_causal=tile.mask is not None,
        local_window_size=None if left < 0 else (left, 0),
        implementation="cudnn",
    )
    return jnp.swapaxes(out, 1, 2), ()
