import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.training import (
    Optimizer,
    compute_dtype,
    create_state,
    evaluate,
    make_optimizer,
    make_train_step,
)
from tests.training.tiny import Tiny, loss_fn, make_batch

SGD = Optimizer(*optax.sgd(1.0), lambda step: jnp.float32(1.0))


def stepped(batch, *, seed=0, accumulate=1, **model):
    graphdef, state = create_state(Tiny(nnx.Rngs(0), **model), SGD)
    return make_train_step(graphdef, loss_fn, SGD, seed=seed, accumulate=accumulate)(state, batch)


def close(a, b, rtol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def test_the_gradient_is_that_of_the_mean_over_labelled_examples():
    batch = make_batch(0)
    model = Tiny(nnx.Rngs(0))
    keep = batch["label"] >= 0

    def mean_loss(params):
        logits = nnx.merge(nnx.graphdef(model), params)(batch["x"][keep])
        return -jax.nn.log_softmax(logits)[jnp.arange(keep.sum()), batch["label"][keep]].mean()

    params = nnx.state(model, nnx.Param)
    loss, grads = jax.value_and_grad(mean_loss)(params)
    state, metrics = stepped(batch)
    expected = nnx.to_pure_dict(jax.tree.map(lambda p, g: p - g, params, grads))
    close(state.params, expected)
    close(metrics["loss"], loss)
    close(metrics["grad_norm"], optax.tree.norm(grads))
    close(metrics["param_norm"], optax.tree.norm(expected))
    assert state.step == 1 and metrics["lr"] == 1


@settings(max_examples=6, deadline=None)
@given(step=st.integers(0, 100), accumulate=st.sampled_from([2, 4, 8]))
def test_micro_batches_make_the_same_update_as_the_batch(step, accumulate):
    batch = make_batch(step, unlabelled=0.5)
    batch["label"][0] = 0
    once, by_parts = stepped(batch), stepped(batch, accumulate=accumulate)
    close(by_parts[0].params, once[0].params)
    close(by_parts[1], once[1])


def test_micro_batches_carry_running_statistics():
    batch = make_batch(0, size=4, unlabelled=0)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    model = Tiny(nnx.Rngs(0), batch_norm=True)
    state, _ = stepped(twice, accumulate=2, batch_norm=True)
    for _ in range(2):
        model(batch["x"])
    close(state.other["norm"]["mean"], model.norm.mean[...])


def test_micro_batches_have_keys_of_their_own():
    def with_draw(model, batch, rngs):
        draw = jax.random.uniform(rngs())
        return loss_fn(model, batch, rngs) | {"draw": (draw, 1.0), "square": (draw**2, 1.0)}

    graphdef, state = create_state(Tiny(nnx.Rngs(0)), SGD)
    step = make_train_step(graphdef, with_draw, SGD, accumulate=4)
    _, metrics = step(state, make_batch(0))
    assert metrics["square"] - metrics["draw"] ** 2 > 1e-3


def test_keys_are_a_function_of_seed_and_step():
    batch = make_batch(0)
    losses = [stepped(batch, seed=seed, dropout=0.5)[1]["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    graphdef, state = create_state(Tiny(nnx.Rngs(0), dropout=0.5), SGD)
    step = make_train_step(graphdef, loss_fn, SGD)
    later = state._replace(step=state.step + 1, params=jax.tree.map(jnp.copy, state.params))
    assert step(state, batch)[1]["loss"] != step(later, batch)[1]["loss"]


def test_the_state_is_donated_and_the_model_kept():
    model = Tiny(nnx.Rngs(0))
    graphdef, state = create_state(model, SGD)
    make_train_step(graphdef, loss_fn, SGD)(state, make_batch(0))
    assert state.params["up"]["kernel"].is_deleted()
    assert not model.up.kernel[...].is_deleted()


def test_micro_batches_that_do_not_divide():
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch size, got 8"):
        stepped(make_batch(0), accumulate=3)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 100))
def test_evaluation_weighs_examples_and_not_batches(seed):
    batches = [make_batch(i, seed=seed, unlabelled=u) for i, u in enumerate((0.0, 0.5, 0.7))]
    model = Tiny(nnx.Rngs(0), dropout=0.5, batch_norm=True)
    joined = jax.tree.map(lambda *x: np.concatenate(x), *batches)
    by_parts, at_once = evaluate(model, batches, loss_fn), evaluate(model, [joined], loss_fn)
    assert by_parts.keys() == at_once.keys() == {"loss", "accuracy"}
    close(by_parts, at_once)
    assert (model.norm.mean[...] == 0).all()


def test_evaluation_needs_a_batch():
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(Tiny(nnx.Rngs(0)), [], loss_fn)


def test_training_lowers_the_loss():
    optimizer = make_optimizer(100, learning_rate=3e-2)
    graphdef, state = create_state(Tiny(nnx.Rngs(0)), optimizer)
    step = make_train_step(graphdef, loss_fn, optimizer)
    losses = []
    for i in range(100):
        state, metrics = step(state, make_batch(i, size=32, unlabelled=0))
        losses.append(metrics["loss"])
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) / 3


def test_compute_dtype():
    accelerated = jax.default_backend() != "cpu"
    assert compute_dtype() == (jnp.bfloat16 if accelerated else jnp.float32)
    assert compute_dtype("bfloat16") == jnp.bfloat16
