"""Normalisers of several passes: clipped, sparse, doubly stochastic, standardised, top-k."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attn_kernels.attention.normalizer import below
from attn_kernels.attention.operand import operand
from attn_kernels.attention.passes import MultiPass, Rows, transposed


def _normalizer(*data: str, meta: tuple[str, ...] = ()):
    """Registers a normaliser as a pytree of its operands."""

    def register(kind):
        kind = dataclasses.dataclass(frozen=True)(kind)
        return jax.tree_util.register_dataclass(kind, data_fields=data, meta_fields=meta)

    return register


@_normalizer("gamma", "eta")
class ClippedSoftmax(MultiPass):
    """`w_j = clip((eta - gamma) softmax(s)_j + gamma, 0, 1)`.

    Attributes:
      gamma, eta: laid out by `operand`; gamma at most 0, eta at least 1.
    """

    gamma: jax.Array
    eta: jax.Array

    def statistics(self, rows):
        return rows.softmax()

    def weight(self, scores, stats):
        top, total = stats
        probability = jnp.exp(below(scores, top)) / total
        return jnp.clip((self.eta - self.gamma) * probability + self.gamma, 0, 1)


@_normalizer("alpha", meta=("num_iters",))
class Entmax(MultiPass):
    """`w_j = max((alpha - 1) s_j - tau, 0)^(1 / (alpha - 1))`, tau such that the row sums to 1.

    The threshold is bracketed and halved; its derivative is that of the equation it solves.

    Attributes:
      alpha: above 1, laid out by `operand` (axes among "bhq"); 2 is sparsemax.
      num_iters: halvings.
    """

    alpha: jax.Array
    num_iters: int = 50

    def statistics(self, rows):
        top, _ = rows.softmax()
        alpha = self.alpha.astype(top.dtype)
        bracket = -1.0, 1 - rows.shape[1] ** (1 - alpha)
        tau = rows.root(_entmax, alpha, top, bracket=bracket, num_iters=self.num_iters)
        # The threshold is rounded; the sum, which is 1 for every score, is not to be derived.
        total = jax.lax.stop_gradient(rows.sum(_entmax, alpha, top, tau))
        return top, tau, jnp.where(total > 0, total, 1)

    def weight(self, scores, stats):
        top, tau, total = stats
        return _entmax(scores, self.alpha.astype(scores.dtype), top, tau) / total


def _entmax(scores, alpha, top, tau):
    above = (alpha - 1) * (scores - top) - tau
    some = above > 0
    return jnp.where(some, jnp.exp(jnp.log(jnp.where(some, above, 1)) / (alpha - 1)), 0)


@_normalizer(meta=("num_iters", "stop_gradient_columns"))
class Sinkhorn(MultiPass):
    """`w_tj = exp(s_tj + u_t + v_j)`: rows and columns are scaled in turn, rows first.

    Rows are made to sum to 1, columns to T / S; the last of the `num_iters` scalings is exact.

    Attributes:
      num_iters: how many scalings; 1 is softmax.
      stop_gradient_columns: whether v counts as constant.
    """

    num_iters: int = 3
    stop_gradient_columns: bool = False

    def statistics(self, rows):
        (q_len, k_len), columns = rows.shape, rows.transpose()
        u = v = None
        for n in range(self.num_iters):
            if n % 2 == 0:
                u = -_log_sum(rows if v is None else rows.plus(v))
                continue
            v = transposed(jnp.log(q_len / k_len) - _log_sum(columns.plus(transposed(u))))
            v = jax.lax.stop_gradient(v) if self.stop_gradient_columns else v
        return (u,) if v is None else (u, v)

    def weight(self, scores, stats):
        return jnp.exp(sum(stats, scores))


def _log_sum(rows: Rows) -> jax.Array:
    """The log-sum-exp of every row; 0 for one without keys."""
    top, total = rows.softmax()
    return top + jnp.log(total)


@_normalizer("gain", "shift", meta=("eps",))
class Standardized(MultiPass):
    """`w_j = gain (s_j - mean) / (deviation + eps) + shift`: weights may be negative.

    Attributes:
      gain, shift: laid out by `operand`.
      eps: added to the standard deviation.
    """

    gain: jax.Array
    shift: jax.Array
    eps: float = 1e-3

    def statistics(self, rows):
        count = jnp.maximum(rows.count(), 1)
        mean = rows.sum(_itself) / count
        variance = rows.sum(_squared_distance, mean) / count
        some = variance > 0
        return mean, jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1)), 0) + self.eps

    def weight(self, scores, stats):
        mean, deviation = stats
        return self.gain * (scores - mean) / deviation + self.shift


def _itself(scores):
    return scores


def _squared_distance(scores, mean):
    return jnp.square(scores - mean)


@_normalizer(meta=("function", "eps"))
class Proportional(MultiPass):
    """`w_j = function(s_j) / (sum_j function(s_j) + eps)`; 0 where the denominator is.

    Attributes:
      function: an elementwise function.
      eps: added to the sum.
    """

    function: Callable[[jax.Array], jax.Array]
    eps: float = 0.0

    def statistics(self, rows):
        total = rows.sum(self.function) + self.eps
        return (jnp.where(total == 0, 1, total),)

    def weight(self, scores, stats):
        return self.function(scores) / stats[0]


@_normalizer(meta=("function", "length_scale"))
class LengthScaled(MultiPass):
    """`w_j = function(s_j) / length_scale(n)`, n the number of allowed keys of the row.

    Attributes:
      function, length_scale: elementwise functions.
    """

    function: Callable[[jax.Array], jax.Array]
    length_scale: Callable[[jax.Array], jax.Array]

    def statistics(self, rows):
        return (self.length_scale(jnp.maximum(rows.count(), 1)),)

    def weight(self, scores, stats):
        return self.function(scores) / stats[0]


@_normalizer(meta=("top_k",))
class TopK(MultiPass):
    """Softmax over the `top_k` largest scores of a row and their equals.

    Attributes:
      top_k: how many.
    """

    top_k: int

    def statistics(self, rows):
        best = rows.largest(self.top_k)
        top, least = best[..., :1], best[..., -1:]
        top = jnp.where(top > -jnp.inf, top, 0)
        # A score computed again may round below itself.
        least = least - 4 * jnp.finfo(least.dtype).eps * jnp.abs(least)
        total = rows.sum(_exp_above, top, least)
        return top, least, jnp.where(total > 0, total, 1)

    def weight(self, scores, stats):
        top, least, total = stats
        return _exp_above(scores, top, least) / total


def _exp_above(scores, top, least):
    return jnp.where(scores >= least, jnp.exp(below(scores, top)), 0)


def clipped_softmax(gamma: float | jax.Array, eta: float | jax.Array = 1.0) -> ClippedSoftmax:
    """`clip((eta - gamma) softmax(s) + gamma, 0, 1)`, gamma and eta numbers."""
    dtype = jnp.result_type(float)
    return ClippedSoftmax(*(operand(jnp.asarray(x, dtype), "") for x in (gamma, eta)))


def entmax(alpha: float | jax.Array, *, num_iters: int = 50) -> Entmax:
    """Entmax with one alpha above 1, or one for each head, `[H]`."""
    alpha = jnp.asarray(alpha, jnp.result_type(float))
    return Entmax(operand(alpha, "h" if alpha.ndim else ""), num_iters)
