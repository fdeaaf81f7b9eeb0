import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import Mamba2

X = jax.random.normal(jax.random.key(0), (2, 9, 8))


def layer(**arguments):
    settings = dict(d_state=6, headdim=4, ngroups=2, kernel_init=nnx.initializers.normal(0.5))
    return Mamba2(8, **settings | arguments, rngs=nnx.Rngs(0))


def test_it_is_the_operator_between_a_convolution_and_a_norm_by_groups():
    mixer = layer()
    mixer.norm_scale[...] = jnp.arange(1.0, 17.0)
    z, xbc, dt = jnp.split(mixer.project(X), (16, 16 + 16 + 2 * 2 * 6), -1)
    xbc = jax.nn.silu(ops.short_conv(xbc, mixer.conv.kernel[...], mixer.conv.bias[...]))
    x, b, c = jnp.split(xbc, (16, 28), -1)
    y = ops.ssd(
        x.reshape(2, 9, 4, 4),
        jax.nn.softplus(dt + mixer.dt_bias[...]),
        -jnp.exp(mixer.log_a[...]),
        b.reshape(2, 9, 2, 6),
        c.reshape(2, 9, 2, 6),
        mixer.skip[...],
    )
    grouped = (y.reshape(2, 9, 16) * jax.nn.silu(z)).reshape(2, 9, 2, 8)
    normed = grouped / jnp.sqrt(jnp.mean(grouped**2, -1, keepdims=True) + 1e-5)
    want = mixer.out(normed.reshape(2, 9, 16) * jnp.arange(1.0, 17.0))
    np.testing.assert_allclose(mixer(X), want, rtol=2e-4, atol=2e-5)


def test_steps_and_rates_start_in_their_ranges():
    mixer = layer(expand=64, ngroups=1)
    step, rate = jax.nn.softplus(mixer.dt_bias[...]), jnp.exp(mixer.log_a[...])
    assert (step > 0.99e-3).all() and (step < 0.101).all() and step.std() > 0.01
    assert (rate >= 1).all() and (rate <= 16).all() and rate.std() > 2
    assert (mixer.skip[...] == 1).all()


def test_the_state_does_not_grow():
    assert layer().state_bytes(1000) == 4 * (4 * 6 * 4 + 3 * (16 + 2 * 2 * 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"headdim": 5}, "headdim=5 must divide the inner width 16"),
        ({"ngroups": 3}, "3 must divide the number of heads; ngroups: 4"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(**arguments)
