import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_kernels.recurrence import diagonal_recurrence

FORMS = "recurrent", "associative", "chunk"
KINDS = [(varies, turns) for varies in (False, True) for turns in (False, True)]
kinds = pytest.mark.parametrize("varies, turns", KINDS)


def inputs(varies, turns, length=13, channels=3, size=4, dtype=jnp.float64):
    keys = iter(jax.random.split(jax.random.key(length), 8))
    shape = (2, length, channels, size) if varies else (channels, size)
    normal = lambda shape: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
    pair = lambda shape: normal(shape) + (1j * normal(shape) if turns else 0)  # noqa: E731
    return dict(
        x=normal((2, length, channels)),
        log_decay=jax.nn.log_sigmoid(normal(shape)) + (1j * normal(shape) if turns else 0),
        write=normal(shape),
        read=pair((channels, size)),
        initial_state=pair((2, channels, size)),
    )


@functools.partial(jax.jit, static_argnames=("form", "chunk_size"))
def call(arrays, **options):
    return diagonal_recurrence(**arrays, return_state=True, **options)


def loss(arrays, **options):
    y, state = call(arrays, **options)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state.real) + jnp.sin(state.imag))


@functools.partial(jax.jit, static_argnames=("form", "chunk_size"))
def gradient(arrays, **options):
    return jax.grad(loss)(arrays, **options)


def close(got, want, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def by_loop(x, log_decay, write, read, initial_state):
    state, out = np.asarray(initial_state), []
    at = lambda a, t: a if a.ndim == 2 else a[:, t]  # noqa: E731
    for t in range(x.shape[1]):
        state = np.exp(at(log_decay, t)) * state + at(write, t) * x[:, t, :, None]
        out.append((at(read, t) * state).sum(-1).real)
    return np.stack(out, 1), state


@pytest.mark.parametrize("form", FORMS)
@kinds
def test_definition(x64, varies, turns, form):
    arrays = inputs(varies, turns)
    close(call(arrays, form=form, chunk_size=4), by_loop(**arrays))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("varies", [False, True])
def test_writes_reads_and_states_have_defaults(x64, varies, form):
    arrays = inputs(varies, False)
    ones = jnp.ones((3, 4))
    want = by_loop(**arrays | {"write": ones, "read": ones, "initial_state": jnp.zeros((2, 3, 4))})
    y = diagonal_recurrence(arrays["x"], arrays["log_decay"], form=form, chunk_size=4)
    close(y, want[0])


@settings(max_examples=8, deadline=None)
@given(kind=st.sampled_from(KINDS), length=st.integers(1, 20), chunk=st.integers(1, 24))
def test_forms_agree_with_gradients(kind, length, chunk):
    with jax.enable_x64(True):
        arrays = inputs(*kind, length=length)
        want = call(arrays, form="recurrent"), gradient(arrays, form="recurrent")
        for form in "associative", "chunk":
            sizes = dict(form=form, chunk_size=chunk)
            close((call(arrays, **sizes), gradient(arrays, **sizes)), want)


@kinds
def test_state_is_handed_over(x64, varies, turns):
    arrays = inputs(varies, turns)
    state, outs = arrays["initial_state"], []
    for part in slice(0, 9), slice(9, 10), slice(10, 13):
        piece = {n: a[:, part] if n == "x" or a.ndim == 4 else a for n, a in arrays.items()}
        y, state = call({**piece, "initial_state": state})
        outs.append(y)
    close((jnp.concatenate(outs, 1), state), call(arrays, form="chunk", chunk_size=5))


@pytest.mark.parametrize("form", FORMS)
def test_extreme_decays(x64, form):
    arrays = inputs(True, False, length=40)
    decays = np.random.default_rng(0).choice([-np.inf, -1e4, -50, -1e-4, 0], (2, 40, 3, 4))
    arrays["log_decay"] = jnp.asarray(decays)
    close(call(arrays, form=form, chunk_size=16), by_loop(**arrays))
    grads = gradient(arrays, form=form, chunk_size=16)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(grads))
    close(grads, gradient(arrays, form="recurrent"))


@pytest.mark.parametrize("turns", [False, True])
def test_small_decays_do_not_drift(turns):
    """Over 16k steps, against float64; the output keeps the dtype of x, the state float32."""
    arrays = inputs(False, turns, length=16384, channels=2, dtype=jnp.float32)
    decay = jnp.array([[-1e-4, -1e-3, 0.0, -1.0]] * 2) + (0.01j if turns else 0)
    arrays["log_decay"] = decay.astype(jnp.complex64 if turns else jnp.float32)
    with jax.enable_x64(True):
        wide = {n: a.astype(jnp.promote_types(a.dtype, jnp.float64)) for n, a in arrays.items()}
        exact = call(wide, form="associative")
    for form in FORMS[1:]:
        for a, b in zip(call(arrays, form=form), exact):
            b = np.asarray(b)
            assert np.abs(np.asarray(a) - b).max() < (2e-4 if turns else 1e-5) * np.abs(b).max()
    y, state = call({**arrays, "x": arrays["x"].astype(jnp.bfloat16)})
    assert y.dtype == jnp.bfloat16 and state.dtype == arrays["log_decay"].dtype


def test_gradient_keeps_a_state_a_chunk():
    def memory(length):
        arrays = inputs(False, False, length, channels=8, size=64, dtype=jnp.float32)
        run = jax.jit(jax.grad(functools.partial(loss, form="chunk")))
        return run.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    states = 2 * 4 * 8 * 64  # bytes of the batch's states at one position
    assert (memory(4096) - memory(2048)) / 2048 < 0.2 * states


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(form="fft"), "form"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(implementation="cuda"), "implementation"),
        (dict(x=jnp.ones((2, 13, 3), int)), "x must be floating"),
        (dict(log_decay=jnp.ones((2, 12, 3, 4))), "log_decay must be"),
        (dict(read=jnp.ones((3, 5))), "read must be"),
        (dict(initial_state=jnp.ones((3, 4))), "initial_state must be"),
    ],
)
def test_errors(change, match):
    with pytest.raises(ValueError, match=match):
        diagonal_recurrence(**{**inputs(False, False, dtype=jnp.float32), **change})
