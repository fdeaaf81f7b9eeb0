"""Rows of attention patterns."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import Mechanism

ROWS = (
    Mechanism(
        "sliding_window_mask",
        ops.sliding_window_mask,
        "Longformer: The Long-Document Transformer",
        2020,
        "2004.05150",
        "mask",
        settings={"left": 3, "right": 0},
        golden=("sliding_window_mask", "block_map"),
    ),
    Mechanism(
        "segment_mask",
        ops.segment_mask,
        "Human Guided Exploitation of Interpretable Attention Patterns",
        2021,
        "2112.05364",
        "mask",
        golden=("segment_mask",),
    ),
)
