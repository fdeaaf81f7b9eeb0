"""The entry to engine 1: one contract, several implementations."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from attn_kernels import gpu, parallel, tpu
from attn_kernels.attention import definition, streaming
from attn_kernels.attention.mask import Mask
from attn_kernels.attention.normalizer import Normalizer, softmax
from attn_kernels.attention.parallel import across_devices
from attn_kernels.attention.passes import Rows, settle
from attn_kernels.attention.score import Score
from attn_kernels.attention.score_mod import ScoreMod
from attn_kernels.attention.tile import Tile

KERNELS = ("mosaic_gpu", "mosaic_tpu", "cudnn")  # modules, imported where they are used
IMPLEMENTATIONS = ("definition", "xla", *KERNELS)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    score: Score | None = None,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    normalizer: Normalizer = softmax,
    scale: float | jax.Array | None = None,
    return_stats: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Programmable attention: `out[t] = sum_j w(s[t, j]) v[j]`, `s = score_mod(scale q k^T)`.

    The weights w come from `normalizer` over the keys that `mask` allows. Query head h reads key
    head `h // (H / K)`. Scores, statistics and sums are in float32, or float64 if q, k or v are. A
    row without allowed keys gives 0, and no gradient.

    Args:
      q: queries `[B, T, H, D]`.
      k: keys `[B, S, K, D]`; K divides H.
      v: values `[B, S, Kv, Dv]`; Kv divides H.
      score: what takes the place of the inner product; None is `<q_t, k_j>`.
      mask: the pattern; None allows every pair.
      score_mod: applied to the scaled scores before the mask.
      normalizer: `softmax`, `softmax_with_sink(...)`, `sigmoid`, `relu` or another `Normalizer`.
      scale: a number, by default `1 / sqrt(D)`, or 1 with a `score`.
      return_stats: whether to return the statistics of the rows as well.
      implementation: "definition" (materialises the weights, O(T S) memory), "xla" (streams over
        tiles, O(T + S) memory, differentiable any number of times in both modes), "mosaic_tpu" (a
        kernel for float32 and bfloat16) and "mosaic_gpu" (one for bfloat16 and float16 on Hopper),
        which are differentiable once in reverse mode and interpreted on a CPU, "cudnn" (for plain
        softmax over all keys or a causal window on a GPU, without statistics), or None: on a TPU
        or a Hopper GPU its Mosaic kernel for what it serves, "xla" otherwise and elsewhere. With
        several devices None takes a kernel only inside `jax.shard_map` or `sequence_parallel`.

    Returns:
      `[B, T, H, Dv]` in the dtype of `v`; with `return_stats` also `[B, T, H]` in float32 or
      better, differentiable: for softmax the logarithm of the denominator (-inf without keys).

    Raises:
      ValueError: if shapes do not fit, an implementation is unknown, or statistics are asked of a
        normaliser that has none.
      NotImplementedError: if a kernel that was named cannot serve the call.
    """
    tile = tile_of(q, k, v, mask, score_mod, normalizer, scale, score)
    attend, forward_mode = _attend(implementation, tile)
    if return_stats and implementation == "cudnn":
        raise NotImplementedError("return_stats: implementation 'cudnn' has none; choose another")
    return outputs(tile, attend, v.dtype, return_stats, forward_mode)


def outputs(tile: Tile, attend, dtype, return_stats: bool, forward_mode: bool = True):
    """What `attention` returns, by an implementation; whether that has forward mode."""
    out, stats = settle(tile, attend, forward_mode=forward_mode)
    out = jnp.swapaxes(out, 1, 2).astype(dtype)
    if not return_stats:
        return out
    report = tile.normalizer.report(stats)
    if report is None:
        raise ValueError(
            f"return_stats: {tile.normalizer} has no statistics; drop it or use softmax"
        )
    return out, jnp.swapaxes(report, 1, 2)[..., 0]


def _attend(implementation: str | None, tile: Tile):
    """How a tile is attended to in every pass of its normaliser, and whether with forward mode."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")
    if implementation == "definition":
        return definition.attend, True
    stream, name = across_devices(streaming.attend), implementation
    if name is None:
        found = {"mosaic_gpu": gpu.available, "mosaic_tpu": tpu.available}
        name = next((kernel for kernel, available in found.items() if available()), None)
    if name not in KERNELS:
        return stream, True
    kernel = importlib.import_module(f"attn_kernels.attention.{name}")
    serve = across_devices(kernel.attend, kernel=True)
    shared = parallel.current()

    def refusal(tile):
        if shared is not None and shared.mode != "all_to_all":
            return f"a sequence is shared by {shared.mode!r}; kernels work in 'all_to_all'"
        return kernel.refusal(tile)

    if implementation is None and refusal(dataclasses.replace(tile, normalizer=softmax)):
        return stream, True

    def attend(tile):
        reason = refusal(tile)
        if reason and implementation:
            raise NotImplementedError(f"implementation {implementation!r}: {reason}")
        return stream(tile) if reason else serve(tile)

    return attend, False


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    score: Score | None = None,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    normalizer: Normalizer = softmax,
    scale: float | jax.Array | None = None,
) -> jax.Array:
    """The weights `w(s[t, j])` of `attention`: `[B, H, T, S]` in float32 or better."""
    return definition.weights(tile_of(q, k, k, mask, score_mod, normalizer, scale, score))


def best_key(
    q: jax.Array,
    k: jax.Array,
    *,
    score: Score | None = None,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The key of the largest score, the first of equals: `argmax_j s[t, j]`.

    Args:
      q, k, score, mask, score_mod, scale: as in `attention`.
      implementation: "definition", "xla", or None for the latter.

    Returns:
      int32 `[B, T, H]`; -1 without allowed keys.
    """
    if implementation not in (None, "definition", "xla"):
        raise NotImplementedError(
            f"best_key has the implementations 'definition' and 'xla', not {implementation!r}"
        )
    tile = tile_of(q, k, k, mask, score_mod, softmax, scale, score)
    attend = definition.attend if implementation == "definition" else streaming.attend
    rows = Rows(jax.lax.stop_gradient(tile), attend)
    first = rows.modified(_position_of, rows.largest(1)).largest(1)
    return jnp.swapaxes(jnp.where(first == -jnp.inf, -1, -first)[..., 0], 1, 2).astype(jnp.int32)


def _position_of(score, b, h, q_index, k_index, best):
    # A score computed again may round below itself.
    least = best - 4 * jnp.finfo(best.dtype).eps * jnp.abs(best)
    return jnp.where(score >= least, -k_index, -jnp.inf)


def normalize(scores: jax.Array, normalizer: Normalizer) -> jax.Array:
    """The weights that a normaliser gives to explicit scores.

    Args:
      scores: `[B, H, T, S]`, -inf where a pair is not allowed.
      normalizer: as in `attention`.

    Returns:
      `[B, H, T, S]` in float32 or better; 0 where not allowed.
    """
    batch, heads, q_len, k_len = scores.shape
    wide = jnp.result_type(jnp.float32, scores.dtype)
    q, k = jnp.zeros((batch, q_len, heads, 1), wide), jnp.zeros((batch, k_len, 1, 1), wide)
    given = ScoreMod(_replace, (scores.astype(wide),))
    return definition.weights(tile_of(q, k, k, None, given, normalizer, None))


def _replace(score, b, h, q_index, k_index, given):
    return given


def tile_of(q, k, v, mask, score_mod, normalizer, scale, score=None) -> Tile:
    """The checked arguments of attention, heads first."""
    for name, x in ("q", q), ("k", k), ("v", v):
        if jnp.ndim(x) != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating [batch, length, heads, dim], "
                f"got {jnp.result_type(x)}{list(jnp.shape(x))}"
            )
        if not x.shape[1]:
            raise ValueError(f"{name} must have at least one position, got shape {x.shape}")
    batch, q_len, heads, dim = q.shape
    k_len = k.shape[1]
    if k.shape[0] != batch or (score is None and k.shape[3] != dim):
        raise ValueError(f"k {k.shape} must have the batch and dim of q {q.shape}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v {v.shape} must have the batch and length of k {k.shape}")
    for name, x in ("k", k), ("v", v):
        if heads % x.shape[2]:
            raise ValueError(f"{name} has {x.shape[2]} heads, which do not divide the {heads} of q")
    full = batch, heads, q_len, k_len
    for name, part in ("mask", mask), ("score_mod", score_mod), ("normalizer", normalizer):
        for x in jax.tree.leaves(part):
            if x.ndim != 4 or any(n not in (1, m) for n, m in zip(x.shape, full)):
                raise ValueError(
                    f"{name} has an operand of shape {x.shape}, which does not broadcast to "
                    f"[B, H, T, S] = {list(full)}; lay it out by `operand`"
                )
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    wide = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
    if scale is None:
        scale = 1 / math.sqrt(dim) if score is None else 1
    if not isinstance(scale, jax.Array):
        scale = np.asarray(scale)  # kernels see its sign
    scale = scale.astype(wide)
    if scale.ndim:
        raise ValueError(f"scale must be a number, got shape {scale.shape}; use a score_mod")
    return Tile(q, k, v, scale, score, mask, score_mod, normalizer)
