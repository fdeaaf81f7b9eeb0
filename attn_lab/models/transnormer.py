"""TransNormer and TransNormerLLM: decoders of their layers, norms and MLPs."""

from __future__ import annotations

from typing import Any

from attn_lab.models.decoder import DecoderLM


def TransNormerLLM(
    *,
    num_heads: int = 4,
    hidden_dim: int | None = None,
    act: str = "silu",
    mlp_ratio: float = 8 / 3,
    **arguments: Any,
) -> DecoderLM:
    """A decoder of lightning attention with gates, gated linear units and norms without weights.

    Only the first layer has positions; in all, weights fall with distance, more in early layers.

    Args:
      num_heads, hidden_dim, act: of every layer's `TransNormerMixer`.
      mlp_ratio: hidden width of the gated units over `width`.
      arguments: further ones of `DecoderLM`, such as `vocab_size`, `width` and `num_layers`.

    Source: Qin et al., TransNormerLLM, 2023, arXiv 2307.14995.
    """
    settings = dict(
        mixers="lightning_attention",
        mixer_args=dict(num_heads=num_heads, hidden_dim=hidden_dim, act=act),
        mlp="glu",
        mlp_ratio=mlp_ratio,
        norm="simple_rms",
        norm_eps=1e-6,
        bias=False,
        positions=None,
        tied=False,
    )
    return DecoderLM(**settings | arguments)


def TransNormer(
    *,
    num_layers: int,
    num_diag_layers: int | None = None,
    num_heads: int = 4,
    block_size: int = 64,
    feature_map: str = "elu1",
    **arguments: Any,
) -> DecoderLM:
    """A decoder whose first layers see blocks of tokens, and the others all by normed sums.

    Args:
      num_layers: L.
      num_diag_layers: how many layers are `DiagAttention`, by default half of them; the others are
        `NormAttention`.
      num_heads: of every layer.
      block_size: of `DiagAttention`.
      feature_map: of `NormAttention`.
      arguments: further ones of `DecoderLM`, such as `vocab_size` and `width`.

    Raises:
      ValueError: if `num_diag_layers` is negative or above `num_layers`.

    Source: Qin et al., TransNormer, 2022, arXiv 2210.10340.
    """
    first = num_layers // 2 if num_diag_layers is None else num_diag_layers
    if not 0 <= first <= num_layers:
        raise ValueError(f"num_diag_layers must be from 0 to {num_layers}, got {num_diag_layers}")
    diag = "block_diagonal_attention", dict(num_heads=num_heads, block_size=block_size)
    norm = "norm_linear_attention", dict(num_heads=num_heads, feature_map=feature_map)
    mixers, mixer_args = zip(*[diag] * first, *[norm] * (num_layers - first))
    settings = dict(num_layers=num_layers, mixers=mixers, mixer_args=mixer_args)
    return DecoderLM(**settings | arguments)
