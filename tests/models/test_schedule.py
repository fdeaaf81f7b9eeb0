"""Layers that rotate within a window, and layers without positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.models import DecoderLM, layer_schedule

call = nnx.jit(lambda lm, tokens: lm(tokens)[0])
TOKENS = jax.random.randint(jax.random.key(0), (1, 8), 0, 11)


def model(schedule):
    return DecoderLM(
        vocab_size=11,
        width=8,
        num_layers=len(schedule),
        mixers="dot_product_attention",
        mixer_args=schedule,
        positions=None,
        init_std=0.5,
        rngs=nnx.Rngs(0),
    )


def test_three_of_four_layers_rotate():
    schedule = layer_schedule(6)
    assert [layer["rope_theta"] for layer in schedule] == [10000.0] * 3 + [None] + [10000.0] * 2
    assert [layer["window"] for layer in schedule] == [4096] * 3 + [None] + [4096] * 2
    assert layer_schedule(0) == []


def test_wide_windows_and_rotation_everywhere_are_a_standard_decoder():
    want = call(model([{"rope_theta": 50.0}] * 2), TOKENS)
    got = call(model(layer_schedule(2, pattern="r", window=8, rope_theta=50.0)), TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_layer_without_positions_does_not_see_the_order_of_the_past():
    order = jnp.array([3, 0, 2, 1, 4, 6, 5, 7])
    for pattern, same in ("n", True), ("r", False):
        lm = model(layer_schedule(1, pattern=pattern, window=8))
        last, moved = call(lm, TOKENS)[:, -1], call(lm, TOKENS[:, order])[:, -1]
        assert np.allclose(last, moved, atol=1e-4) is same


def test_a_hybrid_decodes_and_keeps_less():
    lm = model(layer_schedule(2, pattern="rn", window=3))
    want, cache, parts = call(lm, TOKENS), lm.init_cache(1, 8), []
    for cut in slice(0, 5), slice(5, 8):
        logits, _, cache = lm(TOKENS[:, cut], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, rtol=1e-3, atol=1e-3)
    assert lm.state_bytes(100) == 4 * 2 * 8 * (3 + 100)


def test_errors_name_the_argument():
    for arguments in {"pattern": ""}, {"pattern": "rx"}, {"window": 0}:
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            layer_schedule(4, **arguments)
