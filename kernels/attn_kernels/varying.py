"""Loops inside `jax.shard_map`, which tells arrays that differ between devices from others."""

from typing import Any

import jax
import jax.numpy as jnp


def varying_like(carry: Any, *arrays: Any) -> Any:
    """`carry`, typed as differing between devices along every mesh axis that `arrays` differ on.

    A loop's carry must have one type from the first step on, and what starts as a constant ends as
    a function of the arrays. The values stay as they are: a zero that depends on the arrays in
    type alone, which the compiler drops, is added to them.
    """
    zeros = (jnp.where(x[(0,) * x.ndim] == 0, 0, 0) for x in jax.tree.leaves(arrays))
    zero = sum(zeros)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), carry)


def varying(tree: Any, *like: Any) -> Any:
    """`tree`, typed as differing between devices along every mesh axis that `like` differs on.

    The transpose is a sum over the devices, so that an array that all of them share gets the whole
    of its gradient.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(like)))

    def cast(x):
        missing = tuple(axes - varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def varying_axes(x) -> frozenset[str]:
    """The mesh axes along which the type of an array says that devices may differ."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def shaped(shape: tuple[int, ...], dtype: Any, *like: Any) -> jax.ShapeDtypeStruct:
    """The type of a kernel's result, which differs between devices where its arguments do."""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(like)))
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    if hasattr(jax.typeof(jnp.zeros(())), "vma"):
        return jax.ShapeDtypeStruct(shape, dtype, vma=axes)
    kind = jax.sharding.ManualAxisType(varying=axes)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
