"""Programs of both engines that are no rows of the catalogue, to be timed like them.

A program is named by its kind and numbers: `causal`, `window-1024`, `segments-8`,
`neighborhood-256x256-13x13-8x16` (a grid, a kernel and a tile). Recurrences are the engine's alone,
without feature maps and normalisers; `step_gla` is as many steps of decoding as the length.
`average` and `gated_average` are diagonal recurrences of as many channels as all heads have.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_kernels.attention import ScoreMod, attention, operand, sigmoid, softmax_with_sink
from attn_kernels.recurrence import diagonal_recurrence, linear_attention, step
from attn_lab.catalogue import Mechanism, find
from attn_lab.catalogue.mechanism import ENGINE_1, QKV
from attn_lab.ops import causal_mask, neighborhood_mask, segment_mask, sliding_window_mask

BUCKETS = 32
SLOWNESS = 16  # divides log decays, as in the layers of GLA
UNROLLED = 8  # steps of decoding a turn of the loop: a loop of one copies the state


@dataclasses.dataclass(frozen=True)
class Program(Mechanism):
    """A mask, a score modification and a normaliser, a recurrence, or steps of one.

    Attributes:
      numbers: of its name.
      plain: the program of unmodified scores to whose rate its own is compared, or "".
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

    @property
    def steps(self) -> int | None:
        """The steps of decoding, if it is such."""
        return self.settings.get("steps")

    def example(self, sizes, key, dtype=jnp.float32):
        """As of a mechanism; states, and what has no axis of channels or keys, are in float32."""
        arrays = super().example(sizes, key, dtype)
        for name, x in arrays.items():
            axes = set("".join(map(str, self.arguments[name][1])))
            if name == "state" or not axes & set("DVS"):
                arrays[name] = x.astype(jnp.float32)
            if name == "log_decay":
                arrays[name] = arrays[name] / SLOWNESS
        return arrays

    def bytes(self, sizes, dtype=jnp.bfloat16):
        """As of a mechanism; of steps each reads and writes everything."""
        return (self.steps or 1) * super().bytes(sizes, dtype)


def attend(q, k, v, *, mask=None, parts=None, implementation=None, **operands):
    """Attention with the `parts` that are made of the operands."""
    parts = parts(**operands) if parts else {}
    return attention(q, k, v, mask=mask, implementation=implementation, **parts)


def recur(q, k, v, *, log_decay=None, beta=None, **choice):
    """The recurrence of engine 2, by the chosen form or implementation."""
    return linear_attention(q, k, v, log_decay=log_decay, beta=beta, **choice)


def retain(q, k, v, **choice):
    """The recurrence whose head h keeps 1 - 2^(-5 - h) of its state at every step."""
    log_decay = jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(q.shape[2])))
    return recur(q, k, v, log_decay=jnp.broadcast_to(log_decay, q.shape[:3]), **choice)


def decode(state, q, k, v, *, steps, implementation=None, **gates):
    """The state and the output after `steps` steps, every output being the next value."""

    def one(_, carry):
        state, v = carry
        out, state = step(state, q, k, v, **gates, implementation=implementation)
        return state, out

    return jax.lax.fori_loop(0, steps, one, (state, v), unroll=UNROLLED)


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
    """The table's entry is that of the last bucket that has begun: a kernel cannot look it up."""
    distance, entry = q_index - k_index, table[0]
    for first, value in zip(_firsts()[1:], table[1:], strict=True):
        entry = jnp.where(distance >= first, value, entry)
    return score + entry


@functools.cache
def _firsts() -> tuple[int, ...]:
    """The least distance of every bucket: half of them are single, others grow to 128."""
    near = BUCKETS // 2
    distances = np.arange(1, 129, dtype=np.float32)
    far = near + (np.log(distances / near) * np.float32(near / math.log(128 / near))).astype(int)
    buckets = np.where(distances < near, distances, np.minimum(far, BUCKETS - 1)).astype(int)
    return 0, *(1 + int(np.argmax(buckets >= n)) for n in range(1, BUCKETS))


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


ATTENTIONS: Mapping[str, Callable[..., dict[str, Any]]] = {
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
# the row of the catalogue, and the arguments that are others
RECURRENCES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear_attention", {}),
    "retention": ("retention", {}),
    "simple_gla": ("gated_linear_attention", {"log_decay": ("log_decay", "BTH")}),
    "gla": ("gated_linear_attention", {}),
    "delta": ("delta_rule", {}),
    "gated_delta": ("gated_delta_rule", {}),
}
STEPS = {f"step_{kind}": kind for kind in RECURRENCES if kind != "retention"}
# the axes of log decays, and of writes and reads where they are not 1
AVERAGES: Mapping[str, tuple[tuple, tuple | None]] = {
    "average": (("HD", 16), ("HD", 16)),
    "gated_average": (("B", "T", "HD", 1), None),
}
KINDS = *ATTENTIONS, *RECURRENCES, *STEPS, *AVERAGES


def _attention(kind, length, numbers):
    found = ATTENTIONS[kind](length, *numbers)
    parts = found.pop("parts", None)
    mask = found.pop("mask", None if kind == "full" else causal_mask())
    return ENGINE_1 | {
        "function": attend,
        "arguments": QKV | found.pop("arguments", {}),
        "settings": {"mask": mask, "parts": parts},
        "variants": (*ENGINE_1["variants"], {"implementation": "mosaic_gpu"}),
        **found,
    }


def _recurrence(kind, length):
    name, arguments = RECURRENCES[STEPS.get(kind, kind)]
    row = find(name)
    found = {
        "function": retain if kind == "retention" else recur,
        "arguments": {**row.arguments, **arguments},
        "variants": (
            {"form": "recurrent"},
            {"implementation": "xla"},
            {"implementation": "mosaic_gpu"},
            {"implementation": "triton"},
        ),
        "flops": row.flops,
        "plain": "",
    }
    if kind in STEPS:
        # Outputs that are the next values stay small if keys and queries are.
        units = {"q": ("unit", "BHD"), "k": ("unit", "BKD"), "v": ("normal", "BKV")}
        gates = {n: (x, axes.replace("T", "")) for n, (x, axes) in found["arguments"].items()}
        found |= {
            "function": decode,
            "arguments": {"state": ("normal", "BHDV"), **gates, **units},
            "settings": {"steps": length},
            "variants": ({"implementation": "xla"}, {"implementation": "triton"}),
        }
    return found


def _average(kind):
    decay, others = AVERAGES[kind]
    arguments = {"x": ("normal", ("B", "T", "HD")), "log_decay": ("log_decay", decay)}
    if others:
        arguments |= {"write": ("normal", others), "read": ("normal", others)}
    return {
        "function": diagonal_recurrence,
        "arguments": arguments,
        "variants": (
            {"form": "recurrent"},
            {"implementation": "xla"},
            {"implementation": "triton"},
        ),
        "flops": lambda s: 6 * s.B * s.T * s.H * s.D * decay[-1],
        "plain": "",
    }


def program(name: str, length: int) -> Program:
    """The program of a name; attention is causal unless it says otherwise.

    Raises:
      ValueError: the kind is unknown, its numbers are not what it takes, or a grid has not `length`
        tokens.
    """
    kind, *numbers = name.split("-")
    if kind not in KINDS:
        raise ValueError(f"programs are {', '.join(KINDS)}; got {kind!r}")
    wanted = [*inspect.signature(ATTENTIONS.get(kind, _full)).parameters][1:]
    try:
        given = [tuple(int(n) for n in text.split("x")) for text in numbers]
    except ValueError:
        given = []
    if len(given) != len(wanted):
        raise ValueError(f"program {kind!r} is {'-'.join([kind, *wanted])}, got {name!r}")
    if kind in ATTENTIONS:
        found = _attention(kind, length, given)
    else:
        found = _average(kind) if kind in AVERAGES else _recurrence(kind, length)
    return Program(
        **{**found, "name": name, "family": "program", "causal": (False,)},
        title="",
        year=0,
        arxiv="",
        numbers=tuple(given),
    )
