"""What the catalogue knows of a mechanism, and example arguments for it."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


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
      family: "attention", "recurrence", "convolution" (which one suite of tests drives), "head",
        "linear", "mask", "position" or "score".
      arguments: array arguments by name: a kind (see `KINDS`) and the shape: for every axis a
        letter of `Sizes`, a number, or letters whose product it is.
      settings: other keyword arguments.
      causal: the patterns in time that it has: (False, True), (True,) or (False,). If it has both
        it takes the keyword `causal`.
      cross: whether keys may have another length than queries.
      heads_apart: whether every head is computed by itself.
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
    arguments: Mapping[str, tuple[str, str | tuple[str | int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    causal: tuple[bool, ...] = (False, True)
    cross: bool = False
    heads_apart: bool = True
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
            shape = [
                axis if isinstance(axis, int) else math.prod(getattr(sizes, a) for a in axis)
                for axis in letters
            ]
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
    "negative": lambda key, shape: -jnp.exp(jax.random.normal(key, shape)),
    "above_one": lambda key, shape: jax.random.uniform(key, shape, minval=1.2, maxval=2.0),
    "place": lambda key, shape: jax.random.uniform(key, shape, maxval=8.0),
    "small": lambda key, shape: jax.random.normal(key, shape) / math.sqrt(shape[0]),
}


def softmax_flops(s: Sizes) -> int:
    """Of scores and values over every pair, masked or not."""
    return 2 * s.B * s.H * s.T * s.S * (s.D + s.V)


QKV = {"q": ("normal", "BTHD"), "k": ("normal", "BSKD"), "v": ("normal", "BSKV")}
ENGINE_1 = dict(
    family="attention",
    cross=True,
    variants=({"implementation": "definition"}, {"implementation": "xla"}),
    flops=softmax_flops,
)
