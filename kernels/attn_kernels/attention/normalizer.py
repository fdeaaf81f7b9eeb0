"""Normalisers: from the scores of a row to its weights, through one statistic of the row."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attn_kernels.attention.operand import operand


class Normalizer:
    """Weights `w(s[t, j], stats[t])` of a row of scores, where forbidden scores are -inf.

    The statistic of a row is a reduction over its keys: `initial` combined with the `partial` of
    every tile. Since `weight(s, new) = weight(s, old) * rescale(old, new)`, a sum of weighted
    values over a part of the keys stays right when more keys arrive, so attention needs one pass.
    A statistic has shape `[B, H, T, 1]`; a normaliser without one has `initial() == None`, and
    neither `partial`, `combine`, `rescale` nor `influence` are called.
    """

    def initial(self) -> jax.Array | None:
        """The statistic of a row without keys, broadcastable to `[B, H, T, 1]`."""
        return None

    def partial(self, scores: jax.Array) -> jax.Array:
        """The statistic of a tile of scores `[B, H, T, S]` alone."""
        raise NotImplementedError

    def combine(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The statistic of the union of two sets of keys: associative and commutative."""
        raise NotImplementedError

    def weight(self, scores: jax.Array, stats: jax.Array | None) -> jax.Array:
        """The weights; 0 for a score of -inf."""
        raise NotImplementedError

    def rescale(self, old: jax.Array, new: jax.Array) -> jax.Array:
        """The factor from weights under `old` to weights under `new`."""
        raise NotImplementedError

    def influence(self, scores: jax.Array, stats: jax.Array) -> jax.Array:
        """The derivative of the row's statistic with respect to a score (or to `initial`)."""
        raise NotImplementedError


@functools.partial(jax.tree_util.register_dataclass, data_fields=("sink",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Softmax(Normalizer):
    """`w_j = exp(s_j) / (exp(sink) + sum_j exp(s_j))`; the statistic is the log of the denominator.

    Attributes:
      sink: None for plain softmax, or the score of a key without a value, laid out by `operand`
        (axes among "bhq"); a row without keys has the statistic `sink`, or -inf.
    """

    sink: jax.Array | None = None

    def initial(self):
        return jnp.full((1, 1, 1, 1), -jnp.inf) if self.sink is None else self.sink

    def partial(self, scores):
        top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        top = jnp.where(jnp.isfinite(top), top, 0)
        total = jnp.exp(scores - top).sum(-1, keepdims=True)
        some = total > 0  # where no key is allowed, log has no gradient to give
        return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, -jnp.inf)

    def combine(self, a, b):
        return jnp.logaddexp(a, b)

    def weight(self, scores, stats):
        return jnp.exp(scores - jnp.where(stats == -jnp.inf, 0, stats))

    def rescale(self, old, new):
        return self.weight(old, new)

    def influence(self, scores, stats):
        return self.weight(scores, stats)


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
