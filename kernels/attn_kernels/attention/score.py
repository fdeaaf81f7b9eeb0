"""Scores of query and key other than their inner product."""

import dataclasses
import functools
from collections.abc import Callable

import jax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("operands",), meta_fields=("function", "width")
)
@dataclasses.dataclass(frozen=True)
class Score:
    """How a query and a key make a score: `function(q, k, q_index, k_index, *operands) -> s`.

    The function gets queries `[B, H, T, Dq]` and keys `[B, H, S, Dk]`, one for each query head, in
    float32 or better, and their positions `[T]` and `[S]`; it returns `[B, H, T, S]`. It works on
    every pair alone, so implementations may call it on tiles.

    Attributes:
      function: the function; it may not close over traced arrays.
      operands: arrays that it gets whole, such as weights.
      width: how many numbers it makes of one pair on the way; tiles shrink accordingly.
    """

    function: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...] = ()
    width: int = 1

    def __call__(self, q, k, q_index, k_index) -> jax.Array:
        return self.function(q, k, q_index, k_index, *self.operands)
