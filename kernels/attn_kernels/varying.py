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
