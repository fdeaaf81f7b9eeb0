"""Programs of engine 1 that are no rows of the catalogue, to be timed like them.

A program is named by its kind and numbers: `causal`, `window-1024`, `segments-8`,
`neighborhood-256x256-13x13-8x16` (a grid, a kernel and a tile).
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from attn_kernels.attention import ScoreMod, attention, operand, sigmoid, softmax_with_sink
from attn_lab.catalogue import Mechanism
from attn_lab.catalogue.mechanism import ENGINE_1, QKV
from attn_lab.ops import causal_mask, neighborhood_mask, segment_mask, sliding_window_mask

BUCKETS = 32


@dataclasses.dataclass(frozen=True)
class Program(Mechanism):
    """A mask, a score modification and a normaliser.

    Attributes:
      numbers: of its name.
      plain: the program of unmodified scores to whose rate its own is compared.
      constants: arguments of which no gradients are taken.
      fixed: whether a fixed kernel can compute it.
    """

    numbers: tuple[tuple[int, ...], ...] = ()
    plain: str = "causal"
    constants: tuple[str, ...] = ()
    fixed: bool = False

    @property
    def kind(self) -> str:
        return self.name.split("-")[0]

    def example(self, sizes, key, dtype=jnp.float32):
        """As of a mechanism; parameters of heads are in float32."""
        arrays = super().example(sizes, key, dtype)
        return {n: x if x.ndim > 2 else x.astype(jnp.float32) for n, x in arrays.items()}


def attend(q, k, v, *, mask=None, parts=None, implementation=None, **operands):
    """Attention with the `parts` that are made of the operands."""
    parts = parts(**operands) if parts else {}
    return attention(q, k, v, mask=mask, implementation=implementation, **parts)


@dataclasses.dataclass(frozen=True)
class Cap:
    """`limit tanh(score / limit)`."""

    limit: int

    def __call__(self, score, b, h, q_index, k_index):
        return self.limit * jnp.tanh(score / self.limit)


def _sloped(score, b, h, q_index, k_index, slope):
    return score + slope * (q_index - k_index)


def _shifted(score, b, h, q_index, k_index, bias):
    return score + bias


def _bucketed(score, b, h, q_index, k_index, *table):
    """The table's entry is chosen bit by bit: a kernel cannot look it up."""
    distance = jnp.maximum(q_index - k_index, 0)
    near = BUCKETS // 2
    # Half of the buckets are single distances, the others grow to a distance of 128.
    grown = jnp.log(jnp.maximum(distance, 1) / near) * (near / math.log(128 / near))
    far = jnp.minimum(near + grown.astype(jnp.int32), BUCKETS - 1)
    bucket, bit = jnp.where(distance < near, distance, far), 0
    while len(table) > 1:
        upper = (bucket >> bit & 1) == 1
        table = [jnp.where(upper, b, a) for a, b in zip(table[::2], table[1::2])]
        bit += 1
    return score + table[0]


def _full(length):
    return dict(plain="", fixed=True)


def _causal(length):
    return dict(plain="full", fixed=True)


def _window(length, width):
    (size,) = width
    return dict(plain="full", fixed=True, mask=sliding_window_mask(size - 1, 0))


def _soft_cap(length, limit):
    return dict(parts=lambda: dict(score_mod=ScoreMod(Cap(*limit))))


def _alibi(length):
    def parts(slopes):
        return dict(score_mod=ScoreMod(_sloped, (operand(slopes, "h"),)))

    return dict(parts=parts, arguments={"slopes": ("log_decay", "H")})


def _t5_table(length):
    def parts(table):
        return dict(score_mod=ScoreMod(_bucketed, tuple(operand(row, "h") for row in table)))

    return dict(parts=parts, arguments={"table": ("normal", (BUCKETS, "H"))})


def _bias(length):
    def parts(bias):
        return dict(score_mod=ScoreMod(_shifted, (operand(bias, "hqk"),)))

    return dict(
        parts=parts,
        arguments={"bias": ("normal", "HTS")},
        constants=("bias",),
    )


def _sigmoid(length):
    return dict(parts=lambda: dict(normalizer=sigmoid))


def _sinks(length):
    def parts(sinks):
        return dict(normalizer=softmax_with_sink(sinks))

    return dict(parts=parts, arguments={"sinks": ("normal", "H")})


def _segments(length, count):
    ids = jnp.arange(length) // -(-length // count[0])
    return dict(mask=causal_mask() & segment_mask(ids[None]))


def _neighborhood(length, shape, kernel, tile):
    if math.prod(shape) != length:
        raise ValueError(f"length must be that of the grid {shape}, got {length}")
    return dict(plain="full", mask=neighborhood_mask(shape, kernel, tile=tile))


PROGRAMS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "full": _full,
    "causal": _causal,
    "window": _window,
    "soft_cap": _soft_cap,
    "alibi": _alibi,
    "t5_table": _t5_table,
    "bias": _bias,
    "sigmoid": _sigmoid,
    "sinks": _sinks,
    "segments": _segments,
    "neighborhood": _neighborhood,
}


def program(name: str, length: int) -> Program:
    """The program of a name, causal unless it says otherwise.

    Raises:
      ValueError: the kind is unknown, its numbers are not what it takes, or a grid has not `length`
        tokens.
    """
    kind, *numbers = name.split("-")
    if kind not in PROGRAMS:
        raise ValueError(f"programs are {', '.join(PROGRAMS)}; got {kind!r}")
    wanted = [*inspect.signature(PROGRAMS[kind]).parameters][1:]
    try:
        given = [tuple(int(n) for n in text.split("x")) for text in numbers]
    except ValueError:
        given = []
    if len(given) != len(wanted):
        raise ValueError(f"program {kind!r} is {'-'.join([kind, *wanted])}, got {name!r}")
    found = PROGRAMS[kind](length, *given)
    parts = found.pop("parts", None)
    mask = found.pop("mask", None if kind == "full" else causal_mask())
    engine = dict(ENGINE_1, family="program")
    engine["variants"] = *ENGINE_1["variants"], {"implementation": "mosaic_gpu"}
    return Program(
        name=name,
        function=attend,
        title="",
        year=0,
        arxiv="",
        arguments=QKV | found.pop("arguments", {}),
        settings={"mask": mask, "parts": parts},
        causal=(False,),
        numbers=tuple(given),
        **engine,
        **found,
    )
