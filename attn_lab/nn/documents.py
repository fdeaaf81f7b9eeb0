"""Long documents: encoded in overlapping chunks, and matched with a query window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab.nn.layers import Build, l2_norm


class ChunkedEncoder(nnx.Module):
    """Chunks of a document are encoded with some terms on both sides, whose outputs are dropped.

    An output depends on no term further than `chunk + overlap` away. One layer of attention is
    attention under `ops.halo_mask([T], chunk, overlap)`; in deeper encoders the copies of a term
    in two chunks differ.

    Args:
      encoder: a module `encoder(x, segment_ids=)` of `[N, chunk + 2 overlap, C]`, which keeps
        apart the terms of different `segment_ids` (1 in the document, 0 outside): a `Mixer` with
        `causal=False`, for example.
      chunk: terms of a chunk.
      overlap: terms that it sees on either side.

    Raises:
      ValueError: if the chunk is empty or the overlap negative.

    Source: Hofstätter et al., 2020, arXiv 2005.04908.
    """

    def __init__(self, encoder: Callable[..., jax.Array], *, chunk: int = 40, overlap: int = 5):
        if chunk < 1 or overlap < 0:
            raise ValueError(f"chunk={chunk} must be at least 1 and overlap={overlap} at least 0")
        self.encoder, self.chunk, self.overlap = encoder, chunk, overlap

    def __call__(
        self, x: jax.Array, *, mask: jax.Array | None = None, max_chunks: int | None = None
    ) -> jax.Array:
        """Outputs `[B, T, C]`, 0 at padding.

        Args:
          x: `[B, T, C]`.
          mask: bool `[B, T]`, True in the document; padding has no influence.
          max_chunks: how many chunks of the whole batch have terms at most: only as many are
            encoded. The default encodes all. If there are more, outputs are NaN.
        """
        batch, length, _ = x.shape
        mask = jnp.ones((batch, length), bool) if mask is None else mask
        count = -(-length // self.chunk)
        after = count * self.chunk - length + self.overlap
        places = self.chunk * jnp.arange(count)[:, None] + jnp.arange(self.chunk + 2 * self.overlap)

        def unfold(x):
            x = jnp.pad(x, ((0, 0), (self.overlap, after)) + ((0, 0),) * (x.ndim - 2))[:, places]
            return x.reshape(batch * count, *x.shape[2:])

        chunks, inside = unfold(jnp.where(mask[..., None], x, 0)), unfold(mask)
        core = slice(self.overlap, self.overlap + self.chunk)
        if max_chunks is None:
            y = self._encode(chunks, inside)[:, core]
        else:
            filled = inside[:, core].any(1)
            order = jnp.argsort(~filled, stable=True)[:max_chunks]
            y = self._encode(chunks[order], inside[order])[:, core]
            rest = jnp.where(filled.sum() > max_chunks, jnp.nan, 0).astype(y.dtype)
            y = jnp.full((batch * count, *y.shape[1:]), rest).at[order].add(y)
        y = y.reshape(batch, count * self.chunk, -1)[:, :length]
        return jnp.where(mask[..., None], y, 0)

    def _encode(self, chunks, inside):
        return self.encoder(chunks, segment_ids=inside.astype(jnp.int32))


class KernelPooling(nnx.Module):
    """How well a document matches a query, from soft counts of similar terms in windows of it.

    `K_ijn = exp(-(cos(q_i, d_j) - mu_n)^2 / (2 sigma_n^2))`, `s_iwn = sum_{j in w} K_ijn`; each
    count saturates, windows score `u_w = sum_n weight_n sum_i sat(s_iwn)`, and the document
    `sum_r gain_r u_(r)` over its best windows. A count saturates as
    `a max(s, 1e-10)^(1 / b) - c`, where a, b and c are linear in the influence of term i and the
    number of terms of window w, or as `ln max(mult_n s, 1e-10)`.

    Args:
      mu, sigma: centres and widths of the kernels; one sigma serves all.
      window, stride: of the moving window, in terms of the document.
      top: how many windows are combined.
      saturation: "power" or "log".
      build: keywords of `Build`.

    Raises:
      ValueError: if sigmas are not one, or one for each mu, or not positive, if the stride
        is not from 1 to the window, if top is below 1, or on an unknown saturation.

    Source: Hofstätter et al., 2020, arXiv 2005.04908.
    """

    def __init__(
        self,
        *,
        mu: Sequence[float] = (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9),
        sigma: float | Sequence[float] = 0.1,
        window: int = 30,
        stride: int = 2,
        top: int = 3,
        saturation: str = "power",
        **build: Any,
    ):
        build, kernels = Build(**build), len(mu)
        sigma = (sigma,) * kernels if isinstance(sigma, int | float) else tuple(sigma)
        if len(sigma) != kernels or min(sigma) <= 0:
            raise ValueError(
                f"sigma must be positive, one or one for each of {kernels} mu: {sigma}"
            )
        if not 1 <= stride <= window or top < 1:
            raise ValueError(
                f"stride={stride} must be from 1 to window={window}, and top={top} at least 1"
            )
        if saturation not in ("power", "log"):
            raise ValueError(f"saturation must be 'power' or 'log', got {saturation!r}")
        self.mu, self.sigma = tuple(mu), sigma
        self.window, self.stride, self.top = window, stride, top
        constant, none = nnx.initializers.constant, nnx.data(None)
        power = saturation == "power"
        self.slopes = build.param((2, 3), _small) if power else none
        self.offsets = build.param((3,), constant(100.0)) if power else none
        self.mult = none if power else build.param((kernels,), constant(1.0))
        self.kernel_weight = build.param((kernels,), _small)
        self.gain = build.param((top,), constant(1.0))

    def __call__(
        self,
        query: jax.Array,
        document: jax.Array,
        *,
        query_mask: jax.Array | None = None,
        mask: jax.Array | None = None,
        influence: jax.Array | None = None,
    ) -> jax.Array:
        """Scores `[B]` in float32 or better; 0 for a document without terms.

        Args:
          query: `[B, Q, C]`.
          document: `[B, T, C]`.
          query_mask: bool `[B, Q]`, True at terms.
          mask: bool `[B, T]`, True at terms.
          influence: `[B, Q]` of the query's terms on saturation, such as their inverse document
            frequency; by default 0.
        """
        wide = jnp.result_type(query, document, jnp.float32)
        query, document = l2_norm(query.astype(wide)), l2_norm(document.astype(wide))
        ones = jnp.ones(query.shape[:2], wide)
        query_mask = ones if query_mask is None else query_mask.astype(wide)
        mask = jnp.ones(document.shape[:2], wide) if mask is None else mask.astype(wide)
        influence = 0 * ones if influence is None else influence.astype(wide)
        cosine = jnp.einsum("bqc,btc->bqt", query, document)[..., None]
        mu, sigma = jnp.asarray(self.mu, wide), jnp.asarray(self.sigma, wide)
        kernels = jnp.exp(-((cosine - mu) ** 2) / (2 * sigma**2)) * mask[:, None, :, None]
        counts, terms = self._sums(kernels), self._sums(mask[:, None, :, None])[:, 0, :, 0]
        soft = self._saturate(counts, terms, influence) * query_mask[:, :, None, None]
        scores = jnp.einsum("bqwn,n->bw", soft, self.kernel_weight[...].astype(wide))
        scores = jnp.where(self._exist(mask), scores, -jnp.inf)
        best = jax.lax.top_k(scores, min(self.top, scores.shape[1]))[0]
        gain = self.gain[: best.shape[1]].astype(wide)
        return jnp.sum(gain * jnp.where(best > -jnp.inf, best, 0), -1)

    def _sums(self, x):
        """`[B, Q, T, N]` to sums over windows `[B, Q, W, N]`, of which the last may be short."""
        length, steps = x.shape[2], -(-max(x.shape[2] - self.window, 0) // self.stride)
        after = steps * self.stride + self.window - length
        size, stride = (1, 1, self.window, 1), (1, 1, self.stride, 1)
        pad = ((0, 0), (0, 0), (0, after), (0, 0))
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, size, stride, pad)

    def _exist(self, mask):
        """Whether a window `[B, W]` reaches terms beyond the one before; padding makes others."""
        length = mask.shape[1]
        steps = -(-max(length - self.window, 0) // self.stride)
        ends = jnp.minimum(self.stride * jnp.arange(steps + 1) + self.window, length)
        return jnp.diff(jnp.cumsum(mask, 1)[:, ends - 1], axis=1, prepend=0) > 0

    def _saturate(self, counts, terms, influence):
        if self.mult is not None:
            return jnp.log(jnp.maximum(self.mult[...].astype(counts.dtype) * counts, 1e-10))
        slopes, offsets = (p[...].astype(counts.dtype) for p in (self.slopes, self.offsets))
        linear = influence[:, :, None, None] * slopes[0] + terms[:, None, :, None] * slopes[1]
        a, b, c = jnp.split(linear + offsets, 3, axis=-1)
        return a * jnp.maximum(counts, 1e-10) ** (1 / b) - c


def _small(*arguments):
    return nnx.initializers.uniform(0.028)(*arguments) - 0.014
