"""Multi-head attention with other normalisers than softmax, and with other scores of pairs."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import Build


class ClippedSoftmaxAttention(MultiHeadAttention):
    """Multi-head attention whose softmax is stretched to [gamma, eta] and clipped.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      gamma, eta: as in `ops.clipped_softmax_attention`.

    Source: Bondarenko et al., 2023, arXiv 2306.12929.
    """

    def __init__(self, width: int, *, gamma: float = -0.03, eta: float = 1.0, **arguments: Any):
        attention = functools.partial(ops.clipped_softmax_attention, gamma=gamma, eta=eta)
        super().__init__(width, attention=attention, **arguments)


class QuantizableGate(MultiHeadAttention):
    """Multi-head attention with a small gate for each head: `sigmoid(G_h(x_h)) * out_h`.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout; `num_heads` divides the width.
      kind: "linear" (one map of the head's slice of the input), "mlp" (a hidden layer of a quarter
        of the slice) or "all_heads" (one map of the whole input).
      init_prob: of the gates at first.

    Source: Bondarenko et al., 2023, arXiv 2306.12929.
    """

    drops = False

    def __init__(
        self, width: int, *, kind: str = "linear", init_prob: float = 0.5, **arguments: Any
    ):
        super().__init__(width, **arguments)
        if kind not in ("linear", "mlp", "all_heads"):
            raise ValueError(f"kind must be 'linear', 'mlp' or 'all_heads', got {kind!r}")
        if not 0 < init_prob < 1 or width % self.num_heads:
            raise ValueError(
                f"init_prob={init_prob} must be within (0, 1), and num_heads divide {width}"
            )
        build, heads = Build.of(arguments), self.num_heads
        dim = width // heads
        hidden = {"linear": (dim,), "mlp": (dim, max(dim // 4, 1)), "all_heads": (width,)}[kind]
        heads_apart = 1 if kind == "all_heads" else heads
        outputs = (*hidden[1:], heads if kind == "all_heads" else 1)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
        self.maps = nnx.List(
            [build.param((heads_apart, n, m), init) for n, m in zip(hidden, outputs)]
        )
        start = jnp.log(init_prob / (1 - init_prob))
        self.offset = build.param((heads,), nnx.initializers.constant(start))

    def _project(self, heads, x):
        hidden = x.reshape(*x.shape[:2], self.maps[0].shape[0], -1)
        for n, kernel in enumerate(self.maps):
            hidden = jax.nn.relu(hidden) if n else hidden
            hidden = jnp.einsum("bthn,hnm->bthm", hidden, kernel[...].astype(x.dtype))
        gate = hidden.reshape(*heads.shape[:3], 1) + self.offset[...][:, None].astype(x.dtype)
        return super()._project(ops.apply_gate(heads, gate), x)


class EntmaxAttention(MultiHeadAttention):
    """Multi-head attention with entmax weights, whose alpha `1 + sigmoid(a_h)` is learned.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.

    Source: Correia, Niculae & Martins, 2019, arXiv 1909.00015.
    """

    drops = False

    def __init__(self, width: int, **arguments: Any):
        super().__init__(width, **arguments)
        build = Build.of(arguments)
        self.sparsity = build.param((self.num_heads,), nnx.initializers.zeros)

    def _attend(self, q, k, v, mask, rngs):
        alpha = 1 + jax.nn.sigmoid(self.sparsity[...])
        return ops.entmax_attention(q, k, v, alpha, mask=mask)


class SinkhornAttention(MultiHeadAttention):
    """Multi-head attention with nearly doubly stochastic weights, over whole sequences alone.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout and with `causal=False`.
      num_iters: scalings of rows and columns in turn.

    Source: Sander et al., 2021, arXiv 2110.11773.
    """

    decodes = False

    def __init__(self, width: int, *, num_iters: int = 3, causal: bool = True, **arguments: Any):
        if causal:
            raise ValueError("causal must be False: a column's scaling sees all queries")
        attention = functools.partial(ops.sinkhorn_attention, num_iters=num_iters)
        super().__init__(width, attention=attention, causal=False, **arguments)


class ReluAttention(MultiHeadAttention):
    """Multi-head attention with relu weights over a function of the number of visible keys.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      length_scaling, gamma: as in `ops.relu_attention`.

    Source: Shen et al., 2023, arXiv 2302.06461.
    """

    def __init__(
        self,
        width: int,
        *,
        length_scaling: str = "sqrt_half",
        gamma: float = 1.0,
        **arguments: Any,
    ):
        attention = functools.partial(
            ops.relu_attention, length_scaling=length_scaling, gamma=gamma
        )
        super().__init__(width, attention=attention, **arguments)


class RectifiedLinearAttention(MultiHeadAttention):
    """Multi-head attention with relu weights and one RMS norm over all heads.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      gated: whether a sigmoid gate follows the norm.

    Source: Zhang, Titov & Sennrich, 2021, arXiv 2104.07012.
    """

    drops = False

    def __init__(self, width: int, *, gated: bool = True, **arguments: Any):
        super().__init__(width, **arguments)
        build, size = Build.of(arguments), (self.num_heads * self.value_dim,)
        self.norm_scale = build.param(size, nnx.initializers.ones)
        gate = nnx.initializers.normal(1.0)
        self.norm_gate = build.param(size, gate) if gated else nnx.data(None)

    def _attend(self, q, k, v, mask, rngs):
        gate = None if self.norm_gate is None else self.norm_gate[...]
        return ops.rectified_linear_attention(q, k, v, self.norm_scale[...], gate, mask=mask)

    def weights(self, x, *, segment_ids=None):
        raise ValueError("RectifiedLinearAttention has no attention weights: a norm follows them")


class NormalizedAttention(MultiHeadAttention):
    """Multi-head attention with standardised scores, a gain and a shift for each head.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      context: the training length n; outputs are over `sqrt(n)`.

    Source: Richter & Wattenhofer, 2020, arXiv 2005.09561.
    """

    drops = False

    def __init__(self, width: int, *, context: int = 64, **arguments: Any):
        super().__init__(width, **arguments)
        build, self.context = Build.of(arguments), context
        self.gain = build.param((self.num_heads,), nnx.initializers.ones)
        self.shift = build.param((self.num_heads,), nnx.initializers.zeros)

    def _attend(self, q, k, v, mask, rngs):
        out = ops.normalized_attention(q, k, v, self.gain[...], self.shift[...], mask=mask)
        return out * (k.shape[1] / self.context) ** 0.5


class SimilarityAttention(MultiHeadAttention):
    """Multi-head attention with weights `sigmoid(s)` or `elu(s) + 1`, normalised or not.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      similarity, normalize: as in `ops.similarity_attention`.

    Source: Gu et al., 2024, arXiv 2410.10781.
    """

    def __init__(
        self,
        width: int,
        *,
        similarity: str = "elu1",
        normalize: bool = True,
        **arguments: Any,
    ):
        attention = functools.partial(
            ops.similarity_attention, similarity=similarity, normalize=normalize
        )
        super().__init__(width, attention=attention, **arguments)


class TaylorAttention(MultiHeadAttention):
    """Multi-head attention with weights `1 + s + s^2 / 2`, normalised.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.

    Source: Deconstructing Attention, 2025, arXiv 2510.11602.
    """

    def __init__(self, width: int, **arguments: Any):
        super().__init__(width, attention=ops.taylor_attention, **arguments)


class TopKAttention(MultiHeadAttention):
    """Multi-head softmax attention over the best keys of every query.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      top_k: how many keys.

    Source: Zhao et al., 2019, arXiv 1912.11637.
    """

    def __init__(self, width: int, *, top_k: int = 8, **arguments: Any):
        attention = functools.partial(ops.topk_attention, top_k=top_k)
        super().__init__(width, attention=attention, **arguments)


class HardAttention(MultiHeadAttention):
    """Multi-head attention that copies the best key's value, with the gradient of softmax.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.

    Source: Bengio, Leonard & Courville, 2013, arXiv 1308.3432.
    """

    def __init__(self, width: int, **arguments: Any):
        super().__init__(width, attention=ops.straight_through_hard_attention, **arguments)


class CompositionalAttention(MultiHeadAttention):
    """Multi-head attention with weights of tanh similarity times a gate of dissimilarity.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      alpha, beta: as in `ops.compositional_attention`.
      gate: "scaled", "none", or, if not causal, "centered".

    Source: Comateformer, 2024, arXiv 2412.07220.
    """

    def __init__(
        self,
        width: int,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gate: str = "scaled",
        causal: bool = True,
        **arguments: Any,
    ):
        if causal and gate == "centered":
            raise ValueError("gate='centered' needs causal=False: its mean is over all queries")
        attention = functools.partial(
            ops.compositional_attention, alpha=alpha, beta=beta, gate=gate
        )
        super().__init__(width, attention=attention, causal=causal, **arguments)


class ComplexAttention(MultiHeadAttention):
    """Multi-head attention of complex queries and keys, with a learned phase for each head.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout; the head dimension is even.
      rope_theta: base of the rotary part of the phase.

    Source: ComplexFormer, 2025, arXiv 2505.10222.
    """

    drops = False

    def __init__(self, width: int, *, rope_theta: float = 10000.0, **arguments: Any):
        super().__init__(width, rope_theta=rope_theta, **arguments)
        if self.head_dim % 2 or self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"head_dim={self.head_dim} must be even, and num_kv_heads={self.num_kv_heads} the "
                f"{self.num_heads} query heads, each of which turns keys by its own phases"
            )
        build, half = Build.of(arguments), self.head_dim // 2
        normal = nnx.initializers.normal(half**-0.5)
        self.delta = build.param((self.num_heads, half), normal)
        self.phase = build.param((self.num_heads, half), nnx.initializers.zeros)

    def _modulate(self, q, k, v, x):
        delta, phase = self.delta[...], self.phase[...]
        return ops.complex_features(q, delta, phase), ops.complex_features(k, delta), v

    def _attend(self, q, k, v, mask, rngs):
        return ops.dot_product_attention(q, k, v, mask=mask, scale=1.0)


class MLPScoreAttention(MultiHeadAttention):
    """Multi-head attention scored by a small network of the projected query and key.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      score_dim: P, channels of projected queries and keys, at least 2.

    Source: Neural Attention, 2025, arXiv 2502.17206.
    """

    drops = False

    def __init__(
        self, width: int, *, score_dim: int = 2, value_dim: int | None = None, **arguments: Any
    ):
        if score_dim < 2:
            raise ValueError(f"score_dim must be at least 2, got {score_dim}")
        heads = arguments.get("num_heads", 4)
        value_dim = width // heads if value_dim is None else value_dim
        super().__init__(width, head_dim=score_dim, value_dim=value_dim, **arguments)
        build, sizes = Build.of(arguments), (2 * score_dim, score_dim, score_dim // 2, 1)
        layers = itertools.pairwise(sizes)
        self.network = nnx.List([build.linear(n, m, True) for n, m in layers])

    def _attend(self, q, k, v, mask, rngs):
        weights = [p[...] for layer in self.network for p in (layer.kernel, layer.bias)]
        return ops.mlp_score_attention(q, k, v, *weights, mask=mask)
