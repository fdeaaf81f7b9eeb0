import jax
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import GrassmannMixing

X = jax.random.normal(jax.random.key(0), (2, 7, 4))


def test_the_mixer_is_its_operator_and_a_norm():
    mixer = GrassmannMixing(4, reduced_dim=3, offsets=(1, 5, 9), rngs=nnx.Rngs(0))
    maps = mixer.reduce, mixer.plane, mixer.gate
    arrays = [p[...] for layer in maps for p in (layer.kernel, layer.bias)]
    want = mixer.norm(ops.grassmann_mixing(X, *arrays, offsets=(1, 5, 9)))
    np.testing.assert_allclose(mixer(X), want, rtol=1e-5, atol=1e-5)
    assert mixer.state_bytes(7) == 4 * 9 * 3 == mixer.state_bytes(1000)


def test_errors():
    with pytest.raises(ValueError, match="offsets must be positive"):
        GrassmannMixing(4, offsets=(0,), rngs=nnx.Rngs(0))
