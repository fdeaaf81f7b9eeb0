import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("stem", ["cct_sequence_pool", "cct_conv_tokenizer"])
def test_golden(stem, wide):
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
        golden.check(stem, wide)


def test_zero_weights_pool_to_the_mean():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    pooled = ops.sequence_pool(x, jnp.zeros((3, 1)), jnp.ones(1))
    np.testing.assert_allclose(pooled, x.mean(1), rtol=1e-5, atol=1e-6)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="x must be"):
        ops.sequence_pool(jnp.zeros((2, 5, 3)), jnp.zeros((4, 1)), jnp.zeros(1))
    with pytest.raises(ValueError, match=r"kernels\[0\] must be"):
        ops.conv_tokenizer(jnp.zeros((1, 8, 8, 3)), [jnp.zeros((3, 3, 2, 4))], stride=1, padding=1)
