"""Normalisers: from the scores of a row to its weights, through statistics of the row."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attn_kernels.attention.operand import operand

Stats = tuple[jax.Array, ...]


class Normalizer:
    """Weights `w(s[t, j], stats[t])` of a row of scores, where forbidden scores are -inf.

    The statistics of a row are a tuple of arrays `[B, H, T, 1]`, a reduction over its keys: the
    `partial` of every tile, joined by `combine`. Since
    `weight(s, new) = weight(s, old) * rescale(old, new)`, a sum of weighted values over a part of
    the keys stays right when more keys arrive, so attention needs one pass over them. By default
    there are no statistics, and every weight stands by itself.
    """

    @property
    def silent(self) -> jax.Array | None:
        """The score of one more key without a value, broadcastable to `[B, H, T, 1]`, or None."""
        return None

    def partial(self, scores: jax.Array) -> Stats:
        """The statistics of the scores `[B, H, T, S]` alone."""
        return ()

    def combine(self, a: Stats, b: Stats) -> Stats:
        """The statistics of two sets of keys together: associative and commutative."""
        return ()

    def weight(self, scores: jax.Array, stats: Stats) -> jax.Array:
        """The weights; 0, with derivative 0, for a score of -inf."""
        raise NotImplementedError

    def rescale(self, old: Stats, new: Stats) -> jax.Array | float:
        """The factor from weights under `old` to weights under `new`."""
        return 1.0

    def influence(self, scores: jax.Array, stats: Stats) -> tuple[jax.Array | None, ...]:
        """The derivatives of the final statistics with respect to a score.

        None stands for a statistic that may be held constant, because only its relation to the
        others matters.
        """
        return ()

    def report(self, stats: Stats) -> jax.Array | None:
        """The statistic that users get, `[B, H, T, 1]`, or None."""
        return None


@functools.partial(jax.tree_util.register_dataclass, data_fields=("sink",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Softmax(Normalizer):
    """`w_j = exp(s_j) / (exp(sink) + sum_j exp(s_j))`, reporting the log of the denominator.

    The statistics are the maximum m of the row and `sum_j exp(s_j - m)`: their logarithm alone
    would round scores of 10^4 by 10^-3.

    Attributes:
      sink: None for plain softmax, or the score of a key without a value, laid out by `operand`
        (axes among "bhq").
    """

    sink: jax.Array | None = None

    @property
    def silent(self):
        return self.sink

    def partial(self, scores):
        top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        return top, jnp.exp(below(scores, top)).sum(-1, keepdims=True)

    def combine(self, a, b):
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(below(a[0], top)) + b[1] * jnp.exp(below(b[0], top))

    def weight(self, scores, stats):
        top, total = stats
        return jnp.exp(below(scores, top)) / jnp.where(total > 0, total, 1)

    def rescale(self, old, new):
        return self.weight(old[0], new) * old[1]

    def influence(self, scores, stats):
        return None, jnp.exp(below(scores, stats[0]))

    def report(self, stats):
        top, total = stats
        some = total > 0  # without keys there is no gradient to give, and log would give NaN
        return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, -jnp.inf)


def below(scores: jax.Array, top: jax.Array) -> jax.Array:
    """`scores - top`, never positive: scores computed again may round above their maximum."""
    difference = scores - jnp.where(top == -jnp.inf, 0, top)
    return difference - jax.lax.stop_gradient(jnp.maximum(difference, 0))


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("function",))
@dataclasses.dataclass(frozen=True)
class Pointwise(Normalizer):
    """`w_j = function(s_j)`: every weight by itself, no statistic.

    Attributes:
      function: an elementwise function with value and derivative 0 at -inf.
    """

    function: Callable[[jax.Array], jax.Array]

    def weight(self, scores, stats):
        return self.function(scores)


softmax = Softmax()
sigmoid = Pointwise(jax.nn.sigmoid)
relu = Pointwise(jax.nn.relu)


def softmax_with_sink(sink: jax.Array, axes: str = "h") -> Softmax:
    """Softmax with one more key, of score `sink` and value 0.

    Args:
      sink: the score, by default one for each head, `[H]`.
      axes: the meaning of its dimensions, letters of "bhq".
    """
    return Softmax(operand(sink, axes))
