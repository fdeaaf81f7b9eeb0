import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.models import GrassmannLM

SIZES = dict(vocab_size=11, width=16, num_layers=2, max_len=12, init_std=0.3, reduced_dim=4)


def make(**arguments):
    return GrassmannLM(**SIZES, **arguments, rngs=nnx.Rngs(0))


def test_decoding_equals_one_call():
    lm, ids = make(offsets=((1, 2), (3, 5))), jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    call = nnx.jit(lambda lm, ids, cache=None: lm(ids, cache=cache))
    want = call(lm, ids)[0]
    first, _, cache = call(lm, ids[:, :6], lm.init_cache(2, 9))
    last, _, _ = call(lm, ids[:, 6:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), want, rtol=2e-4, atol=2e-4)


def test_a_token_reaches_as_far_as_the_offsets_of_all_layers():
    lm = make(offsets=((1, 2), (3, 5)))
    ids = jnp.zeros((1, 12), jnp.int32)
    moved = jnp.abs(lm(ids)[0] - lm(ids.at[0, 0].set(1))[0]).max((0, 2)) > 0
    # Sums of one offset, or none, of each layer.
    assert np.flatnonzero(moved).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_offsets_are_those_of_every_layer():
    assert [block.mixer.offsets for block in make(offsets=(1, 4)).blocks] == [(1, 4)] * 2
    with pytest.raises(ValueError, match="mixer_args must be one, or 2 of them, got 3"):
        make(offsets=((1,), (2,), (3,)))
