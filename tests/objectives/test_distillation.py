import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.objectives import attention_distillation

A, B = jax.random.normal(jax.random.key(0), (2, 3, 4))


def test_it_is_the_mean_square_of_outputs_and_the_mean_of_those_of_layers():
    layers = [A, 2 * A], [B, 2 * A]
    got = attention_distillation(A, B, *layers, 0.3, 0.8)
    square = jnp.mean((A - B) ** 2)
    np.testing.assert_allclose(got, 0.3 * square + 0.8 * square / 2, rtol=1e-6)
    np.testing.assert_allclose(attention_distillation(A, A, *layers), square / 4, rtol=1e-6)


def test_the_teacher_is_fixed():
    loss = lambda *arrays: attention_distillation(*arrays[:2], [arrays[2]], [arrays[3]])  # noqa: E731
    student, teacher, layer, wanted = jax.grad(loss, argnums=(0, 1, 2, 3))(A, B, A, B)
    assert not teacher.any() and not wanted.any()
    np.testing.assert_allclose(student, (A - B) / 12, rtol=1e-6)
    np.testing.assert_allclose(layer, student, rtol=1e-6)


def test_layers_and_shapes_must_agree():
    with pytest.raises(ValueError, match="of the same layers, at least one, got 2 and 1"):
        attention_distillation(A, B, [A, A], [B])
    with pytest.raises(ValueError, match=r"layer_outputs_t\[0\] must have the student's shape"):
        attention_distillation(A, B, [A], [B[:1]])
