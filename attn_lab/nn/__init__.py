"""Token mixers as Flax NNX modules: projections and state around an operator."""

import inspect
from collections.abc import Mapping
from typing import Any

from attn_lab.nn.attention import (
    DifferentialAttention,
    GatedAttention,
    MultiHeadAttention,
    SigmoidAttention,
    SinkAttention,
)
from attn_lab.nn.convolution import BaseConv
from attn_lab.nn.layers import Build, Mixer, ShortConv, dropout, l2_norm
from attn_lab.nn.recurrent import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    LinearAttention,
    MatrixStateMixer,
    MultiScaleRetention,
)

MIXERS: dict[str, type[Mixer]] = {
    "dot_product_attention": MultiHeadAttention,
    "sigmoid_attention": SigmoidAttention,
    "sink_attention": SinkAttention,
    "gated_attention": GatedAttention,
    "differential_attention": DifferentialAttention,
    "linear_attention": LinearAttention,
    "retention": MultiScaleRetention,
    "gated_linear_attention": GatedLinearAttention,
    "delta_rule": DeltaNet,
    "gated_delta_rule": GatedDeltaNet,
    "base_conv": BaseConv,
}


def find_mixer(name: str) -> type[Mixer]:
    """The module called `name`, under the operator's name in the catalogue.

    Raises:
      ValueError: if there is none; it lists the names.
    """
    if name not in MIXERS:
        raise ValueError(f"mixer {name!r} is unknown; choose one of {', '.join(MIXERS)}")
    return MIXERS[name]


def make_mixer(
    name: str, width: int, arguments: Mapping[str, Any], build: Build, **offered: Any
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
    offered = {name: value for name, value in offered.items() if name in known}
    return kind(width, **vars(build), **(offered | arguments))


__all__ = [
    "MIXERS",
    "BaseConv",
    "Build",
    "DeltaNet",
    "DifferentialAttention",
    "GatedAttention",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "LinearAttention",
    "MatrixStateMixer",
    "Mixer",
    "MultiHeadAttention",
    "MultiScaleRetention",
    "ShortConv",
    "SigmoidAttention",
    "SinkAttention",
    "dropout",
    "find_mixer",
    "l2_norm",
    "make_mixer",
]
