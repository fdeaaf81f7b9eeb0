"""Spectra of attention weights."""

import jax
import jax.numpy as jnp


def spectral_gap(weights: jax.Array) -> jax.Array:
    """How fast weights mix tokens when applied again and again: `1 - |lambda_2|`.

    lambda_2 is the eigenvalue of the second largest modulus, 0 for a single token; the largest is
    1. The gap is 1 for uniform weights and 0 for the identity.

    Args:
      weights: `[..., T, T]`, whose rows are at least 0 and sum to 1.

    Returns:
      `[...]`, in float32 or better.

    Raises:
      ValueError: if the last two axes differ.

    Source: Nahshan et al., 2023, arXiv 2311.13541.
    """
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must be [..., T, T], got {weights.shape}")
    wide = weights.astype(jnp.result_type(jnp.float32, weights))
    moduli = jnp.sort(jnp.abs(jnp.linalg.eigvals(wide)), axis=-1)
    return 1 - (moduli[..., -2] if weights.shape[-1] > 1 else 0 * moduli[..., 0])
