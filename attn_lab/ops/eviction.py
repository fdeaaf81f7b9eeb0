"""Patterns that data decide: which tokens stay visible, and for how long."""

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask, normalize, operand, softmax
from attn_lab.ops.masks import dense_mask

__all__ = ["heavy_hitter_mask", "heavy_hitter_static_mask", "token_type_mask"]


def token_type_mask(types: jax.Array, *, window: int) -> Mask:
    """Causal, and each token stays visible for ever, to the next global token, or for a window.

    Args:
      types: integers `[B, T, K]`, for each token and key head: 0 (global, for ever), 1 (local, up
        to the next global token, which still sees it) or 2 (sliding, to the next `window` queries).
      window: W; a sliding token is seen by W + 1 queries, its own included.

    Returns:
      A `Mask`, dense `[B, K, T, T]`.

    Source: Deng et al., Neural Attention Search, 2025, arXiv 2502.13251.
    """
    if types.ndim != 3 or not jnp.issubdtype(types.dtype, jnp.integer):
        raise ValueError(f"types must be integers [B, T, K], got {types.dtype}{types.shape}")
    length = types.shape[1]
    position = jnp.arange(length)[:, None]
    next_global = jax.lax.cummin(jnp.where(types == 0, position, length), axis=1, reverse=True)
    last = jnp.where(types == 1, next_global, jnp.where(types == 2, position + window, length))
    return Mask(_until, (operand(last, "bkh"),))


def _until(b, h, q_index, k_index, last):
    return (k_index <= q_index) & (q_index <= last)


def heavy_hitter_mask(scores: jax.Array, *, heavy: int, recent: int) -> Mask:
    """What queries see of a cache that keeps the newest and the most attended entries.

    A query sees its cache and itself. Then, if there are more than `heavy + recent` entries, the
    least attended one that is not among the newest `recent` is dropped, and its sum forgotten.

    Args:
      scores: scaled, `[B, H, T, T]`; keys after the query are not read.
      heavy: entries kept for the attention that they have had.
      recent: newest entries kept.

    Returns:
      A `Mask`, dense `[B, H, T, T]`; heavy = 0 is a causal window of `recent + 1`.

    Source: Zhang et al., H2O, 2023, arXiv 2306.14048.
    """
    length = _check(scores)
    position = jnp.arange(length)

    def step(cache, row):
        alive, total = cache
        t, scores = row
        alive = alive | (position == t)
        total = total + jax.nn.softmax(jnp.where(alive, scores, -jnp.inf), -1)
        seen, old = alive, alive & (position <= t - recent)
        drop = length - 1 - jnp.argmin(jnp.where(old, total, jnp.inf)[..., ::-1], -1)
        full = alive.sum(-1) > heavy + recent
        keep = ~((position == drop[..., None]) & full[..., None])
        return (alive & keep, total * keep), seen

    scores = jax.lax.stop_gradient(scores.astype(jnp.result_type(jnp.float32, scores.dtype)))
    rows = position, jnp.moveaxis(scores, 2, 0)
    empty = jnp.zeros_like(scores[:, :, 0])
    _, seen = jax.lax.scan(step, (empty > 0, empty), rows)
    return dense_mask(jnp.moveaxis(seen, 0, 2))


def heavy_hitter_static_mask(scores: jax.Array, *, heavy: int, recent: int) -> Mask:
    """The most attended keys of a finished prompt, and a causal band of `recent + 1` keys.

    Which keys these are depends on later queries too: sums of the causal softmax over all rows.

    Args:
      scores: scaled, `[B, H, T, T]`; keys after the query are not read.
      heavy: keys that every later query sees.
      recent: how far back a query sees besides.

    Returns:
      A `Mask`, dense `[B, H, T, T]`.

    Source: Zhang et al., H2O, 2023, arXiv 2306.14048.
    """
    length = _check(scores)
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = normalize(jnp.where(causal, jax.lax.stop_gradient(scores), -jnp.inf), softmax)
    _, best = jax.lax.top_k(weights.sum(2), min(heavy, length))
    chosen = (best[..., None] == jnp.arange(length)).any(-2)
    return Mask(_chosen_or_near, (operand(chosen, "bhk"), operand(recent, "")))


def _chosen_or_near(b, h, q_index, k_index, chosen, recent):
    return (k_index <= q_index) & (chosen | (q_index - k_index <= recent))


def _check(scores):
    if scores.ndim != 4 or scores.shape[2] != scores.shape[3]:
        raise ValueError(f"scores must be [B, H, T, T], got {scores.shape}")
    return scores.shape[2]
