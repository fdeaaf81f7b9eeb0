"""Attention on a grid that decays with Manhattan distance."""

import dataclasses

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, Pointwise, ScoreMod, operand
from attn_lab.ops.grids import product_mask
from attn_lab.ops.predicates import Blocks

__all__ = ["decomposed_manhattan_attention", "manhattan_attention", "manhattan_decay"]

ACTIVATIONS = {"softmax": engine.softmax, "sigmoid": Pointwise(jnp.exp)}


def manhattan_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gamma: jax.Array,
    *,
    decomposed: bool = False,
    activation: str = "softmax",
    slopes: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    shift: int = 0,
    implementation: str | None = None,
) -> jax.Array:
    """Attention between the places of a grid, decaying with the Manhattan distance d of a pair.

        softmax:  w = softmax(scale <q, k> + log_gamma d)
        sigmoid:  w = sigmoid(scale <q, k> + slope (i - j)) exp(log_gamma d), not normalised

    Here i and j number the places row by row. Decomposed, the same is done along every row and
    then, with the same queries and keys, along every column of the result; i and j then number the
    places of one line.

    Args:
      q, k: `[B, Y, X, H, D]`.
      v: `[B, Y, X, H, Dv]`.
      log_gamma: `[H]`, at most 0.
      decomposed: whether to attend along rows and then along columns, in O(Y X (Y + X)).
      activation: "softmax" or "sigmoid".
      slopes: `[H]`, by default 0; for "sigmoid" only.
      scale: by default `1 / sqrt(D)`.
      window: places attend only within their square of that many rows and columns; squares at the
        border may be cut. None is the whole grid.
      shift: where the first whole square begins, on both axes.
      implementation: of the engine: see `attn_kernels.attention.attention`.

    Returns:
      `[B, Y, X, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit, the activation is unknown, or the window is not positive.

    Source: Fan et al., RMT, 2023, arXiv 2309.11523; sigmoid: Gated-SwinRMT, 2026, arXiv 2604.06014.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, x in ("q", q), ("k", k), ("v", v):
        if x.ndim != 5 or x.shape[:3] != q.shape[:3]:
            raise ValueError(f"{name} must be [B, Y, X, H, D] as q {q.shape}, got {x.shape}")
    if slopes is not None and activation == "softmax":
        raise ValueError("slopes need activation='sigmoid'")
    heads = q.shape[3]
    parts = [jnp.zeros(heads) if x is None else jnp.asarray(x) for x in (log_gamma, slopes)]
    for name, x in zip(("log_gamma", "slopes"), parts):
        if x.shape != (heads,):
            raise ValueError(f"{name} must be [H] = {[heads]}, got {list(x.shape)}")
    operands = tuple(operand(x, "h") for x in parts)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    line = None if window is None else Mask(Blocks(window, shift))
    grid = None if window is None else product_mask(line, line, shape=q.shape[1:3])

    def attend(q, k, v, columns):
        """Over the third axis from the end, all before it being apart."""
        lines = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        out = engine.attention(
            *lines,
            mask=grid if columns > 1 else line,
            score_mod=ScoreMod(_Decay(columns, activation == "sigmoid"), operands),
            normalizer=ACTIVATIONS[activation],
            scale=scale,
            implementation=implementation,
        )
        return out.reshape(*v.shape[:-3], *out.shape[1:])

    batch, rows, columns = q.shape[:3]
    if not decomposed:
        flat = (x.reshape(batch, rows * columns, *x.shape[3:]) for x in (q, k, v))
        return attend(*flat, columns).reshape(v.shape)
    wide = attend(q, k, v.astype(jnp.result_type(v, jnp.float32)), 1)
    out = attend(*(jnp.swapaxes(x, 1, 2) for x in (q, k, wide)), 1)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def decomposed_manhattan_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    *,
    normalizer: str = "softmax",
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention along the rows and then along the columns of a grid, decaying with distance.

    It is `manhattan_attention` with `decomposed=True`.

    Args:
      q, k, v, scale, implementation: as there.
      log_decay: its `log_gamma`.
      normalizer: its `activation`.

    Returns:
      `[B, Y, X, H, Dv]` in the dtype of v.

    Source: Fan et al., RMT, 2023, arXiv 2309.11523.
    """
    return manhattan_attention(
        q,
        k,
        v,
        log_decay,
        decomposed=True,
        activation=normalizer,
        scale=scale,
        implementation=implementation,
    )


def manhattan_decay(num_heads: int, *, initial: float = 2.0, spread: float = 4.0) -> jax.Array:
    """The log decays of heads, `log(1 - 2^(-initial - spread h / H))`: `[H]`.

    Source: Fan et al., RMT, 2023, arXiv 2309.11523.
    """
    return jnp.log1p(-jnp.exp2(-initial - spread * jnp.arange(num_heads) / num_heads))


@dataclasses.dataclass(frozen=True)
class _Decay:
    """The decay of a score, or the logarithm of a decaying sigmoid, with rows of `columns`."""

    columns: int
    sigmoid: bool

    def __call__(self, score, b, h, q_index, k_index, log_gamma, slope):
        down = q_index // self.columns - k_index // self.columns
        across = q_index % self.columns - k_index % self.columns
        distance = jnp.abs(down) + jnp.abs(across)
        decay = jnp.where(distance == 0, 0, log_gamma * distance)  # log_gamma may be -inf
        if self.sigmoid:
            score = jax.nn.log_sigmoid(score + slope * (q_index - k_index))
        return score + decay.astype(score.dtype)
