"""Recurrences over a sequence that several devices share, inside `jax.shard_map`.

What a device's steps do to a state is affine, `S -> A S + B`, and such maps compose associatively.
So every device runs its own steps from a zero state, the maps are combined across devices, and the
state before a device's steps then reaches its outputs by one matrix product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from attn_kernels import parallel
from attn_kernels.recurrence.decay import decayed, matmul, since_start
from attn_kernels.varying import varying


def linear(run: Callable, arrays: Any, state: jax.Array, *, axis_name: str, rank=None):
    """The recurrence of engine 2 over the steps of all devices.

    A device sends `ceil(log2 N) + 1` times its map: B is `[D, Dv]` a head; A is diagonal, one
    number a channel, without beta, and `[D, D]` with it. The latter is the recurrence of the
    identity, which runs beside the values as D more of them: the steps of a delta rule cost
    `1 + D / Dv` times what they cost on one device.

    Args:
      run: `run(arrays, state) -> (out, state)` on the steps of one device.
      arrays: q, k, v, log_decay and beta of a device as in `definition`.
      state: before the first step of all, the same on every device.
      axis_name: of the devices, in the order of their steps.
      rank: the number of the device, `axis_index` if it is None.

    Returns:
      The device's outputs `[B, H, T / N, Dv]`, and the state after the last step of all.
    """
    q, k, v, log_decay, beta = arrays
    rank = parallel.rank_of(axis_name, rank)
    nothing = varying(jnp.zeros_like(state), arrays, rank)
    if beta is None:
        out, written = run(arrays, nothing)
        reader = q * jnp.exp(since_start(log_decay))
        change, maps = log_decay.sum(-2), (_decay, jnp.add)
    else:
        width, dim = v.shape[-1], k.shape[-1]
        unit = jnp.broadcast_to(jnp.eye(dim, dtype=state.dtype), (*state.shape[:2], dim, dim))
        silent = jnp.zeros((*v.shape[:-1], dim), v.dtype)
        wide = jnp.concatenate([v, silent], -1)
        start = jnp.concatenate([nothing, varying(unit, nothing)], -1)
        out, last = run((q, k, wide, log_decay, beta), start)
        (out, reader), (written, change) = (jnp.split(x, [width], -1) for x in (out, last))
        maps = matmul, matmul
    before, last = _states(*maps, change, written, state, axis_name, rank)
    return out + matmul(reader, before), last


def diagonal(run: Callable, arrays, state: jax.Array, *, axis_name: str, rank=None):
    """A diagonal recurrence over the steps of all devices.

    A device's steps run twice, first for what they write alone and then from the state before
    them, so that nothing of the size of all their states is ever held.

    Args:
      run, state, axis_name, rank: as in `linear`.
      arrays: `x`, `log_decay`, `write` and `read` of a device by name.

    Returns:
      The device's outputs `[B, T / N, C]`, and the state after the last step of all.
    """
    rank = parallel.rank_of(axis_name, rank)
    nothing = varying(jnp.zeros_like(state), arrays, rank)
    log_decay = arrays["log_decay"]
    change = log_decay.sum(1) if log_decay.ndim == 4 else log_decay * arrays["x"].shape[1]
    change = jnp.broadcast_to(change, state.shape)
    _, written = run(arrays, nothing)
    before, last = _states(_fade, jnp.add, change, written, state, axis_name, rank)
    return run(arrays, before)[0], last


def _decay(log_decay, state):
    """`exp(log_decay) state`, row by row."""
    return decayed(state, log_decay)


def _fade(log_decay, state):
    """`exp(log_decay) state`, channel by channel."""
    return decayed(state[..., None], log_decay)[..., 0]


def _states(apply, compose, change, written, state, axis_name, rank):
    """The state before this device's steps, and after the last step of all devices.

    Device r first has the map of its own steps, then of those of 2, 4, 8, ... devices up to r.
    `apply(change, state)` maps a state, `compose(change, earlier)` makes one change of two.
    """
    count = jax.lax.axis_size(axis_name)

    def earlier(arrays, by):
        pairs = [(n, n + by) for n in range(count - by)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, pairs), arrays)

    by = 1
    while by < count:
        change_before, written_before = earlier((change, written), by)
        some = rank >= by
        written = written + jnp.where(some, apply(change, written_before), 0)
        change = jnp.where(some, compose(change, change_before), change)
        by *= 2
    after = written + apply(change, varying(state, written))
    last = jax.lax.psum(jnp.where(rank == count - 1, after, 0), axis_name)
    return jnp.where(rank == 0, state, earlier(after, 1)), last


def over_devices(
    function: Callable, run: Callable, axes, length: int, kernel: bool = False
) -> Callable:
    """`run`, by `function` over the devices of `sequence_parallel` where it applies to a length.

    Args:
      function: `linear` or `diagonal`.
      run: on the steps of one device.
      axes: the axis of T in every array, -1 where there is none.
      length: T.
      kernel: whether `run`, of `linear`, may be a kernel, which the compiler cannot split: every
        device then runs it on its own rows and heads, also where no sequence is shared.
    """
    found = parallel.current(kernel)
    if found is None or not (kernel or found.splits(length)):
        return run
    shared = found.splits(length)

    def local(rank, arrays, state):
        if not shared:
            return run(arrays, state)
        return function(run, arrays, state, axis_name=found.axis, rank=rank)

    if kernel:
        along = found.axis if shared else None

        def everywhere(arrays, state):
            batch, heads = state.shape[:2]
            names = found.dividing(found.batch, batch), found.dividing(found.heads, heads)

            def spec(x, *rest):
                return P(*(name if n > 1 else None for name, n in zip(names, x.shape)), *rest)

            specs = jax.tree.map(lambda x: spec(x, along), arrays), spec(state)
            out = P(*names, along), P(*names)
            return found.shard_map(local, specs, out, alone=False)(arrays, state)

        return everywhere
    specs = jax.tree.map(lambda axis: P(*[None] * axis, found.axis) if axis >= 0 else P(), axes)
    out = P(*[None] * OUT_AXES[function], found.axis)
    return found.shard_map(local, (specs, P()), (out, P()))


OUT_AXES = {linear: 2, diagonal: 1}
