"""Score modifications: what happens to a score between the product and the normaliser."""

import dataclasses
import functools
from collections.abc import Callable

import jax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("operands",), meta_fields=("function",)
)
@dataclasses.dataclass(frozen=True)
class ScoreMod:
    """A score modification: `function(score, b, h, q_index, k_index, *operands) -> score`.

    The function works elementwise on arrays that broadcast to `[B, H, T, S]`; it is traced into
    every implementation, where `score` is the scaled product in float32 or better, the indices are
    those of `Mask`, and each operand is the tile of an array laid out by `operand`. Gradients of
    operands sum over the axes that they lack. Arrays must be operands: the function may not close
    over a traced one. Modifications are pytrees and chain by `first.then(second)`.
    """

    function: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...] = ()

    def then(self, other: "ScoreMod") -> "ScoreMod":
        """The modification that applies this one first and then `other`."""
        chain = _Chain(self.function, len(self.operands), other.function)
        return ScoreMod(chain, self.operands + other.operands)

    def __call__(self, score, b, h, q_index, k_index) -> jax.Array:
        return self.function(score, b, h, q_index, k_index, *self.operands)


@dataclasses.dataclass(frozen=True)
class _Chain:
    first: Callable
    split: int
    second: Callable

    def __call__(self, score, b, h, q_index, k_index, *operands):
        score = self.first(score, b, h, q_index, k_index, *operands[: self.split])
        return self.second(score, b, h, q_index, k_index, *operands[self.split :])
