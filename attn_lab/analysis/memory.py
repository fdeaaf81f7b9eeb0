"""How much an associative memory recalls."""

import jax
import jax.numpy as jnp

from attn_kernels.recurrence import linear_attention

__all__ = ["hebbian_recall", "recall_capacity"]

RULES = "hebbian", "delta"


def hebbian_recall(
    keys: jax.Array,
    values: jax.Array,
    queries: jax.Array,
    *,
    rule: str = "hebbian",
    lr: float | jax.Array = 1.0,
) -> jax.Array:
    """What a memory that has learned pairs of keys and values answers to queries: `W^T q`.

        hebbian:  W = lr sum_i k_i v_i^T
        delta:    W <- W + lr k_i (v_i - W^T k_i)^T, in order

    Args:
      keys: `[N, D]`, usually of norm 1; the delta rule diverges beyond `lr |k|^2 = 2`.
      values: `[N, E]`.
      queries: `[M, D]`.
      rule: "hebbian" or "delta".
      lr: how strongly a pair is learned.

    Returns:
      `[M, E]` in the dtype of the values.

    Raises:
      ValueError: if shapes do not fit, or the rule is unknown.

    Source: Understanding Transformers through the Lens of Pavlovian Conditioning, 2025, arXiv
    2508.08289.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if any(x.ndim != 2 for x in (keys, values, queries)) or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"keys, values and queries must be [N, D], [N, E] and [M, D], "
            f"got {keys.shape}, {values.shape} and {queries.shape}"
        )
    k, v = (x[None, :, None] for x in (keys, values))
    lr = jnp.asarray(lr, jnp.result_type(jnp.float32, keys, values))
    beta = jnp.broadcast_to(lr, k.shape[:3]) if rule == "delta" else None
    v = lr * v if beta is None else v
    _, memory = linear_attention(k, k, v, beta=beta, return_state=True)
    return jnp.matmul(queries, memory[0, 0], precision="highest").astype(values.dtype)


def recall_capacity(
    dim: int, num_items: int, rng: jax.Array, *, rule: str = "hebbian", trials: int = 32
) -> tuple[jax.Array, jax.Array]:
    """How well random pairs are recalled from one memory: signal over noise, and accuracy.

    Keys are uniform on the unit sphere, values normal, both of `dim` channels. The Hebbian rule has
    a signal-to-noise ratio of about `dim / (num_items - 1)`.

    Args:
      dim: D, of keys and values.
      num_items: N, how many pairs one memory learns, with strength 1.
      rng: a key.
      rule: as in `hebbian_recall`.
      trials: how many memories.

    Returns:
      The mean square of values over that of errors, inf without errors; and the fraction of items
      whose recalled value is nearest to their own.

    Source: Understanding Transformers through the Lens of Pavlovian Conditioning, 2025, arXiv
    2508.08289.
    """
    if min(dim, num_items, trials) < 1:
        raise ValueError(
            f"dim, num_items and trials must be positive, got {dim}, {num_items}, {trials}"
        )
    keys, values = jax.random.normal(rng, (2, trials, num_items, dim))
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    recalled = jax.vmap(lambda k, v: hebbian_recall(k, v, k, rule=rule))(keys, values)
    signal, noise = jnp.sum(values**2), jnp.sum((recalled - values) ** 2)
    nearness = jnp.einsum("nid,njd->nij", recalled, values) - jnp.sum(values**2, -1)[:, None] / 2
    hits = nearness.argmax(-1) == jnp.arange(num_items)
    return signal / noise, hits.mean()
