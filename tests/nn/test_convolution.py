import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.nn import BaseConv, Build, LongFilter


def make(**settings):
    build = Build(nnx.Rngs(0), kernel_init=nnx.initializers.normal(0.5))
    return LongFilter(3, 8, **{"depth": 2, "context": 10} | settings, build=build)


def test_a_filter_is_a_function_of_the_position():
    """A longer one begins like a shorter one, beyond the context too."""
    for settings in {}, {"periodic": True, "learned_positions": True, "decays": True}:
        filter = make(**settings)
        np.testing.assert_allclose(filter(14)[:, :6], filter(6), rtol=1e-5, atol=1e-6)
        assert filter(14).shape == (3, 14)


def test_windows_fall_to_a_hundredth_within_a_fraction_of_the_context():
    args = dict(periodic=True, context=31)
    filter, plain = make(**args, decays=True), make(**args)
    window = filter(61) / plain(61)
    np.testing.assert_allclose(window[:, 0], 1, rtol=1e-5)
    np.testing.assert_allclose(window[0, 45], 0.01, rtol=1e-4)
    np.testing.assert_allclose(window[2, 9], 0.01, rtol=1e-4)


def test_learned_positions_move_those_within_the_context():
    filter, plain = make(learned_positions=True), make()
    np.testing.assert_allclose(filter(12), plain(12), rtol=1e-6)
    filter.moves[...] = filter.moves[...].at[4, 0].set(1.0)
    changed = jnp.abs(filter(12) - plain(12)).sum(0) > 1e-6
    np.testing.assert_array_equal(changed, jnp.arange(12) == 4)


def test_the_long_form_of_base_conv_passes_its_input_once_more():
    mixer = BaseConv(4, kernel_size=-1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 1, 4))
    first = mixer.conv.filter(1)[:, 0]
    np.testing.assert_allclose(mixer(x), (1 + first) * x * mixer.project(x) + x, rtol=1e-5)


def test_errors():
    for settings in {"emb_dim": 4}, {"emb_dim": 1}, {"depth": 0}:
        with pytest.raises(ValueError, match="emb_dim must be odd and > 2, depth positive"):
            make(**settings)
