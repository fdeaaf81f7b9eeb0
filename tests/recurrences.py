"""Calls of the recurrence that kernels must agree with the definition on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from calls import jitted, on_cpu

from attn_kernels.recurrence import linear_attention

GATES = -np.inf, -1e4, -50, -1e-4, 0


def inputs(write, decay, length, dim=40, width=24, dtype=jnp.bfloat16):
    """Grouped heads, keys of norm 1 and, where there are gates, mixtures of all of them."""
    rng = np.random.default_rng(length)

    def normal(heads, dim):
        return jnp.asarray(rng.normal(size=(1, length, heads, dim)), dtype)

    arrays = dict(q=normal(2, dim), k=normal(1, dim), v=normal(2, width))
    arrays["initial_state"] = jnp.asarray(rng.normal(size=(1, 2, dim, width)), jnp.float32)
    if decay != "none":
        shape = (1, length, 2) if decay == "head" else (1, length, 2, dim)
        gates = rng.choice(GATES, shape, p=(0.02, 0.02, 0.02, 0.5, 0.44))
        arrays["log_decay"] = jnp.asarray(gates, jnp.float32)
    if write == "delta":
        arrays["k"] /= jnp.linalg.norm(arrays["k"].astype(jnp.float32), axis=-1, keepdims=True)
        arrays["k"] = arrays["k"].astype(dtype)
        arrays["beta"] = jnp.asarray(rng.uniform(size=(1, length, 1)), jnp.float32)
    return arrays


def everything(arrays, function=linear_attention, **options):
    """Output, last state and the gradients of every argument, with cotangents on both."""

    def weigh(x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum()

    def loss(arrays):
        results = function(**arrays, return_state=True, **options)
        return weigh(results[0]) + weigh(results[1]), results

    return jax.grad(loss, has_aux=True)(arrays)


def within(got, base, exact, rounding=None):
    """Results err at most twice as much as others, `base`, in the same precision.

    Args:
      got, base, exact: trees of arrays.
      rounding: relative to the largest number, by default that of the dtype of every array.
    """
    for (path, a), b, c in zip(
        jax.tree.leaves_with_path(got), *map(jax.tree.leaves, (base, exact)), strict=True
    ):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        unit = float(jnp.finfo(a.dtype).eps) if rounding is None else rounding
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        assert np.abs(a - c).max() <= 2 * np.abs(b - c).max() + unit * np.abs(c).max(), path


def check(implementation, rounding, arrays, form="recurrent", **options):
    """An implementation errs at most twice as much as XLA's form in the same precision."""
    run = functools.partial(everything, implementation=implementation, **options)
    got = jitted(run, implementation)(arrays)
    run = jax.jit(functools.partial(everything, form=form, implementation="xla", **options))
    base = on_cpu(run, arrays)
    with jax.enable_x64(True):
        exact = on_cpu(run, {name: x.astype(jnp.float64) for name, x in arrays.items()})
    within(got, base, exact, rounding)
