import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops
from attn_lab.analysis import hebbian_recall, recall_capacity


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wide", [False, True])
def test_golden(wide):
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
        golden.check("hebbian_recall", wide)


@pytest.mark.parametrize("rule", ["hebbian", "delta"])
def test_orthonormal_keys_are_recalled_exactly(rule, x64):
    keys, _ = jnp.linalg.qr(normal(0, 9, 9))
    values = normal(1, 9, 4)
    close(hebbian_recall(keys, values, keys, rule=rule), values)
    close(hebbian_recall(keys[:1], values[:1], keys[:1], rule=rule), values[:1])


def test_the_rules_are_linear_attention_and_the_delta_rule(x64):
    keys, values, queries = normal(0, 6, 4), normal(1, 6, 3), normal(2, 5, 4)
    keys = keys / jnp.linalg.norm(keys, axis=1, keepdims=True)
    q, k, v = (x[None, :, None] for x in (queries, keys, values))
    plain = ops.linear_attention(q, k, v, feature_map="identity", normalization="none")
    close(hebbian_recall(keys, values, queries, lr=0.5), 0.5 * plain[0, :, 0])
    memory = np.zeros((4, 3))
    for key, value in zip(np.asarray(keys), np.asarray(values)):
        memory += 0.5 * np.outer(key, value - memory.T @ key)
    close(hebbian_recall(keys, values, queries, rule="delta", lr=0.5), queries @ memory)
    turned = hebbian_recall(keys[::-1], values[::-1], queries, rule="delta", lr=0.5)
    assert not np.allclose(turned, queries @ memory, atol=1e-2)


def test_capacity_follows_its_law():
    settings = "dim", "num_items", "rule", "trials"
    capacity = jax.jit(recall_capacity, static_argnames=settings)
    rng = jax.random.key(0)
    ratio, accuracy = capacity(64, 9, rng)
    assert abs(ratio - 8) < 0.6 and accuracy > 0.98
    crowded, wrong = capacity(16, 33, rng)
    assert abs(crowded - 0.5) < 0.05 and wrong < 0.9
    careful, _ = capacity(64, 9, rng, rule="delta")
    assert careful > 1.5 * ratio
    alone, right = capacity(8, 1, rng, trials=2)
    assert alone > 1e6 and right == 1


def test_errors_name_the_argument():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="rule must be one of hebbian, delta"):
        hebbian_recall(x, x, x, rule="oja")
    with pytest.raises(ValueError, match="keys, values and queries must be"):
        hebbian_recall(x, x, x[:, 1:])
    with pytest.raises(ValueError, match="must be positive"):
        recall_capacity(4, 0, jax.random.key(0))
