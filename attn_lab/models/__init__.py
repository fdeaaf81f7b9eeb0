"""Models of any token mixers."""

from attn_lab.models.decoder import DecoderLM, count_parameters
from attn_lab.models.generate import generate
from attn_lab.models.grassmann import GrassmannLM
from attn_lab.models.megalodon import Megalodon
from attn_lab.models.parity import first_logit, parity_logit
from attn_lab.models.schedule import layer_schedule
from attn_lab.models.titans import Titans
from attn_lab.models.transnormer import TransNormer, TransNormerLLM
from attn_lab.models.vision import CCT, CVT, CompactTransformer, ViTLite

__all__ = [
    "CCT",
    "CVT",
    "CompactTransformer",
    "DecoderLM",
    "GrassmannLM",
    "Megalodon",
    "Titans",
    "TransNormer",
    "TransNormerLLM",
    "ViTLite",
    "count_parameters",
    "first_logit",
    "generate",
    "layer_schedule",
    "parity_logit",
]
