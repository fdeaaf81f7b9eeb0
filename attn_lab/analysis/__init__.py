"""What attention does and costs: figures computed from patterns, weights and states."""

from attn_lab.analysis.memory import hebbian_recall, recall_capacity
from attn_lab.analysis.parallel import ring_load
from attn_lab.analysis.spectrum import spectral_gap
from attn_lab.analysis.systems import as_ltv, dsf_transfer_matrix, ltv_distance, ltv_unroll
from attn_lab.analysis.tiles import neighborhood_tile_speedup

__all__ = [
    "as_ltv",
    "dsf_transfer_matrix",
    "hebbian_recall",
    "ltv_distance",
    "ltv_unroll",
    "neighborhood_tile_speedup",
    "recall_capacity",
    "ring_load",
    "spectral_gap",
]
