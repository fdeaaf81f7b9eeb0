"""Self-gated pooling as a mixer against its operator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import SelfGatedPooling
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 9, 16))


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_operator(causal):
    mixer = SelfGatedPooling(16, num_kv_heads=2, causal=causal, rngs=nnx.Rngs(0))
    q, k, v = (
        split_heads(part(X), heads)
        for part, heads in ((mixer.query, 4), (mixer.key, 2), (mixer.value, 2))
    )
    want = mixer._project(ops.self_gated_pooling(q, k, v, causal=causal), X)
    np.testing.assert_allclose(mixer(X), want, rtol=2e-4, atol=2e-5)


def test_windows_documents_and_decoding_with_shared_values():
    mixer = SelfGatedPooling(16, num_kv_heads=2, window=3, rngs=nnx.Rngs(0))
    want, cache, parts = mixer(X), mixer.init_cache(2, 9), []
    for cut in slice(0, 4), slice(4, 5), slice(5, 9):
        y, cache = mixer(X[:, cut], cache=cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, rtol=2e-4, atol=2e-5)
    assert mixer.state_bytes(3) == 4 * 3 * (4 + 2 * 4)
    weights = mixer.weights(X)
    assert ((weights > 0).sum(-1) == jnp.minimum(jnp.arange(9) + 1, 3)).all()


def test_a_key_has_no_position_or_norm():
    for arguments in {"qk_norm": "rms"}, {"rope_theta": 100.0}:
        with pytest.raises(ValueError, match="must be None"):
            SelfGatedPooling(16, **arguments, rngs=nnx.Rngs(0))
