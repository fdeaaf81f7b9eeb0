import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.nn import AdaptiveFilterAttention


def make(width=8, **arguments):
    build = dict(rngs=nnx.Rngs(0), kernel_init=nnx.initializers.normal(0.5))
    return AdaptiveFilterAttention(width, num_heads=2, **build | arguments)


def tokens(length=7):
    return jax.random.normal(jax.random.key(length), (2, length, 8))


def test_the_process_is_what_the_parameters_say():
    process = make(width=20, context=50, theta=16.0)._process()
    assert ((process["mu"] < -1e-5) & (process["mu"] > -5 / 50 - 1e-5)).all()
    np.testing.assert_allclose(process["tau"], 1)
    np.testing.assert_allclose(process["nu"], np.log1p(np.e), rtol=1e-4)
    assert all((process[name] > 0).all() for name in ("sigma2", "eta2", "gamma2"))
    turns = 16.0 ** (-2 * np.arange(3) / 5)
    want = np.stack([turns, -turns], 1).reshape(-1)[:5]
    np.testing.assert_allclose(process["omega"], np.stack([want, want]), rtol=1e-5)


def test_only_the_past_counts_unless_it_is_told_otherwise():
    x = tokens()
    moved = x.at[:, -1].add(1.0)
    for causal in True, False:
        mixer = make(causal=causal)
        same = (mixer(x)[:, :-1] == mixer(moved)[:, :-1]).all()
        assert same == causal
    with pytest.raises(ValueError, match="cache needs causal=True"):
        mixer(x, cache=mixer.init_cache(2, 9))


def test_robustness_and_errors():
    x = tokens()
    assert jnp.abs(make()(x) - make(robust=False)(x)).max() > 1e-3
    with pytest.raises(ValueError, match="num_heads=2 must divide the half of the width 5"):
        make(width=10)
