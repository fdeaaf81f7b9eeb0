import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_lab.models import Megalodon, count_parameters

SIZES = dict(vocab_size=11, width=8, num_layers=2, max_len=12, init_std=0.3)
LAYER = dict(num_heads=2, z_dim=8, ema_dim=2, chunk_size=4, num_groups=2)


def make(**arguments):
    return Megalodon(**SIZES, **LAYER | arguments, rngs=nnx.Rngs(0))


def test_decoding_equals_one_call():
    lm, ids = make(), jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    call = nnx.jit(lambda lm, ids, cache=None: lm(ids, cache=cache))
    want = call(lm, ids)[0]
    first, _, cache = call(lm, ids[:, :6], lm.init_cache(2, 9))
    last, _, _ = call(lm, ids[:, 6:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), want, rtol=2e-4, atol=2e-4)


def test_it_is_its_layers_between_embedding_and_head():
    lm, ids = make(), jnp.asarray([[1, 2, 3]])
    x = lm.embed[...][ids]
    for block in lm.blocks:
        x = block.layer(x)
    np.testing.assert_allclose(lm(ids)[0], lm.head(lm.norm(x)), rtol=1e-5, atol=1e-5)


def test_sizes_of_layers_are_arguments():
    wider = count_parameters(make(ffn_dim=20)) - count_parameters(make(ffn_dim=16))
    assert wider == 2 * 3 * 8 * 4
    assert make(chunk_size=3).state_bytes(100) < make(chunk_size=4).state_bytes(100)
