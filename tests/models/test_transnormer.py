import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.models import TransNormer, TransNormerLLM, count_parameters
from attn_lab.nn import DiagAttention, NormAttention

SIZES = dict(vocab_size=23, width=16, num_layers=3, max_len=24, init_std=0.3)


def tokens(length=9):
    return jax.random.randint(jax.random.key(length), (2, length), 0, 23)


@pytest.mark.parametrize(
    "make", [TransNormerLLM, lambda **arguments: TransNormer(block_size=4, **arguments)]
)
def test_decoding_equals_one_call_and_keeps_the_same_at_every_length(make):
    lm, ids = make(**SIZES, rngs=nnx.Rngs(0)), tokens()
    call = nnx.jit(lambda lm, ids, cache=None: lm(ids, cache=cache))
    want = call(lm, ids)[0]
    first, _, cache = call(lm, ids[:, :6], lm.init_cache(2, 9))
    last, _, _ = call(lm, ids[:, 6:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), want, rtol=2e-4, atol=2e-4)
    assert lm.state_bytes(1000) == lm.state_bytes(10)


def test_positions_are_learned_in_the_first_layer_and_decays_fall_with_depth():
    lm = TransNormerLLM(**SIZES, rngs=nnx.Rngs(0))
    mixers = [block.mixer for block in lm.blocks]
    assert [mixer.theta is None for mixer in mixers] == [False, True, True]
    x = jnp.zeros((1, 2, 16))
    first, middle, last = (mixer.gates(x, None)[0][0, 0] for mixer in mixers)
    np.testing.assert_allclose(middle, first / 2, rtol=1e-4)
    assert (last < 0).all() and (last > -1e-5).all()


def test_its_parameters_are_those_of_the_maps_the_frequencies_and_the_embeddings():
    lm = TransNormerLLM(**SIZES, mlp_ratio=2, rngs=nnx.Rngs(0))
    assert count_parameters(lm) == 2 * 23 * 16 + 3 * (5 * 16 * 16 + 3 * 16 * 32) + 16


def test_blocks_come_before_sums():
    def kinds(**arguments):
        lm = nnx.eval_shape(lambda: TransNormer(**SIZES, **arguments, rngs=nnx.Rngs(0)))
        return [type(block.mixer) for block in lm.blocks]

    assert kinds() == [DiagAttention, NormAttention, NormAttention]
    assert kinds(num_diag_layers=3) == [DiagAttention] * 3
    assert kinds(num_diag_layers=0) == [NormAttention] * 3
    with pytest.raises(ValueError, match="num_diag_layers must be from 0 to 3, got 4"):
        kinds(num_diag_layers=4)
