"""Multi-head attention that regresses values on keys."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from attn_lab import ops
from attn_lab.nn.attention import MultiHeadAttention
from attn_lab.nn.layers import Build


class LocalLinearAttention(MultiHeadAttention):
    """Multi-head attention that reads, for every query, a linear fit to the values over the keys.

    Args:
      width, arguments: as `MultiHeadAttention`, without dropout.
      ridge: of the fits at first; its logarithm is a parameter of every head.
      solver, cg_iters: as in `ops.local_linear_attention`.

    Source: Local Linear Attention, 2025, arXiv 2510.01450.
    """

    drops = False

    def __init__(
        self,
        width: int,
        *,
        ridge: float = 1.0,
        solver: str = "direct",
        cg_iters: int | None = None,
        **arguments: Any,
    ):
        if ridge <= 0:
            raise ValueError(f"ridge must be positive, got {ridge}")
        super().__init__(width, **arguments)
        self.solver, self.cg_iters = solver, cg_iters
        start = nnx.initializers.constant(jnp.log(ridge))
        self.log_ridge = Build.of(arguments).param((self.num_heads,), start)

    def _attend(self, q, k, v, mask, rngs):
        return ops.local_linear_attention(
            q,
            k,
            v,
            jnp.exp(self.log_ridge[...])[:, None],
            causal=False,
            solver=self.solver,
            cg_iters=self.cg_iters,
            mask=mask,
        )
