import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.nn import MultiHeadAttention, SelectiveLookupAttention

X = jax.random.normal(jax.random.key(0), (2, 7, 4))


def make(**settings):
    return SelectiveLookupAttention(4, num_heads=2, **settings, rngs=nnx.Rngs(0))


def test_attention_is_added_where_the_selector_asks():
    mixer, attention = make(), MultiHeadAttention(4, num_heads=2, rngs=nnx.Rngs(0))
    asked = mixer.selector(X)
    np.testing.assert_allclose(mixer(X), X + asked[..., None] * attention(X), rtol=1e-5, atol=1e-6)
    few = make(top=True)
    changed = jnp.any(few(X) != X, -1)
    np.testing.assert_array_equal(changed.sum(-1), 3)  # the square root of seven, rounded up
    assert (jnp.where(changed, asked, 1).min(-1) >= jnp.where(changed, 0, asked).max(-1)).all()
    np.testing.assert_allclose(few(X)[changed], mixer(X)[changed], rtol=1e-6)
    np.testing.assert_array_equal(make(top=True, num_lookups=0)(X), X)


def test_the_largest_are_of_whole_sequences():
    mixer = make(top=True)
    with pytest.raises(ValueError, match="need top=False"):
        mixer(X, cache=mixer.init_cache(2, 7))
    with pytest.raises(ValueError, match="num_lookups must not be negative"):
        make(num_lookups=-1)
