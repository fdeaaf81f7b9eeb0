"""Titans: decoders that attend to few tokens and remember all in networks that learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_lab.models.decoder import DecoderLM
from attn_lab.nn import MemoryAsContext, MemoryAsGate, MemoryAsLayer, NeuralMemory

VARIANTS = {"mac": MemoryAsContext, "mag": MemoryAsGate, "mal": MemoryAsLayer}


def Titans(
    *,
    num_layers: int,
    variant: str = "mac",
    num_persistent: int = 4,
    segment_len: int = 64,
    window: int = 64,
    memory: type[NeuralMemory] = NeuralMemory,
    memory_args: Mapping[str, Any] | None = None,
    num_heads: int = 4,
    **arguments: Any,
) -> DecoderLM:
    """A decoder whose layers join short attention, a neural memory and learned tokens.

    Args:
      num_layers: L.
      variant: "mac" (the memory's answers are keys of the attention), "mag" (it gates the
        attention) or "mal" (attention reads its output).
      num_persistent: learned tokens before every sequence, in every layer.
      segment_len: tokens of a segment, for "mac".
      window: tokens that attention sees back, for "mag" and "mal".
      memory: the memory's class, `NeuralMemory` or one derived from it.
      memory_args: its arguments.
      num_heads: of attention, and of the memory unless `memory_args` say.
      arguments: further ones of `DecoderLM`, such as `vocab_size` and `width`.

    Raises:
      ValueError: if the variant is unknown.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    reach = {"segment_len": segment_len} if variant == "mac" else {"window": window}
    layer = dict(
        num_heads=num_heads,
        num_persistent=num_persistent,
        memory=memory,
        memory_args={"num_heads": num_heads} | dict(memory_args or {}),
        **reach,
    )
    settings = dict(
        num_layers=num_layers,
        mixers=[VARIANTS[variant]] * num_layers,
        mixer_args=layer,
        mlp="swiglu",
        norm="rms",
    )
    return DecoderLM(**settings | arguments)
