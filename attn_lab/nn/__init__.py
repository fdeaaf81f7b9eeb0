"""Token mixers as Flax NNX modules: projections and state around an operator."""

import inspect
from collections.abc import Mapping
from typing import Any

from attn_lab.nn.associative import GAMBlock, GatedAssociativeMemory
from attn_lab.nn.attention import (
    DifferentialAttention,
    GatedAttention,
    MultiHeadAttention,
    NeighborhoodAttention,
    SigmoidAttention,
    SinkAttention,
)
from attn_lab.nn.bidirectional import (
    BidirectionalMixer,
    EfficientAttention,
    GeneralizedLinearAttention,
)
from attn_lab.nn.bottleneck import Latte, Linformer
from attn_lab.nn.conversion import decouple_heads, group_heads
from attn_lab.nn.convolution import BaseConv, LongConv, LongFilter
from attn_lab.nn.cross import LuongAttention, PredictedCenter, SkimAttention, SkimLayer
from attn_lab.nn.documents import ChunkedEncoder, KernelPooling
from attn_lab.nn.filters import AdaptiveFilterAttention
from attn_lab.nn.flow import FlowAttention
from attn_lab.nn.gated_linear import GatedLinearAttention, ReGLA
from attn_lab.nn.gated_units import GatedAttentionUnit, MossFormerBlock
from attn_lab.nn.grassmann import GrassmannMixing
from attn_lab.nn.heads import (
    DecoupledHeadAttention,
    DifferentialQKVAttention,
    LongShortAttention,
    MixtureOfAttentiveExperts,
    MixtureOfHeads,
)
from attn_lab.nn.hyena import H3, Hyena
from attn_lab.nn.latent import CompressedConvolutionalAttention, MultiHeadLatentAttention
from attn_lab.nn.layers import Build, Mixer, ShortConv, dropout, l2_norm
from attn_lab.nn.lean import (
    HeadEmbeddingAttention,
    LeanAttention,
    LowRankAttentionPooling,
    SimilaritySelfAttention,
)
from attn_lab.nn.linear_kernels import (
    FastmaxAttention,
    LogNormalAttention,
    LogNormalDiagAttention,
    SimplifiedLinearAttention,
)
from attn_lab.nn.linear_vision import (
    DualGatedLinearAttention,
    EfficientAttention2d,
    LINAAttention,
    MALABlock2d,
    NormAwareAttention2d,
)
from attn_lab.nn.manhattan import (
    GatedManhattanAttention,
    GatedSwinRMTBlock,
    ManhattanAttention,
    RMTBlock,
)
from attn_lab.nn.memory import NeuralMemory
from attn_lab.nn.moving_average import MegaLayer, MegalodonAttention, MegalodonLayer
from attn_lab.nn.normalizers import (
    ClippedSoftmaxAttention,
    ComplexAttention,
    CompositionalAttention,
    EntmaxAttention,
    HardAttention,
    MLPScoreAttention,
    NormalizedAttention,
    QuantizableGate,
    RectifiedLinearAttention,
    ReluAttention,
    SimilarityAttention,
    SinkhornAttention,
    TaylorAttention,
    TopKAttention,
)
from attn_lab.nn.pooling import SelfGatedPooling
from attn_lab.nn.quadrature import GalerkinAttention
from attn_lab.nn.recurrent import (
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    MatrixStateMixer,
    MultiScaleRetention,
)
from attn_lab.nn.regression import LocalLinearAttention
from attn_lab.nn.relations import (
    DifferentialIntegralAttention,
    DualAttention,
    MultiTokenAttention,
    RelationalAttention,
)
from attn_lab.nn.rwkv import RWKVTimeMixing
from attn_lab.nn.scores import (
    CosineAttention,
    GatedPositionalAttention,
    LengthScaledAttention,
    LinearBiasAttention,
    RelativeBiasAttention,
    SelectiveAttention,
)
from attn_lab.nn.selective import SelectiveLookupAttention
from attn_lab.nn.sharpened import DyDiLA
from attn_lab.nn.sparse_state import SSE
from attn_lab.nn.state_space import Mamba2
from attn_lab.nn.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer, MemoryMixer
from attn_lab.nn.transnormer import DiagAttention, NormAttention, SimpleGLU, TransNormerMixer

MIXERS: dict[str, type[Mixer]] = {
    "dot_product_attention": MultiHeadAttention,
    "sigmoid_attention": SigmoidAttention,
    "neighborhood_attention": NeighborhoodAttention,
    "sink_attention": SinkAttention,
    "gated_attention": GatedAttention,
    "differential_attention": DifferentialAttention,
    "differential_integral_attention": DifferentialIntegralAttention,
    "qk_norm_attention": CosineAttention,
    "selective_attention": SelectiveAttention,
    "length_scaled_attention": LengthScaledAttention,
    "relational_attention": DualAttention,
    "multi_token_attention": MultiTokenAttention,
    "alibi_bias": LinearBiasAttention,
    "relative_position_bias": RelativeBiasAttention,
    "clipped_softmax_attention": ClippedSoftmaxAttention,
    "complex_attention": ComplexAttention,
    "compositional_attention": CompositionalAttention,
    "entmax_attention": EntmaxAttention,
    "mlp_score_attention": MLPScoreAttention,
    "normalized_attention": NormalizedAttention,
    "quantizable_gate": QuantizableGate,
    "rectified_linear_attention": RectifiedLinearAttention,
    "relu_attention": ReluAttention,
    "similarity_attention": SimilarityAttention,
    "sinkhorn_attention": SinkhornAttention,
    "straight_through_hard_attention": HardAttention,
    "self_gated_pooling": SelfGatedPooling,
    "taylor_attention": TaylorAttention,
    "topk_attention": TopKAttention,
    "decoupled_head_attention": DecoupledHeadAttention,
    "differential_qkv_attention": DifferentialQKVAttention,
    "mixture_of_heads": MixtureOfHeads,
    "mixture_of_attentive_experts": MixtureOfAttentiveExperts,
    "long_short_attention": LongShortAttention,
    "compressed_convolutional_attention": CompressedConvolutionalAttention,
    "latent_attention": MultiHeadLatentAttention,
    "lean_attention": LeanAttention,
    "head_embedding": HeadEmbeddingAttention,
    "similarity_self_attention": SimilaritySelfAttention,
    "linear_attention": LinearAttention,
    "retention": MultiScaleRetention,
    "gated_linear_attention": GatedLinearAttention,
    "delta_rule": DeltaNet,
    "gated_delta_rule": GatedDeltaNet,
    "refined_gated_linear_attention": ReGLA,
    "ssd": Mamba2,
    "lightning_attention": TransNormerMixer,
    "norm_linear_attention": NormAttention,
    "block_diagonal_attention": DiagAttention,
    "flow_attention": FlowAttention,
    "efficient_attention": EfficientAttention,
    "generalized_linear_attention": GeneralizedLinearAttention,
    "kv_gated_linear_attention": LINAAttention,
    "adaptive_filter_attention": AdaptiveFilterAttention,
    "local_linear_attention": LocalLinearAttention,
    "sparse_state_expansion": SSE,
    "simplified_linear_attention": SimplifiedLinearAttention,
    "dynamic_differential_linear_attention": DyDiLA,
    "linear_log_normal_attention": LogNormalAttention,
    "linear_log_normal_diag_attention": LogNormalDiagAttention,
    "fastmax_attention": FastmaxAttention,
    "galerkin_attention": GalerkinAttention,
    "latte_attention": Latte,
    "linformer_attention": Linformer,
    "neural_memory_mlp": NeuralMemory,
    "base_conv": BaseConv,
    "mega": MegaLayer,
    "megalodon": MegalodonAttention,
    "wkv": RWKVTimeMixing,
    "h3": H3,
    "hyena": Hyena,
    "selective_lookup": SelectiveLookupAttention,
    "grassmann_mixing": GrassmannMixing,
    "gated_associative_memory": GatedAssociativeMemory,
    "mixed_chunk_attention": GatedAttentionUnit,
}


def find_mixer(name: str | type[Mixer]) -> type[Mixer]:
    """The module called `name`, under the operator's name in the catalogue; a class is itself.

    Raises:
      ValueError: if there is none; it lists the names.
    """
    if isinstance(name, type):
        return name
    if name not in MIXERS:
        raise ValueError(f"mixer {name!r} is unknown; choose one of {', '.join(MIXERS)}")
    return MIXERS[name]


def make_mixer(
    name: str | type[Mixer], width: int, arguments: Mapping[str, Any], build: Build, **offered: Any
) -> Mixer:
    """The mixer called `name` with its arguments, and of what is offered what it takes.

    Raises:
      ValueError: if the name is unknown, or an argument is not one of the mixer's.
    """
    arguments = dict(arguments)
    kind = find_mixer(name)
    known = {
        parameter
        for parent in kind.__mro__
        if "__init__" in vars(parent)
        for parameter in inspect.signature(parent.__init__).parameters
    } - {"self", "width", "build", "arguments", "args", "kwargs"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(f"mixer {name!r} takes no {', '.join(unknown)}; it takes {sorted(known)}")
    offered = {key: value for key, value in offered.items() if key in known - set(kind.own)}
    return kind(width, **vars(build), **(offered | arguments))


__all__ = [
    "H3",
    "MIXERS",
    "SSE",
    "AdaptiveFilterAttention",
    "BaseConv",
    "BidirectionalMixer",
    "Build",
    "ChunkedEncoder",
    "ClippedSoftmaxAttention",
    "ComplexAttention",
    "CompositionalAttention",
    "CompressedConvolutionalAttention",
    "CosineAttention",
    "DecoupledHeadAttention",
    "DeltaNet",
    "DiagAttention",
    "DifferentialAttention",
    "DifferentialIntegralAttention",
    "DifferentialQKVAttention",
    "DualAttention",
    "DualGatedLinearAttention",
    "DyDiLA",
    "EfficientAttention",
    "EfficientAttention2d",
    "EntmaxAttention",
    "FastmaxAttention",
    "FlowAttention",
    "GAMBlock",
    "GalerkinAttention",
    "GatedAssociativeMemory",
    "GatedAttention",
    "GatedAttentionUnit",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedManhattanAttention",
    "GatedPositionalAttention",
    "GatedSwinRMTBlock",
    "GeneralizedLinearAttention",
    "GrassmannMixing",
    "HardAttention",
    "HeadEmbeddingAttention",
    "Hyena",
    "KernelPooling",
    "LINAAttention",
    "Latte",
    "LeanAttention",
    "LengthScaledAttention",
    "LinearAttention",
    "LinearBiasAttention",
    "Linformer",
    "LocalLinearAttention",
    "LogNormalAttention",
    "LogNormalDiagAttention",
    "LongConv",
    "LongFilter",
    "LongShortAttention",
    "LowRankAttentionPooling",
    "LuongAttention",
    "MALABlock2d",
    "MLPScoreAttention",
    "Mamba2",
    "ManhattanAttention",
    "MatrixStateMixer",
    "MegaLayer",
    "MegalodonAttention",
    "MegalodonLayer",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "MemoryMixer",
    "Mixer",
    "MixtureOfAttentiveExperts",
    "MixtureOfHeads",
    "MossFormerBlock",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiScaleRetention",
    "MultiTokenAttention",
    "NeighborhoodAttention",
    "NeuralMemory",
    "NormAttention",
    "NormAwareAttention2d",
    "NormalizedAttention",
    "PredictedCenter",
    "QuantizableGate",
    "RMTBlock",
    "RWKVTimeMixing",
    "ReGLA",
    "RectifiedLinearAttention",
    "RelationalAttention",
    "RelativeBiasAttention",
    "ReluAttention",
    "SelectiveAttention",
    "SelectiveLookupAttention",
    "SelfGatedPooling",
    "ShortConv",
    "SigmoidAttention",
    "SimilarityAttention",
    "SimilaritySelfAttention",
    "SimpleGLU",
    "SimplifiedLinearAttention",
    "SinkAttention",
    "SinkhornAttention",
    "SkimAttention",
    "SkimLayer",
    "TaylorAttention",
    "TopKAttention",
    "TransNormerMixer",
    "decouple_heads",
    "dropout",
    "find_mixer",
    "group_heads",
    "l2_norm",
    "make_mixer",
]
