import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.attention import Mask, allowed_rows, map_query_blocks, operand
from attn_lab.ops import causal_mask, segment_mask

X = jax.random.normal(jax.random.key(0), (2, 7, 3))


def windowed(rows, x):
    """The sum of three rows, the last of them the row itself, and the number of that row."""
    total = x[:, 2:] + x[:, 1:-1] + x[:, :-2]
    return total, jnp.broadcast_to(rows[2:], (*x.shape[:1], rows.size - 2))


@pytest.mark.parametrize("block", [1, 3, 7, 50])
def test_blocks_with_a_halo_are_rows_of_the_whole(block):
    total, rows = map_query_blocks(windowed, X, block=block, halo=2)
    before = jnp.pad(X, ((0, 0), (2, 0), (0, 0)))
    np.testing.assert_allclose(total, X + before[:, 1:-1] + before[:, :-2], rtol=1e-6)
    assert (rows == jnp.arange(7)).all()


def test_gradients_pass_block_borders():
    def loss(x, block):
        total, _ = map_query_blocks(windowed, x, block=block, halo=2)
        return jnp.sum(jnp.sin(total))

    want = jax.grad(loss)(X, 7)
    np.testing.assert_allclose(jax.grad(loss)(X, 2), want, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_size_of_all_rows_is_kept():
    keys = jnp.ones((2, 1024, 3))

    def loss(q):
        def block(rows, q):
            return jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, keys)) @ keys

        return jnp.sum(map_query_blocks(block, q, block=64))

    compiled = jax.jit(jax.grad(loss)).lower(keys).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 1024 * 1024 * 4


@pytest.mark.parametrize(
    "mask",
    [
        causal_mask(),
        segment_mask(jnp.array([[0, 0, 1, 1, 1], [0, 1, 2, 2, 3]])) & causal_mask(),
        Mask(lambda b, h, q, k, even: even & (k <= q + h), (operand(jnp.arange(2) == 0, "h"),)),
    ],
    ids=["causal", "segments", "heads"],
)
def test_allowed_rows_are_those_of_the_dense_pattern(mask):
    got = jnp.broadcast_to(allowed_rows(mask, jnp.arange(-1, 7), 5, 5), (2, 2, 8, 5))
    assert not got[:, :, [0, 6, 7]].any()
    want = mask.dense(5, 5)
    want = want if want.ndim == 4 else jnp.broadcast_to(want, (2, 2, 5, 5))
    assert (got[:, :, 1:6] == want).all() and want.any() and not want.all()
    assert allowed_rows(None, jnp.array([-1, 0, 5]), 5, 5).ravel().tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ((X, X[:, 1:]), {"block": 2}, r"one length along axis 1, got \[6, 7\]"),
        (X, {"block": 0}, "block must be positive"),
        (X, {"block": 2, "halo": -1}, "halo not negative"),
    ],
)
def test_errors_name_the_argument(arrays, arguments, message):
    with pytest.raises(ValueError, match=message):
        map_query_blocks(windowed, arrays, **arguments)
