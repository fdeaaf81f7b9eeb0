import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.models import first_logit, parity_logit


@pytest.mark.parametrize("stem", ["parity_logit", "first_logit", "first_logit--log_scaled"])
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_golden(stem, wide):
    with jax.enable_x64(wide):
        golden.check(stem, wide)


@pytest.mark.parametrize("length", [1, 8])
def test_the_sign_is_the_answer_for_every_string(length):
    bits = (jnp.arange(2**length)[:, None] >> jnp.arange(length)) & 1
    assert ((parity_logit(bits) > 0) == bits.sum(1) % 2).all()
    for log_scale in False, True:
        assert ((first_logit(bits, log_scale=log_scale) > 0) == bits[:, 0]).all()


def test_logits_shrink_as_the_closed_forms_say(x64):
    length = 255
    bits = jax.random.bernoulli(jax.random.key(length), 0.5, (3, length)).astype(int)
    ones, n, big = bits.sum(1), length + 1, 2.0
    chance = jax.nn.softmax(jnp.array([[1.0], [-1.0]]) * big * (-1.0) ** jnp.arange(n) / 5**0.5)
    want = (chance[1, ones] - chance[0, ones]) / n
    np.testing.assert_allclose(parity_logit(bits, big=big), want, rtol=1e-9)
    e = np.exp(big / 6**0.5)
    want = (bits[:, 0] - 0.5) * e / (n - 1 + e)
    np.testing.assert_allclose(first_logit(bits, big=big), want, rtol=1e-9)
    e = n ** (big / 6**0.5)
    want = (bits[:, 0] - 0.5) * e / (n - 1 + e)
    np.testing.assert_allclose(first_logit(bits, big=big, log_scale=True), want, rtol=1e-9)
