import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import nn

WIDTH = 6


def make(**arguments):
    return nn.RWKVTimeMixing(WIDTH, rngs=nnx.Rngs(0), **arguments)


def test_parameters_start_by_depth():
    first, last = make(depth=0, num_layers=3), make(depth=2, num_layers=3)
    for mixer in first, last:
        np.testing.assert_allclose(mixer.time_decay[jnp.array([0, -1])], [-5, 3], rtol=1e-6)
        zigzag = np.array([0, 0.5, -0.5, 0, 0.5, -0.5])
        np.testing.assert_allclose(mixer.time_first[...], np.log(0.3) + zigzag, rtol=1e-6)
    assert (last.time_decay[1:-1] < first.time_decay[1:-1]).all()
    place = np.arange(WIDTH) / WIDTH
    np.testing.assert_allclose(first.mix_k[...], place, rtol=1e-6)
    np.testing.assert_allclose(last.mix_v[...], place ** (1 / 3) + 0.3, rtol=1e-6)
    np.testing.assert_allclose(last.mix_r[...], place ** (1 / 6), rtol=1e-6)


def test_it_is_the_sums_of_its_definition():
    mixer, x = make(), jax.random.normal(jax.random.key(0), (1, 5, WIDTH))
    before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    pairs = (mixer.mix_k, mixer.key), (mixer.mix_v, mixer.value), (mixer.mix_r, mixer.receptance)
    k, v, r = (f(x * m[...] + before * (1 - m[...])) for m, f in pairs)
    t = jnp.arange(5)
    apart = (t[:, None] - 1 - t)[..., None]
    past = jnp.where(apart >= 0, -apart * jnp.exp(mixer.time_decay[...]), -jnp.inf)
    now = jnp.where(apart == -1, mixer.time_first[...], -jnp.inf)
    weights = jax.nn.softmax(jnp.logaddexp(past, now) + k[:, None], 2)
    want = mixer.out(jax.nn.sigmoid(r) * (weights * v[:, None]).sum(2))
    np.testing.assert_allclose(mixer(x), want, rtol=1e-4, atol=1e-6)


def test_its_state_does_not_grow():
    assert make().state_bytes(10) == make().state_bytes(1000) == 4 * 4 * WIDTH


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="depth must be from 0 to num_layers - 1, got 2 of 2"):
        make(depth=2, num_layers=2)
