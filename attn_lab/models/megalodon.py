"""Megalodon: a decoder whose layers have residuals of two hops."""

from __future__ import annotations

import functools
from typing import Any

from flax import nnx

from attn_lab.models.decoder import DecoderLM
from attn_lab.nn import MegalodonLayer

LAYER = "num_heads", "z_dim", "value_dim", "ffn_dim", "ema_dim", "chunk_size", "num_groups"


def Megalodon(**arguments: Any) -> DecoderLM:
    """A decoder of `MegalodonLayer`: in chunks, behind turning averages of normed sequences.

    Args:
      arguments: those of `MegalodonLayer` (`num_heads`, `z_dim`, `value_dim`, `ffn_dim`, `ema_dim`,
        `chunk_size`, `num_groups`), and of `DecoderLM`, such as `vocab_size`, `width` and
        `num_layers`. Positions are those of the layers.

    Source: Ma et al., Megalodon, 2024, arXiv 2404.08801.
    """
    layer = {name: arguments.pop(name) for name in LAYER if name in arguments}
    settings = dict(block=functools.partial(_Block, layer), positions=None, tied=False)
    return DecoderLM(**settings | arguments)


class _Block(nnx.Module):
    """A layer with the interface of a decoder's block; it norms its input itself."""

    def __init__(self, arguments, width, **build):
        self.layer = MegalodonLayer(width, **arguments, **build)

    @property
    def mixer(self):
        return self.layer.attention

    def mixer_norm(self, x):
        return x

    def __call__(self, x, *, segment_ids=None, cache=None, rngs=None):
        y = self.layer(x, segment_ids=segment_ids, cache=cache)
        return (y, None) if cache is None else y
