"""A decoder without attention, of the planes that tokens span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_lab.models.decoder import DecoderLM


def GrassmannLM(
    *,
    reduced_dim: int = 32,
    offsets: Sequence[int] | Sequence[Sequence[int]] = (1, 2, 4, 8, 12, 16),
    **arguments: Any,
) -> DecoderLM:
    """A decoder whose layers mix tokens by `nn.GrassmannMixing`.

    Args:
      reduced_dim: of the tokens whose planes are taken.
      offsets: distances back, of all layers, or a sequence of them for each layer.
      arguments: further ones of `DecoderLM`, such as `vocab_size`, `width` and `num_layers`.

    Raises:
      ValueError: if an offset is not positive, or there are not as many sequences as layers.

    Source: arXiv 2512.19428, 2025.
    """
    settings: Any = dict(reduced_dim=reduced_dim, offsets=offsets)
    if any(isinstance(each, Sequence) for each in offsets):
        settings = [dict(reduced_dim=reduced_dim, offsets=each) for each in offsets]
    return DecoderLM(**dict(mixers="grassmann_mixing", mixer_args=settings) | arguments)
