"""Models of any token mixers."""

from attn_lab.models.decoder import DecoderLM, count_parameters
from attn_lab.models.generate import generate

__all__ = ["DecoderLM", "count_parameters", "generate"]
