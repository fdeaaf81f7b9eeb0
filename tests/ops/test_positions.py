import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

bucket = functools.partial(ops.relative_position_bucket, num_buckets=32, max_distance=128)


def by_formula(r, bidirectional, num_buckets, max_distance):
    side = num_buckets // 2 if bidirectional else num_buckets
    base, n = (side * (r > 0), abs(r)) if bidirectional else (0, max(-r, 0))
    near = side // 2
    if n < near:
        return base + n
    far = math.log(n / near) / math.log(max_distance / near) * (side - near)
    return base + min(side - 1, near + math.floor(far + 1e-6))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 100), (6, 1000), (64, 40)]
)
def test_buckets_are_those_of_the_formula(bidirectional, num_buckets, max_distance):
    r = np.arange(-1200, 1201)
    part = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    got = ops.relative_position_bucket(jnp.array(r), **part)
    assert got.tolist() == [by_formula(int(n), *part.values()) for n in r]


def test_buckets_split_the_sides_and_end():
    assert bucket(jnp.array([0, -1, 1, -500, 500])).tolist() == [0, 1, 17, 15, 31]
    one_sided = functools.partial(bucket, bidirectional=False)
    assert one_sided(jnp.array([9, 1, 0, -1, -128, -127])).tolist() == [0, 0, 0, 1, 31, 31]


def test_bias_depends_on_the_distance_alone():
    table = jnp.arange(64.0).reshape(32, 2)
    whole = ops.relative_position_bias(table, q_len=9, k_len=9)
    assert (whole[:, :, 1:, 1:] == whole[:, :, :-1, :-1]).all()
    assert (ops.relative_position_bias(table, q_len=2, k_len=9) == whole[:, :, -2:]).all()
    assert whole.shape == (1, 2, 9, 9) and (whole[0, :, 3, 3] == table[0]).all()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"table must be \[32, H\], got \[16, 2\]"):
        ops.relative_position_bias(jnp.ones((16, 2)), q_len=2, k_len=2)
    with pytest.raises(ValueError, match="num_buckets=2 must leave"):
        ops.relative_position_bucket(jnp.arange(3), num_buckets=2)
    with pytest.raises(ValueError, match="must be above 16, got 10"):
        ops.relative_position_bucket(jnp.arange(3), num_buckets=64, max_distance=10)
