import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.attention import Mask
from attn_kernels.attention.ahead import ahead, source
from attn_kernels.attention.elementwise import COMMON
from attn_lab import ops


def shapes(mask):
    return [x.shape[2:] for x in mask.operands]


def dense(mask, q_len, k_len):
    indices = jnp.arange(q_len)[:, None] + k_len - q_len, jnp.arange(k_len)
    zero = jnp.zeros((1, 1, 1, 1), jnp.int32)
    return np.asarray(jnp.broadcast_to(mask.allowed(zero, zero[0], *indices), (1, 1, q_len, k_len)))


@pytest.mark.parametrize(
    "mask, lengths, vectors",
    [
        (ops.neighborhood_mask((8, 8), (3, 5), tile=(4, 2)), (64, 64), 6),
        (ops.neighborhood_mask((2, 4, 8), (2, 3, 5), tile=(2, 2, 4)), (64, 64), 9),
        (ops.neighborhood_mask((8, 8), (3, 3), dilation=2), (64, 64), 10),
        (Mask(lambda b, h, q, k: (q // 7 % 3 == k // 5 % 3) & (k <= q)), (30, 41), 2),
        (Mask(lambda b, h, q, k: jnp.minimum(q // 2, 9) % 2 == 0), (30, 41), 1),
        (
            ops.neighborhood_mask((8, 8), (3, 3)) & ops.segment_mask(jnp.ones((1, 64), int)),
            (64, 64),
            5,
        ),
    ],
    ids=["grid", "volume", "dilated", "blocks", "queries", "operands"],
)
def test_the_pattern_is_the_same(mask, lengths, vectors):
    found = ahead(mask, *lengths, COMMON)
    assert len(found.operands) - len(mask.operands) == vectors
    assert all(1 in shape for shape in shapes(found))
    np.testing.assert_array_equal(dense(found, *lengths), dense(mask, *lengths))
    assert source(found).predicate is mask.predicate


@pytest.mark.parametrize(
    "mask",
    [
        ops.causal_mask(),
        ops.sliding_window_mask(5, 0),
        ops.segment_mask(jnp.zeros((1, 30), int)),
        Mask(lambda b, h, q, k: (q + h) // 7 % 3 == k),
        Mask(lambda b, h, q, k: jnp.cumsum(k // 7 % 3, -1) == q),
    ],
    ids=["causal", "window", "segments", "heads", "not elementwise"],
)
def test_what_is_cheap_or_not_of_positions_alone_stays(mask):
    assert ahead(mask, 30, 30, COMMON) is mask
    assert source(mask) is mask


def test_a_kernel_divides_nothing():
    mask = ops.neighborhood_mask((8, 8), (3, 5), tile=(4, 2))
    place = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 1, 1, 1), (1, 1, 1), (2, 1), (3,))]
    found = ahead(mask, 64, 64, COMMON)
    operands = [
        jax.ShapeDtypeStruct((1, 1, 2, 1) if x.shape[2] > 1 else (1, 1, 1, 3), x.dtype)
        for x in found.operands
    ]
    jaxpr = jax.make_jaxpr(found.predicate)(*place, *operands)
    assert {eqn.primitive.name for eqn in jaxpr.eqns} <= {"le", "ge", "and", "broadcast_in_dim"}
