"""One row for every mechanism: the table that tests, benchmarks, experiments and docs read.

`python -m attn_lab.catalogue README.md` writes the table of mechanisms into that file.
"""

import dataclasses
import inspect
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attn_lab import ops

START, END = "<!-- mechanisms: start -->", "<!-- mechanisms: end -->"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of example arguments, under the letters that rows use for them."""

    B: int = 2
    T: int = 16
    S: int = 16
    H: int = 4
    K: int = 2
    D: int = 8
    V: int = 8
    P: int = 2


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """A mechanism and what is known of it.

    Attributes:
      name: under which experiments, benchmarks and documents know it.
      function: the operator.
      title, year, arxiv: the paper that defined it; `arxiv` may be empty.
      family: "attention", "recurrence", "convolution", "mask" or "position".
      arguments: array arguments by name: a kind (see `KINDS`) and the letters of `Sizes` that make
        up its shape.
      settings: other keyword arguments.
      causal: the patterns in time that it has: (False, True), (True,) or (False,). If it has both
        it takes the keyword `causal`.
      cross: whether keys may have another length than queries.
      variants: keyword arguments that choose the implementation; the first one is the definition.
      flops: multiplications and additions of the forward pass, from the sizes.
      sizes: sizes that make it what it is: a number, or the letter of the size that it equals.
      golden: stems of the files in tests/golden that define its values.
    """

    name: str
    function: Callable
    title: str
    year: int
    arxiv: str
    family: str
    arguments: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    causal: tuple[bool, ...] = (False, True)
    cross: bool = False
    variants: tuple[Mapping[str, str], ...] = ({},)
    flops: Callable[[Sizes], int] = lambda s: 0
    sizes: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    golden: tuple[str, ...] = ()

    def fit(self, sizes: Sizes) -> Sizes:
        """`sizes` as this mechanism needs them."""
        own = self.sizes if self.cross else {"S": "T", **self.sizes}
        values = {a: getattr(sizes, b) if isinstance(b, str) else b for a, b in own.items()}
        return dataclasses.replace(sizes, **values)

    def example(self, sizes: Sizes, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
        """Random arrays for its arguments; gates and write strengths are in their usual range."""
        sizes, arrays = self.fit(sizes), {}
        for n, (name, (kind, letters)) in enumerate(self.arguments.items()):
            shape = [getattr(sizes, letter) for letter in letters]
            arrays[name] = KINDS[kind](jax.random.fold_in(key, n), shape).astype(dtype)
        return arrays

    def call(self, arrays: Mapping[str, jax.Array], *, causal: bool | None = None, **keywords):
        """The operator on example arrays; `causal` is passed on if it is a choice."""
        if len(self.causal) > 1:
            keywords["causal"] = self.causal[-1] if causal is None else causal
        return self.function(**arrays, **self.settings, **keywords)

    def bytes(self, sizes: Sizes, dtype=jnp.bfloat16) -> int:
        """The fewest bytes that a forward pass moves: every input and the output once."""
        arrays = jax.eval_shape(lambda key: self.example(sizes, key, dtype), jax.random.key(0))
        leaves = jax.tree.leaves((arrays, jax.eval_shape(self.call, arrays)))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    @property
    def summary(self) -> str:
        """The first sentence of the operator's docstring."""
        return inspect.getdoc(self.function).split("\n\n")[0].replace("\n", " ")


def _unit(key, shape):
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


KINDS: Mapping[str, Callable[[jax.Array, list[int]], jax.Array]] = {
    "normal": jax.random.normal,
    "unit": _unit,
    "log_decay": lambda key, shape: jax.nn.log_sigmoid(2 + jax.random.normal(key, shape)),
    "beta": lambda key, shape: jax.nn.sigmoid(jax.random.normal(key, shape)),
    "small": lambda key, shape: jax.random.normal(key, shape) / math.sqrt(shape[0]),
}


def _softmax_flops(s: Sizes) -> int:
    return 2 * s.B * s.H * s.T * s.S * (s.D + s.V)


def _recurrence_flops(s: Sizes) -> int:
    return 4 * s.B * s.H * s.T * s.D * s.V


def _delta_flops(s: Sizes) -> int:
    return 6 * s.B * s.H * s.T * s.D * s.V


_QKV = {"q": ("normal", "BTHD"), "k": ("normal", "BSKD"), "v": ("normal", "BSKV")}
_UNIT_QKV = {"q": ("unit", "BTHD"), "k": ("unit", "BTKD"), "v": ("normal", "BTKV")}
_ENGINE_1 = dict(
    family="attention",
    cross=True,
    variants=({"implementation": "definition"}, {"implementation": "xla"}),
    flops=_softmax_flops,
)
_ENGINE_2 = dict(
    family="recurrence",
    causal=(True,),
    variants=({"form": "recurrent"}, {"form": "parallel"}, {"form": "chunk"}),
    flops=_recurrence_flops,
)

CATALOGUE: tuple[Mechanism, ...] = (
    Mechanism(
        "dot_product_attention",
        ops.dot_product_attention,
        "Attention Is All You Need",
        2017,
        "1706.03762",
        arguments=_QKV,
        sizes={"K": "H"},
        golden=("dot_product_attention",),
        **_ENGINE_1,
    ),
    Mechanism(
        "multi_query_attention",
        ops.dot_product_attention,
        "Fast Transformer Decoding: One Write-Head is All You Need",
        2019,
        "1911.02150",
        arguments=_QKV,
        sizes={"K": 1},
        golden=("grouped_query_attention--mqa",),
        **_ENGINE_1,
    ),
    Mechanism(
        "grouped_query_attention",
        ops.dot_product_attention,
        "GQA: Training Generalized Multi-Query Transformer Models",
        2023,
        "2305.13245",
        arguments=_QKV,
        golden=("grouped_query_attention--gqa",),
        **_ENGINE_1,
    ),
    Mechanism(
        "sliding_window_attention",
        ops.dot_product_attention,
        "Longformer: The Long-Document Transformer",
        2020,
        "2004.05150",
        arguments=_QKV,
        settings={"mask": ops.sliding_window_mask(4, 4)},
        **_ENGINE_1,
    ),
    Mechanism(
        "sigmoid_attention",
        ops.sigmoid_attention,
        "Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
        2024,
        "2409.04431",
        arguments=_QKV,
        golden=("sigmoid_attention",),
        **_ENGINE_1,
    ),
    Mechanism(
        "sink_attention",
        ops.sink_attention,
        "When Attention Sink Emerges in Language Models: An Empirical View",
        2024,
        "2410.10781",
        arguments=_QKV
        | {
            "sink_key": ("normal", "PKD"),
            "sink_value": ("normal", "PKV"),
            "sink_logit": ("normal", "H"),
        },
        golden=(
            "sink_attention--key_bias",
            "sink_attention--key_value_bias",
            "sink_attention--sink_logit",
            "softmax_off_by_one",
        ),
        **_ENGINE_1,
    ),
    Mechanism(
        "gated_attention",
        ops.gated_attention,
        "Gated Attention for Large Language Models",
        2025,
        "2505.06708",
        arguments=_QKV | {"gate": ("normal", "BTHV")},
        golden=("gated_attention--elementwise", "gated_attention--headwise"),
        **_ENGINE_1,
    ),
    Mechanism(
        "differential_attention",
        ops.differential_attention,
        "Differential Transformer",
        2024,
        "2410.05258",
        arguments={
            "q1": ("normal", "BTHD"),
            "k1": ("normal", "BSKD"),
            "q2": ("normal", "BTKD"),
            "k2": ("normal", "BSKD"),
            "v": ("normal", "BSKV"),
            "lam": ("beta", "H"),
        },
        golden=(
            "differential_attention",
            "differential_attention--grouped",
            "differential_lambda",
        ),
        **_ENGINE_1 | {"flops": lambda s: 2 * _softmax_flops(s)},
    ),
    Mechanism(
        "linear_attention",
        ops.linear_attention,
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020,
        "2006.16236",
        arguments=_QKV,
        golden=(
            "linear_attention",
            "linear_attention_bidirectional",
            "linear_attention_subtraction",
            "linear_attention_unnormalized",
            "linfusion_attention",
        ),
        **_ENGINE_2 | {"causal": (False, True), "cross": True},
    ),
    Mechanism(
        "retention",
        ops.retention,
        "Retentive Network: A Successor to Transformer for Large Language Models",
        2023,
        "2307.08621",
        arguments={"q": ("normal", "BTHD"), "k": ("normal", "BTKD"), "v": ("normal", "BTKV")},
        golden=("retention", "retention_state"),
        **_ENGINE_2,
    ),
    Mechanism(
        "gated_linear_attention",
        ops.gated_linear_attention,
        "Gated Linear Attention Transformers with Hardware-Efficient Training",
        2023,
        "2312.06635",
        arguments={
            "q": ("normal", "BTHD"),
            "k": ("normal", "BTKD"),
            "v": ("normal", "BTKV"),
            "log_decay": ("log_decay", "BTHD"),
        },
        golden=(
            "gated_linear_attention",
            "gated_linear_attention_extreme",
            "gated_linear_attention_scalar",
        ),
        **_ENGINE_2,
    ),
    Mechanism(
        "delta_rule",
        ops.delta_rule,
        "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        2024,
        "2406.06484",
        arguments=_UNIT_QKV | {"beta": ("beta", "BTH")},
        golden=("delta_rule",),
        **_ENGINE_2 | {"flops": _delta_flops},
    ),
    Mechanism(
        "gated_delta_rule",
        ops.gated_delta_rule,
        "Gated Delta Networks: Improving Mamba2 with Delta Rule",
        2024,
        "2412.06464",
        arguments=_UNIT_QKV | {"beta": ("beta", "BTH"), "log_decay": ("log_decay", "BTH")},
        golden=("gated_delta_rule",),
        **_ENGINE_2 | {"flops": _delta_flops},
    ),
    Mechanism(
        "base_conv",
        ops.base_conv,
        "Zoology: Measuring and Improving Recall in Efficient Language Models",
        2023,
        "2312.04927",
        "convolution",
        arguments={
            "x": ("normal", "BTD"),
            "conv_kernel": ("normal", "PD"),
            "conv_bias": ("normal", "D"),
            "proj_kernel": ("small", "DD"),
            "proj_bias": ("normal", "D"),
        },
        causal=(True,),
        flops=lambda s: 2 * s.B * s.T * s.D * (s.P + s.D),
        golden=("base_conv", "long_conv"),
    ),
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
    Mechanism(
        "apply_rotary",
        ops.apply_rotary,
        "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        2021,
        "2104.09864",
        "position",
        golden=(
            "rotary--half",
            "rotary--interleaved",
            "rotary_frequencies--dynamic",
            "rotary_frequencies--linear",
            "rotary_frequencies--llama3",
            "rotary_frequencies--ntk",
            "rotary_frequencies--yarn",
        ),
    ),
    Mechanism(
        "alibi_bias",
        ops.alibi_bias,
        "Train Short, Test Long: Attention with Linear Biases",
        2021,
        "2108.12409",
        "position",
        golden=("alibi_bias", "alibi_bias_factors"),
    ),
)


def find(name: str) -> Mechanism:
    """The row called `name`; ValueError with the known names if there is none."""
    rows = {row.name: row for row in CATALOGUE}
    if name not in rows:
        raise ValueError(f"mechanism {name!r} is unknown; choose one of {', '.join(rows)}")
    return rows[name]


def table() -> str:
    """The catalogue as a Markdown table."""
    lines = ["| mechanism | what it computes | paper |", "| --- | --- | --- |"]
    for row in CATALOGUE:
        paper = f"[{row.title}](https://arxiv.org/abs/{row.arxiv}), {row.year}"
        name = row.function.__name__
        called = f"`{row.name}`" + (f" (`ops.{name}`)" if name != row.name else "")
        summary = row.summary.replace("|", "\\|")
        lines.append(f"| {called} | {summary} | {paper} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with the present table between the marks."""
    if START not in text or END not in text:
        raise ValueError(f"the text must hold the lines {START} and {END}")
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = pathlib.Path(name)
        path.write_text(with_table(path.read_text()))
