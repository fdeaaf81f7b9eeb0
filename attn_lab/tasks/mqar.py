"""Multi-query associative recall (Arora, Eyuboglu, et al., Zoology, 2023, arXiv 2312.04927)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attn_lab.tasks.metrics import IGNORE


@functools.partial(
    jax.jit,
    static_argnames=(
        "batch",
        "seq_len",
        "num_kv_pairs",
        "vocab",
        "power",
        "num_passes",
        "random_fill",
    ),
)
def mqar(
    key: jax.Array,
    batch: int,
    *,
    seq_len: int = 64,
    num_kv_pairs: int = 4,
    vocab: int = 8192,
    power: float = 0.01,
    num_passes: int = 1,
    random_fill: bool = True,
) -> dict[str, jax.Array]:
    """Key-value pairs, then every key once more at a random place, where its value is asked.

    With `C = 2 * num_kv_pairs * num_passes`, an example is `k_1 v_1 ... k_K v_K`, repeated
    `num_passes` times, then `(seq_len - C) // 2` slots of two tokens; key `k_j` comes back in the
    first token of slot `g_j`, where the target is `v_j`. Keys are distinct ids of
    `1 .. vocab // 2 - 1`, values distinct ids of `vocab // 2 .. vocab - 1`, slots are drawn without
    replacement with the probabilities of `mqar_slot_probabilities`. The rest is filler.

    Args:
      key: `jax.random` key; the same key gives the same batch.
      batch: number of examples B.
      seq_len: T, even.
      num_kv_pairs: pairs K of an example, `2 * K * (num_passes + 1) <= seq_len`.
      vocab: number of ids, more than `seq_len`.
      power: 1 spreads the queries evenly, towards 0 they crowd right after the context.
      num_passes: how many times the context is shown.
      random_fill: filler is uniform in `0 .. vocab - 1` instead of 0.

    Returns:
      `{"inputs", "targets"}`, int32 `[B, T]`. `targets[b, t]` is predicted from position t; the
      positions without a query, all but K of an example, hold -100.

    Raises:
      ValueError: sizes that do not fit.

    Source: Arora, Eyuboglu, Timalsina, Johnson, Poli, Zou, Rudra, Ré, 2023, arXiv 2312.04927.
    """
    _check_sizes(seq_len, num_kv_pairs, num_passes)
    if vocab <= seq_len:
        raise ValueError(f"vocab must be more than seq_len={seq_len}; got {vocab}")
    log_p = jnp.log(
        mqar_slot_probabilities(seq_len, num_kv_pairs, power=power, num_passes=num_passes)
    )

    def example(key):
        for_keys, for_values, for_slots, for_fill = jax.random.split(key, 4)
        keys = _distinct(for_keys, num_kv_pairs, 1, vocab // 2)
        values = _distinct(for_values, num_kv_pairs, vocab // 2, vocab)
        # The largest of log p + Gumbel, in order, are successive draws without replacement.
        _, slots = jax.lax.top_k(log_p + jax.random.gumbel(for_slots, log_p.shape), num_kv_pairs)
        fill = jax.random.randint(for_fill, (seq_len,), 0, vocab)
        return keys, values, slots, fill

    keys, values, slots, fill = jax.vmap(example)(jax.random.split(key, batch))
    inputs, targets = mqar_assemble(keys, values, slots, seq_len, num_passes=num_passes)
    if random_fill:
        inputs = jnp.where(inputs == 0, fill, inputs)
    return {"inputs": inputs, "targets": targets}


def mqar_assemble(
    keys: jax.Array, values: jax.Array, slots: jax.Array, seq_len: int, *, num_passes: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Examples of `mqar` from given keys, values and slots, with 0 as filler.

    Args:
      keys, values: ids `[B, K]`.
      slots: `[B, K]`, the slot of each key, distinct, in `0 .. (seq_len - C) // 2 - 1`.
      seq_len: T, even.
      num_passes: how many times the context is shown.

    Returns:
      `(inputs, targets)`, int32 `[B, T]`.

    Raises:
      ValueError: sizes that do not fit.
    """
    if not keys.ndim == 2 or not keys.shape == values.shape == slots.shape:
        raise ValueError(
            "keys, values and slots must have one shape [B, K]; "
            f"got {keys.shape}, {values.shape} and {slots.shape}"
        )
    batch, num_kv_pairs = keys.shape
    _check_sizes(seq_len, num_kv_pairs, num_passes)
    pairs = jnp.stack([keys, values], -1).astype(jnp.int32).reshape(batch, 2 * num_kv_pairs)
    context = jnp.tile(pairs, num_passes)
    queries = context.shape[1] + 2 * slots
    rows = jnp.arange(batch)[:, None]
    inputs = jnp.zeros((batch, seq_len), jnp.int32).at[:, : context.shape[1]].set(context)
    targets = jnp.full((batch, seq_len), IGNORE, jnp.int32)
    return (
        inputs.at[rows, queries].set(keys.astype(jnp.int32)),
        targets.at[rows, queries].set(values.astype(jnp.int32)),
    )


def mqar_slot_probabilities(
    seq_len: int, num_kv_pairs: int, *, power: float = 0.01, num_passes: int = 1
) -> jax.Array:
    """The law of the first slot drawn by `mqar`: `p_i ~ power * i**(power - 1)`, i = 1 .. n.

    Returns:
      `[n]` with `n = (seq_len - 2 * num_kv_pairs * num_passes) // 2`, summing to 1.

    Raises:
      ValueError: sizes that do not fit.
    """
    _check_sizes(seq_len, num_kv_pairs, num_passes)
    if power <= 0:
        raise ValueError(f"power must be positive; got {power}")
    slot = np.arange(1, (seq_len - 2 * num_kv_pairs * num_passes) // 2 + 1)
    weights = power * slot.astype(np.float64) ** (power - 1)
    return jnp.asarray(weights / weights.sum())


def _check_sizes(seq_len, num_kv_pairs, num_passes):
    if num_kv_pairs < 1 or num_passes < 1:
        raise ValueError(
            f"num_kv_pairs and num_passes must be at least 1; got {num_kv_pairs} and {num_passes}"
        )
    need = 2 * num_kv_pairs * (num_passes + 1)
    if seq_len % 2 or seq_len < need:
        raise ValueError(
            f"seq_len must be even and at least {need} for {num_kv_pairs} pairs shown "
            f"{num_passes} times and asked once; got {seq_len}"
        )


def _distinct(key, size, low, high):
    """`size` distinct integers of `[low, high)` in random order, uniform over all such tuples.

    Floyd's sampling: nothing of the size of the range is made, only of the size of the sample.
    """
    for_draws, for_order = jax.random.split(key)
    last = jnp.arange(high - low - size, high - low)
    draws = jax.random.randint(for_draws, (size,), 0, last + 1)

    def pick(chosen, step):
        index, draw, last = step
        fresh = jnp.all(chosen != draw)
        return chosen.at[index].set(jnp.where(fresh, draw, last)), None

    chosen, _ = jax.lax.scan(pick, jnp.full(size, -1), (jnp.arange(size), draws, last))
    return low + jax.random.permutation(for_order, chosen)
