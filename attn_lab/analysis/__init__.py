"""What attention does and costs: figures computed from patterns and weights."""

from attn_lab.analysis.tiles import neighborhood_tile_speedup

__all__ = ["neighborhood_tile_speedup"]
