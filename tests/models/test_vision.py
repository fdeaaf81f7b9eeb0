import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import models

COUNTS = {
    "CCT": {
        "2/3x2": 283_723,
        "4/3x2": 482_123,
        "6/3x1": 3_233_803,
        "6/3x2": 3_326_923,
        "7/3x1": 3_760_139,
        "7/3x2": 3_853_259,
    },
    "CVT": {"2/4": 214_539, "4/4": 412_939, "6/4": 3_190_283, "7/4": 3_716_619},
    "ViTLite": {"2/4": 214_666, "4/4": 413_066, "6/4": 3_190_538, "7/4": 3_716_874},
}


@pytest.mark.parametrize(
    ("family", "name", "count"),
    [(family, name, count) for family, rows in COUNTS.items() for name, count in rows.items()],
)
def test_parameter_counts_are_the_published_ones(family, name, count):
    def make(num_classes):
        return getattr(models, family)(name, num_classes=num_classes, rngs=nnx.Rngs(0))

    assert models.count_parameters(nnx.eval_shape(lambda: make(10))) == count
    more = 11_610 if name[0] in "24" else 23_130
    assert models.count_parameters(nnx.eval_shape(lambda: make(100))) == count + more


@pytest.mark.parametrize(
    ("family", "name", "changes"),
    [
        ("CCT", "2/3x2", {}),
        ("CVT", "2/4", {"positions": "sine", "channels": 1, "image_size": 28}),
        ("ViTLite", "2/4", {"mixer": "sigmoid_attention"}),
        ("CCT", "2/7x2", {"mixer": "gated_attention", "dtype": jnp.bfloat16}),
    ],
)
def test_a_step_changes_all_parameters(family, name, changes):
    model = getattr(models, family)(name, rngs=nnx.Rngs(0), **changes)
    size, channels = changes.get("image_size", 32), changes.get("channels", 3)
    x = jax.random.normal(jax.random.key(0), (2, size, size, channels))
    logits, out = model(x)
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32 and out == {}
    assert not np.allclose(model(x, rngs=nnx.Rngs(dropout=0))[0], logits)  # drops whole branches
    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.sin(model(x)[0]))))(model)
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.isfinite(grad[...]).all() and (grad[...] != 0).any(), path


def test_capture_and_attention_in_both_directions():
    model = models.CCT("2/3x2", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    weights = model(x, capture=("attention_weights",))[1]["attention_weights"]
    assert [w.shape for w in weights] == [(1, 2, 64, 64)] * 2
    np.testing.assert_allclose(weights[0].sum(-1), 1, rtol=1e-4)
    assert (jnp.triu(weights[0], 1) > 0).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.CCT("7/3", rngs=nnx.Rngs(0)), "form L/PxK"),
        (lambda: models.CCT("5/3x1", rngs=nnx.Rngs(0)), "layers must be one of"),
        (lambda: models.CVT("2/5", rngs=nnx.Rngs(0)), "multiple of the patch size 5"),
        (lambda: models.CCT("2/3x2", positions="none", rngs=nnx.Rngs(0)), "positions must be"),
        (lambda: models.CCT("2/3x2", mixer="delta_rule", rngs=nnx.Rngs(0)), "takes no causal"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_image_sizes_are_refused():
    model = models.CCT("2/3x2", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the model has positions for 64"):
        model(jnp.zeros((1, 28, 28, 3)))
