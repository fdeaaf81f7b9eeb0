"""Triton kernels as functions of arrays whose first axis is a batch."""

import contextlib
import functools
import inspect
import os
import threading
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from attn_kernels import gpu
from attn_kernels.varying import varying

# It sets a variable by which Triton's other users in this process lose the place of their binaries.
with mock.patch.dict(os.environ):
    import jax_triton

_one_at_a_time = threading.Lock()  # the interpreter changes `triton.language` while it runs


def launch(
    kernel, arrays, results, grid, *, warps: int = 4, stages: int = 2, aliases=None, **constants
):
    """The results of a kernel, which `jax.vmap` runs once, on a longer batch.

    The programs of a batch are `(B * grid[0], *grid[1:])`, so that program `p` of the first axis
    has row `p // grid[0]`.

    Args:
      kernel: of `triton.jit`; its parameters are pointers to the arrays, pointers to the results,
        and constants (`tl.constexpr`).
      arrays: `[B, ...]` each, or None, in whose place the kernel gets a pointer that it ignores.
      results: a `jax.ShapeDtypeStruct` `[B, ...]` each, or None, likewise.
      grid: the programs of a row, up to three numbers.
      warps: of a program.
      stages: of loads that a loop has under way.
      aliases: numbers of arrays, and of the results that may take their memory.
      **constants: of the kernel, by name.

    Returns:
      A list of arrays, None where `results` has None.
    """
    shapes = [((1,), jnp.float32) if x is None else (x.shape[1:], x.dtype) for x in results]

    @jax.custom_batching.custom_vmap
    def call(*given):
        batch, remaining = given[0].shape[0], iter(given)
        filled = [given[0] if x is None else next(remaining) for x in arrays]
        outs = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in shapes]
        programs = batch * grid[0], *grid[1:]
        if gpu.interpreted():
            run = functools.partial(_interpret, kernel, programs, outs, constants)
            found = jax.pure_callback(run, outs, *filled)
        else:
            found = jax_triton.triton_call(
                *filled,
                kernel=kernel,
                out_shape=outs,
                grid=programs,
                num_warps=warps,
                num_stages=stages,
                input_output_aliases=aliases,
                **constants,
            )
        return varying(found, given)

    @call.def_vmap
    def _(size, batched, *given):
        def merged(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        found = call(*map(merged, given, batched))
        return [x.reshape(size, -1, *x.shape[1:]) for x in found], [True] * len(found)

    found = call(*(x for x in arrays if x is not None))
    return [None if x is None else y for x, y in zip(results, found)]


def slope_dtype(x, heads: int):
    """Of the derivatives by x `[B, T, heads of x, ...]` that H heads have: float32 for sums."""
    return x.dtype if x.shape[2] == heads else jnp.float32


class _Pointer:
    """An array of NumPy as the interpreter wants it."""

    def __init__(self, array):
        names = dict(bfloat16="bf16", float16="fp16", float32="fp32", int32="i32", int64="i64")
        self.array, self.dtype = array, names[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data


class _Executor(interpreter.GridExecutor):
    """On arrays that are where the interpreter reads them."""

    def _init_args_hst(self, args, kwargs):
        return args, kwargs

    def _restore_args_dev(self, *args):
        pass


class _Language:
    """`triton.language`, whose own kernels are plain functions."""

    def __getattr__(self, name):
        found = getattr(tl, name)
        return found.fn if isinstance(found, triton.JITFunction) else found


@functools.cache
def _plain(kernel):
    """The Python function of a kernel, whose calls of other kernels are calls of such functions."""
    fn = kernel.fn
    scope = dict(fn.__globals__, _language=tl, _core=tl.core)
    for name in fn.__code__.co_names:
        x = scope.get(name)
        if x is tl:
            scope[name] = _Language()
        elif isinstance(x, triton.JITFunction):
            scope[name] = _plain(x)
    copy = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__annotations__, copy.__module__ = fn.__annotations__, fn.__module__
    return interpreter.FunctionRewriter(copy).rewrite_ast()


def _interpret(kernel, programs, outs, constants, *arrays):
    arrays = [np.array(x, order="C") for x in arrays]
    found = [np.zeros(x.shape, x.dtype) for x in outs]
    names = list(inspect.signature(kernel.fn).parameters)
    executor = _Executor(_plain(kernel), names, programs)
    with _one_at_a_time, _bfloat16():
        executor(**dict(zip(names, map(_Pointer, (*arrays, *found)))), **constants)
    return found


@contextlib.contextmanager
def _bfloat16():
    """The interpreter has its bits alone: it cuts them off and multiplies them as integers."""
    builder, handle = interpreter.interpreter_builder, interpreter.TensorHandle
    plain = builder.binary_op

    def numbers(x):
        if x.dtype.scalar == tl.bfloat16:
            return x.data.view(jnp.bfloat16).astype(np.float32)
        return x.data

    def cast(x, to, *_):
        if to.scalar == tl.bfloat16:
            return handle(numbers(x).astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)
        return handle(numbers(x).astype(interpreter._get_np_dtype(to)), to.scalar)

    def dot(a, b, acc, *_):
        product = np.matmul(numbers(a), numbers(b), dtype=acc.data.dtype)
        return handle(product + acc.data, acc.dtype.scalar)

    def binary(a, b, op):
        if a.dtype.scalar != tl.bfloat16:
            return plain(a, b, op)
        return cast(handle(op(numbers(a), numbers(b)), tl.float32), tl.bfloat16)

    changed = dict(cast_impl=cast, create_fp_to_fp=cast, create_dot=dot, binary_op=binary)
    for name, function in changed.items():
        setattr(builder, name, function)
    try:
        yield
    finally:
        for name in changed:
            delattr(builder, name)
