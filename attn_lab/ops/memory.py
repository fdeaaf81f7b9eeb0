"""Memories whose weights are the state: updated at every token by a step of gradient descent."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_kernels.varying import varying_like

__all__ = ["MemoryState", "neural_memory", "neural_memory_linear", "neural_memory_mlp"]

_dot = functools.partial(jnp.matmul, precision="highest")


class MemoryState(NamedTuple):
    """What a memory hands on to a call that continues it, also from the middle of a chunk.

    Attributes:
      memory: the weights after the last token, `[B, H, ...]` each.
      momentum: the past surprise, alike.
      entry: the weights at which the present chunk takes its gradients, alike.
      index: how many tokens of the present chunk are past, an integer.
    """

    memory: Any
    momentum: Any
    entry: Any
    index: jax.Array


def neural_memory_linear(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    decay: jax.Array,
    initial_state: jax.Array | tuple[jax.Array, jax.Array],
    *,
    chunk_size: int = 1,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A matrix that learns by gradient descent with momentum and forgetting to map keys to values.

    With E the matrix on entry of a chunk, which at `chunk_size` 1 is `M_{t-1}`:

        S_t = momentum_t S_{t-1} - 2 lr_t k_t (E^T k_t - v_t)^T
        M_t = (1 - decay_t) M_{t-1} + S_t,  o_t = M_t^T q_t

    Args:
      q, k: `[B, T, H, D]`.
      v: `[B, T, H, Dv]`.
      lr, momentum, decay: `[B, T, H]`.
      initial_state: M before the first token, `[B, H, D, Dv]`, or the pair of it and S, which is
        else 0. The first token starts a chunk.
      chunk_size: tokens whose gradients are taken at the same matrix.
      return_state: whether to return the last M and S too.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the pair (M, S).

    Raises:
      ValueError: if shapes do not fit or `chunk_size` is not positive.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """
    start = initial_state
    start, past = start if isinstance(start, tuple) else (start, jnp.zeros_like(start))
    shape = (q.shape[0], *q.shape[2:], v.shape[-1])
    for array in start, past:
        if array.shape != shape:
            raise ValueError(f"initial_state must be {list(shape)}, got {list(array.shape)}")
    state = MemoryState((start,), (past,), (start,), 0)
    part = dict(residual=False, chunk_size=chunk_size)
    out, state = layered_memory(q, k, v, lr, momentum, decay, state, **part)
    return (out, (state.memory[0], state.momentum[0])) if return_state else out


def neural_memory_mlp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    decay: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    *,
    chunk_size: int = 1,
    residual: bool = True,
    initial_state: MemoryState | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, MemoryState]:
    """A network `silu(x W1) W2 + x` that learns at every token, by gradient descent, to map k to v.

    Both matrices follow the rule of `neural_memory_linear`, with the gradients of
    `|M(k_t) - v_t|^2` at the network on entry of a chunk; the output is `M_t(q_t)`.

    Args:
      q, k, v, lr, momentum, decay, chunk_size: as in `neural_memory_linear`.
      w1, w2: the network before the first token, `[H, D, F]` and `[H, F, Dv]`.
      residual: whether the network adds its input; Dv is then D.
      initial_state: from an earlier call of the same `chunk_size`, whose tokens these follow; it
        replaces w1 and w2.
      return_state: whether to return the last state too.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state.

    Raises:
      ValueError: if shapes do not fit or `chunk_size` is not positive.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """
    heads, dim, out_dim = q.shape[2], q.shape[3], v.shape[-1]
    for name, w, wanted in (
        ("w1", w1, (heads, dim, w1.shape[-1])),
        ("w2", w2, (heads, w1.shape[-1], out_dim)),
    ):
        if w.shape != wanted:
            raise ValueError(f"{name} must be {list(wanted)}, got {list(w.shape)}")
    state = start_memory((w1, w2), len(q)) if initial_state is None else initial_state
    part = dict(residual=residual, chunk_size=chunk_size)
    out, state = layered_memory(q, k, v, lr, momentum, decay, state, **part)
    return (out, state) if return_state else out


def neural_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    decay: jax.Array,
    params: Any,
    *,
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    chunk_size: int = 1,
    initial_state: MemoryState | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, MemoryState]:
    """Any network that learns at every token, by gradient descent with momentum and forgetting.

    With E the parameters on entry of a chunk, which at `chunk_size` 1 are `M_{t-1}`:

        S_t = momentum_t S_{t-1} - lr_t grad_E |apply_fn(E, k_t) - v_t|^2
        M_t = (1 - decay_t) M_{t-1} + S_t,  o_t = apply_fn(M_t, q_t)

    Args:
      q, k, v, lr, momentum, decay, chunk_size: as in `neural_memory_linear`.
      params: the parameters before the first token, a pytree of arrays `[H, ...]`.
      apply_fn: of the parameters of one head and one input `[D]` to `[Dv]`.
      initial_state, return_state: as in `neural_memory_mlp`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; with `return_state` also the state.

    Raises:
      ValueError: if shapes do not fit or `chunk_size` is not positive.

    Source: Behrouz et al., Titans, 2025, arXiv 2501.00663.
    """

    def loss(weights, k, v):
        return jnp.sum((apply_fn(weights, k) - v) ** 2)

    slope = jax.vmap(jax.grad(loss), (None, 0, 0))

    def chunk(q, k, v, entry, memory, past, mix):
        slopes = slope(entry, k, v)
        path = jax.tree.map(functools.partial(_along, mix.memory), memory, past, slopes)
        rows = tuple(x[-1:] for x in mix.momentum)
        last = jax.tree.map(functools.partial(_along, rows), memory, past, slopes)
        return jax.vmap(apply_fn)(path, q), *jax.tree.map(lambda x: x[-1], (path, last))

    state = start_memory(params, len(q)) if initial_state is None else initial_state
    inputs = (q, k, v, lr, momentum, decay)
    out, state = _in_chunks(jax.checkpoint(chunk), inputs, state, chunk_size)
    return (out, state) if return_state else out


def start_memory(params: Any, batch: int) -> MemoryState:
    """The state before the first token, of parameters `[H, ...]`."""
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), params)
    return MemoryState(memory, jax.tree.map(jnp.zeros_like, memory), memory, 0)


def layered_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    decay: jax.Array,
    state: MemoryState,
    *,
    residual: bool,
    chunk_size: int,
) -> tuple[jax.Array, MemoryState]:
    """`neural_memory` of a chain of matrices with silu between, and its last state.

    A gradient is an outer product there, so tokens read the matrices of a chunk by masked products
    of theirs with the chunk's, and no token has matrices of its own.

    Args:
      state: the first one, with a tuple of matrices `[B, H, Din, Dout]`.
      residual: whether the chain adds its input.
    """
    if residual and q.shape[-1] != v.shape[-1]:
        raise ValueError(f"residual=True needs Dv = D = {q.shape[-1]}, got Dv = {v.shape[-1]}")

    def chunk(q, k, v, entry, memory, past, mix):
        factors, inputs = _slopes(entry, k, v, residual), q
        for n, (left, right) in enumerate(factors):
            inputs = jax.nn.silu(inputs) if n else inputs
            kept, carried, fresh = mix.memory
            read = kept[:, None] * _dot(inputs, memory[n])
            read += carried[:, None] * _dot(inputs, past[n])
            inputs = read + _dot(fresh * _dot(inputs, left.T), right)
        out = inputs + q if residual else inputs

        def last(weights, before, factors, rows):
            kept, carried, fresh = (x[-1] for x in rows)
            new = _dot((fresh[:, None] * factors[0]).T, factors[1])
            return kept * weights + carried * before + new

        layers = list(zip(memory, past, factors))
        return out, *(tuple(last(*x, rows) for x in layers) for rows in mix)

    return _in_chunks(chunk, (q, k, v, lr, momentum, decay), state, chunk_size)


def read_layers(weights: tuple[jax.Array, ...], q: jax.Array, *, residual: bool) -> jax.Array:
    """What a chain of matrices `[B, H, Din, Dout]` answers to `[B, T, H, D]`, learning nothing."""
    x = jnp.swapaxes(q.astype(jnp.result_type(q, jnp.float32)), 1, 2)
    start = x
    for n, w in enumerate(weights):
        x = _dot(jax.nn.silu(x) if n else x, w)
    return jnp.swapaxes(x + start if residual else x, 1, 2).astype(q.dtype)


class _Mix(NamedTuple):
    """How M_t and S_t of a chunk add up: rows of weights of M_0, of S_0 and of every gradient."""

    memory: tuple[jax.Array, jax.Array, jax.Array]
    momentum: tuple[jax.Array, jax.Array, jax.Array]


def _mix(lr, momentum, decay, live):
    """Of rates `[C]`; tokens that are not live change nothing."""
    lr, decay = jnp.where(live, lr, 0), jnp.where(live, decay, 0)
    momentum = jnp.where(live, momentum, 1)
    forget, carry = _products(1 - decay), _products(momentum)
    moved = forget[:, 1:] * live  # what of S_r is in M_t
    carried = carry[:, 0]
    fresh = -carry[:, 1:] * lr
    read = forget[:, 0], _dot(moved, carried), _dot(moved, fresh)
    return _Mix(read, (jnp.zeros_like(carried), carried, fresh))


def _products(x):
    """`x_{s+1} ... x_t` at [t, s], for s from -1 (all from the start) to t; 0 beyond."""
    t, s = jnp.arange(len(x))[:, None], jnp.arange(-1, len(x))
    return jnp.where(t >= s, jnp.cumprod(jnp.where(t > s, x[:, None], 1), 0), 0)


def _along(rows, weights, before, slopes):
    """Every row of a mixture of two arrays and of gradients `[C, ...]`."""
    kept, carried, fresh = rows
    new = jnp.tensordot(fresh, slopes, 1, precision="highest")
    return jnp.multiply.outer(kept, weights) + jnp.multiply.outer(carried, before) + new


def _slopes(weights, k, v, residual):
    """The gradient of `|M(k) - v|^2` for every matrix, as factors `[C, Din]` and `[C, Dout]`."""
    inputs, slopes = [k], []
    for w in weights[:-1]:
        x = _dot(inputs[-1], w)
        gate = jax.nn.sigmoid(x)
        inputs.append(x * gate)
        slopes.append(gate * (1 + x * (1 - gate)))
    error = 2 * (_dot(inputs[-1], weights[-1]) + (k if residual else 0) - v)
    errors = [error]
    for w, slope in zip(weights[:0:-1], slopes[::-1]):
        errors.append(_dot(errors[-1], w.T) * slope)
    return list(zip(inputs, errors[::-1]))


def _in_chunks(chunk, inputs, state, size):
    """Calls `chunk(q, k, v, entry, memory, momentum, mix)` for the chunks of every sequence."""
    q, k, v, *rates = inputs
    _check(q, k, v, rates, size)
    wide = jnp.result_type(q, k, v, *rates, jnp.float32)
    state = jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else x.astype(wide), state)
    index, length = state.index, q.shape[1]
    fresh = isinstance(index, int)
    piece = 1 if length == 1 else min(size, length) if fresh else size
    first = index if piece > 1 else 0
    count = -(-(length + (0 if fresh else piece - 1)) // piece)
    place = jnp.arange(count * piece).reshape(count, piece)
    live = (place >= first) & (place < first + length)
    full = (jnp.arange(count) + 1) * size <= index + length

    def pieces(x):
        room = jnp.zeros((count * piece, *x.shape[1:]), wide)
        room = jax.lax.dynamic_update_slice_in_dim(room, x.astype(wide), first, 0)
        return room.reshape(count, piece, *x.shape[1:])

    def body(carry, part):
        memory, momentum, entry = carry
        (q, k, v, *rates), live, full = part
        out, memory, momentum = chunk(q, k, v, entry, memory, momentum, _mix(*rates, live))
        entry = jax.tree.map(lambda new, old: jnp.where(full, new, old), memory, entry)
        return (memory, momentum, entry), out

    def sequence(inputs, carry):
        carry, out = jax.lax.scan(body, carry, (tuple(map(pieces, inputs)), live, full))
        out = out.reshape(count * piece, -1)
        return jax.lax.dynamic_slice_in_dim(out, first, length), carry

    heads = jax.vmap(sequence, (1, 0), (1, 0))
    out, carry = jax.vmap(heads)(inputs, varying_like(tuple(state[:3]), inputs))
    index = jnp.asarray((index + length) % size, jnp.int32)
    return out.astype(v.dtype), MemoryState(*carry, index)


def _check(q, k, v, rates, size):
    if q.ndim != 4 or not q.shape[1] or k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "q and k must be [B, T, H, D] and v [B, T, H, Dv], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    for name, rate in zip(("lr", "momentum", "decay"), rates):
        if rate.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {list(q.shape[:3])}, got {rate.shape}")
    if size < 1:
        raise ValueError(f"chunk_size must be positive, got {size}")
