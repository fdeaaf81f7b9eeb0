import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.nn import H3, Hyena

call = nnx.jit(lambda mixer, *inputs, **keywords: mixer(*inputs, **keywords))
X = jax.random.normal(jax.random.key(0), (2, 11, 4))


@pytest.mark.parametrize("discretization", ["bilinear", "exponential"])
def test_the_kernel_is_the_sum_of_its_modes(discretization):
    mixer = H3(4, d_state=6, head_dim=2, discretization=discretization, rngs=nnx.Rngs(0))
    step = np.exp(np.asarray(mixer.log_dt[...], float))[:, None]
    poles = step * (-0.5 + 1j * np.pi * np.arange(3))
    write, read = (np.asarray(p[...]) @ np.array([1, 1j]) for p in (mixer.write, mixer.read))
    gain, decay = step, np.exp(poles)
    if discretization == "bilinear":
        gain, decay = step / (1 - poles / 2), (1 + poles / 2) / (1 - poles / 2)
    modes = (write * read * gain)[..., None] * decay[..., None] ** np.arange(70)
    kernel = nnx.jit(lambda mixer: mixer.kernel(70))(mixer)
    np.testing.assert_allclose(kernel, 2 * modes.sum(1).real, atol=1e-6)


def test_first_parameters_of_h3():
    mixer = H3(256, d_state=16, rngs=nnx.Rngs(0))
    log_dt = mixer.log_dt[...]
    assert np.log(1e-3) <= log_dt.min() < np.log(2e-3) and np.log(5e-2) < log_dt.max() <= np.log(
        0.1
    )
    assert jnp.abs(mixer.shift[...]).max() <= 0.25
    assert jnp.abs(mixer.skip[...].std() - 1) < 0.2
    np.testing.assert_allclose((mixer.read[...] ** 2).sum(-1).mean(), 1, rtol=0.1)


def test_h3_keeps_as_much_whatever_the_length():
    mixer = H3(4, d_state=6, head_dim=2, rngs=nnx.Rngs(0))
    cache = mixer.init_cache(2, 1000)
    assert jax.tree.map(jnp.shape, cache) == {"keys": (2, 5, 4), "states": (2, 8, 3)}
    assert mixer.state_bytes(9) == 4 * (5 * 4 + 2 * 8 * 3) == mixer.state_bytes(1000)


def test_a_long_prompt_continues_like_one_call():
    mixer = H3(4, d_state=6, rngs=nnx.Rngs(0))
    _, cache = call(mixer, X[:, :9], cache=mixer.init_cache(2, 11))
    got, _ = call(mixer, X[:, 9:], cache=cache)
    np.testing.assert_allclose(got, call(mixer, X)[:, 9:], rtol=1e-4, atol=1e-5)


def test_hyena_keeps_its_inputs():
    mixer = Hyena(4, rngs=nnx.Rngs(0))
    assert mixer.state_bytes(100) == 4 * (2 * 12 + 100 * 4)
    with pytest.raises(ValueError, match="length 8 cannot take 11 tokens"):
        mixer(X, cache=mixer.init_cache(2, 8))


def test_errors():
    for arguments, message in (
        ({"d_state": 5}, "d_state must be even and positive, got 5"),
        ({"head_dim": 3}, "must divide the width 4"),
        ({"discretization": "zoh"}, "discretization must be 'bilinear'"),
    ):
        with pytest.raises(ValueError, match=message):
            H3(4, **arguments, rngs=nnx.Rngs(0))
