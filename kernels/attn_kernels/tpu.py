"""How Pallas kernels are run on TPUs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attn_kernels.parallel import of_one_device
from attn_kernels.varying import shaped, varying, varying_axes


def available() -> bool:
    """Whether kernels may be chosen: on a TPU, where the compiler has nothing to split."""
    return jax.default_backend() == "tpu" and of_one_device()


def run(
    kernel: Callable,
    args: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: Any,
) -> list[jax.Array]:
    """The results of a kernel, interpreted on a CPU.

    Args:
      kernel: a function of references.
      args: arrays, the scalars that the grid prefetches first.
      results: types of what the kernel writes.
      grid: a `GridSpec`, whose last dimension runs in order, and the others in any.
    """
    args = varying(list(args), args)
    interpret: Any = jax.default_backend() == "cpu"
    if interpret and any(map(varying_axes, args)):
        # The plain interpreter does not tell arrays that differ between devices from others.
        interpret = pltpu.InterpretParams()
    semantics = *["parallel"] * (len(grid.grid) - 1), "arbitrary"
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=[shaped(x.shape, x.dtype, args) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
    )(*args)
