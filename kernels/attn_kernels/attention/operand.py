"""Arrays that masks, score modifications and normalisers read tile by tile."""

import jax
import jax.numpy as jnp

AXES = "bhqk"


def operand(array: jax.Array, axes: str) -> jax.Array:
    """Lays `array` out as `[B|1, H|1, T|1, S|1]`, with length 1 on the axes that it lacks.

    Args:
      array: any array with one dimension for each letter of `axes`.
      axes: the meaning of the dimensions, letters of "b" (batch), "h" (query head), "q" (query),
        "k" (key), each at most once, in any order; "" for a number.

    Returns:
      The array that a tile of scores `[B, H, T, S]` broadcasts against.

    Raises:
      ValueError: if `axes` has other letters, repeats one, or does not fit the rank of `array`.
    """
    array = jnp.asarray(array)
    if sorted(set(axes)) != sorted(axes) or not set(axes) <= set(AXES):
        raise ValueError(f"axes must be distinct letters of {AXES!r}, got {axes!r}")
    if array.ndim != len(axes):
        raise ValueError(f"array must have one dimension for each of {axes!r}, got {array.shape}")
    order = [axes.index(a) for a in AXES if a in axes]
    absent = [n for n, a in enumerate(AXES) if a not in axes]
    return jnp.expand_dims(jnp.transpose(array, order), absent)
