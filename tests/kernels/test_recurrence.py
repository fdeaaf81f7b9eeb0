import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_kernels.recurrence import linear_attention, step

FORMS = "recurrent", "parallel", "chunk"
KINDS = [(decay, write) for decay in (None, "scalar", "channel") for write in ("add", "delta")]
kinds = pytest.mark.parametrize("decay, write", KINDS)


def inputs(seed, decay, write, length=13, heads=(2, 2, 2, 2), dim=5, v_dim=3, dtype=jnp.float64):
    keys = iter(jax.random.split(jax.random.key(seed), 7))
    q_heads, k_heads, v_heads, gate_heads = heads
    state_heads = max(heads if decay or write == "delta" else heads[:3])
    normal = functools.partial(jax.random.normal, dtype=dtype)
    k = normal(next(keys), (2, length, k_heads, dim))
    arrays = dict(
        q=normal(next(keys), (2, length, q_heads, dim)),
        k=k / jnp.linalg.norm(k, axis=-1, keepdims=True),
        v=normal(next(keys), (2, length, v_heads, v_dim)),
        initial_state=normal(next(keys), (2, state_heads, dim, v_dim)),
    )
    gate = (2, length, gate_heads)
    if decay:
        shape = (*gate, dim) if decay == "channel" else gate
        arrays["log_decay"] = jax.nn.log_sigmoid(normal(next(keys), shape))
    if write == "delta":
        arrays["beta"] = jax.nn.sigmoid(normal(next(keys), gate))
    return arrays


@functools.partial(jax.jit, static_argnames=("form", "chunk_size", "sub_chunk_size"))
def call(arrays, **options):
    return linear_attention(**arrays, return_state=True, **options)


def loss(arrays, **options):
    """A number that depends on every output and on every entry of the final state."""
    out, state = call(arrays, **options)

    def weigh(x):
        return (x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum()

    return weigh(out) + weigh(state)


@functools.partial(jax.jit, static_argnames=("form", "chunk_size", "sub_chunk_size"))
def gradient(arrays, **options):
    return jax.grad(loss)(arrays, **options)


def close(got, want, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def by_loop(q, k, v, initial_state, log_decay=None, beta=None):
    """The equations, one batch entry, head and step at a time."""
    q, k, v, states = (np.array(x, np.float64) for x in (q, k, v, initial_state))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        for t in range(q.shape[1]):
            kt, state = k[b, t, h], states[b, h]
            if log_decay is not None:
                decay = np.broadcast_to(np.exp(log_decay[b, t, h]), kt.shape)
                state = decay[:, None] * state
            if beta is None:
                state = state + np.outer(kt, v[b, t, h])
            else:
                state = state + beta[b, t, h] * np.outer(kt, v[b, t, h] - state.T @ kt)
            states[b, h] = state
            out[b, t, h] = state.T @ q[b, t, h] / np.sqrt(len(kt))
    return out, states


@pytest.mark.parametrize("form", FORMS)
@kinds
def test_definition(x64, decay, write, form):
    arrays = inputs(0, decay, write)
    close(call(arrays, form=form, chunk_size=4, sub_chunk_size=2), by_loop(**arrays))


@settings(max_examples=9, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    length=st.integers(1, 20),
    chunk=st.integers(1, 24),
    sub_chunk=st.integers(1, 8),
    heads=st.sampled_from([(4, 2, 1, 4), (1, 2, 4, 2), (2, 2, 2, 1), (1, 1, 1, 4)]),
)
def test_forms_agree_with_gradients(kind, length, chunk, sub_chunk, heads):
    with jax.enable_x64(True):
        arrays = inputs(length, *kind, length=length, heads=heads)
        want = call(arrays, form="recurrent"), gradient(arrays, form="recurrent")
        for form in ("parallel", "chunk"):
            sizes = dict(form=form, chunk_size=chunk, sub_chunk_size=sub_chunk)
            close((call(arrays, **sizes), gradient(arrays, **sizes)), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay, write", KINDS[2:])
def test_extreme_gates(x64, decay, write, form):
    arrays = inputs(1, decay, write, length=24)
    shape = arrays["log_decay"].shape
    gates = np.random.default_rng(0).choice([-np.inf, -1e4, -50, -1e-4, 0], shape)
    arrays["log_decay"] = jnp.asarray(gates)
    sizes = dict(form=form, chunk_size=16, sub_chunk_size=4)
    close(call(arrays, **sizes), by_loop(**arrays))
    grads = gradient(arrays, **sizes)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    close(grads, gradient(arrays, form="recurrent"))


@pytest.mark.parametrize("dtype, rounding", [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
@kinds
def test_error_budget(decay, write, dtype, rounding):
    """The chunk form errs at most twice as much as the recurrence in the same precision."""
    arrays = inputs(2, decay, write, length=150, dim=16, dtype=jnp.float32)
    if decay:  # small gates after a large one, which differences of sums would lose
        arrays["log_decay"] = (arrays["log_decay"] * 1e-3).at[:, 70].set(-1e4)
    low = {name: x.astype(dtype) for name, x in arrays.items()}
    with jax.enable_x64(True):
        high = {name: x.astype(jnp.float64) for name, x in low.items()}
        exact = call(high, form="recurrent"), gradient(high, form="recurrent")
    for index, run in enumerate((call, gradient)):
        got, base = run(low, form="chunk"), run(low, form="recurrent")
        for a, b, c in zip(*map(jax.tree.leaves, (got, base, exact[index]))):
            a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
            bound = 2 * np.abs(b - c).max() + rounding * np.abs(c).max()
            assert np.abs(a - c).max() <= bound
    out, state = call(low)
    assert out.dtype == dtype and state.dtype == jnp.float32


@kinds
def test_forward_mode_and_second_order(x64, decay, write):
    arrays = inputs(3, decay, write, length=7)
    move = jax.tree.map(jnp.cos, arrays)

    def derivatives(**options):
        @jax.jit
        def along(arrays, move):
            functions = (lambda a: call(a, **options)), jax.grad(lambda a: loss(a, **options))
            return [jax.jvp(f, (arrays,), (move,))[1] for f in functions]

        return along(arrays, move)

    close(derivatives(form="chunk", chunk_size=4, sub_chunk_size=2), derivatives(form="recurrent"))


@pytest.mark.parametrize("form", FORMS)
@kinds
def test_state_is_handed_over(x64, decay, write, form):
    arrays = inputs(4, decay, write, length=11)
    state, outs = arrays["initial_state"], []
    for part in (slice(0, 6), slice(6, 7), slice(7, 11)):
        piece = {n: x[:, part] for n, x in arrays.items() if n != "initial_state"}
        out, state = call({**piece, "initial_state": state}, form=form, chunk_size=4)
        outs.append(out)
    close((jnp.concatenate(outs, 1), state), call(arrays))


@kinds
def test_steps_equal_one_call(x64, decay, write):
    arrays = inputs(5, decay, write, length=5, heads=(2, 1, 4, 4))
    state, outs = arrays["initial_state"], []
    for t in range(5):
        now = {n: x[:, t] for n, x in arrays.items() if n != "initial_state"}
        out, state = step(state, **now)
        outs.append(out)
    close((jnp.stack(outs, 1), state), call(arrays, form="chunk", chunk_size=2))


@kinds
def test_causal_and_batched(x64, decay, write):
    arrays = inputs(6, decay, write)
    options = dict(form="chunk", chunk_size=4, sub_chunk_size=2)

    def before(arrays):
        return call(arrays, **options)[0][:, :6].sum()

    for name, x in jax.jit(jax.grad(before))(arrays).items():
        if name != "initial_state":
            assert not np.any(x[:, 6:]) and np.any(x[:, :6])
    both = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), arrays)
    run = jax.jit(jax.vmap(lambda a: call(a, **options)))
    close(jax.tree.map(lambda x: x[0], run(both)), call(arrays))


@kinds
def test_gradient_keeps_a_state_a_chunk(decay, write):
    dim = 64

    def memory(length):
        arrays = inputs(0, decay, write, length, (1,) * 4, dim, dim, jnp.float32)
        run = jax.jit(jax.grad(functools.partial(loss, form="chunk")))
        return run.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    growth = (memory(4096) - memory(2048)) / 2048
    states = 2 * 4 * dim * dim  # bytes of the batch's states at one position
    assert growth < 0.3 * states


@pytest.mark.parametrize("form", FORMS)
@kinds
def test_segments_are_apart_and_padding_is_left_alone(x64, decay, write, form):
    """Three documents, with padding before, between and after them, are three calls."""
    arrays = inputs(7, decay, write, length=12)
    spans = (slice(2, 5), slice(6, 7), slice(7, 10))
    ids = jnp.full((2, 12), -1)
    for n, span in enumerate(spans):
        ids = ids.at[:, span].set(3 - n)
    options = dict(form=form, chunk_size=4, sub_chunk_size=2)
    packed = jax.jit(lambda a: linear_attention(**a, segment_ids=ids, return_state=True, **options))
    out, state = packed(arrays)
    start = arrays.pop("initial_state")
    for span in spans:
        alone = {n: x[:, span] for n, x in arrays.items()}
        want, last = call({**alone, "initial_state": start}, form="recurrent")
        close(out[:, span], want)
        start = jnp.zeros_like(start)
    close(state, last)
    assert not np.any(out[:, jnp.array([0, 1, 5, 10, 11])])
    slopes = jax.grad(lambda a: packed({**a, "initial_state": start})[0].sum())(arrays)
    for x in jax.tree.leaves(slopes):
        assert np.isfinite(x).all() and not np.any(x[:, jnp.array([0, 1, 5, 10, 11])])


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(form="fast"), "form"),
        (dict(segment_ids=jnp.zeros((2, 12), int)), "segment_ids must be integers"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(k=jnp.ones((2, 13, 3, 5))), "heads"),
        (dict(v=jnp.ones((2, 12, 2, 3))), "v "),
        (dict(beta=jnp.ones((2, 13, 2, 5))), "beta"),
        (dict(log_decay=jnp.ones((2, 13, 2, 4))), "log_decay"),
        (dict(initial_state=jnp.ones((2, 2, 3, 5))), "initial_state"),
        (dict(q=jnp.ones((2, 13, 2, 5), int)), "q"),
    ],
)
def test_errors(change, match):
    arrays = inputs(0, None, "add", dtype=jnp.float32)
    with pytest.raises(ValueError, match=match):
        linear_attention(**{**arrays, **change})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay, write", KINDS[2:])
def test_budget_of_16384_steps_with_any_mixture_of_decays(decay, write, dtype):
    """Keys are not normalised, but as long as the delta rule bears."""
    arrays = inputs(8, decay, write, 16384, (2,) * 4, 8, 8, jnp.float32)
    rng = np.random.default_rng(0)
    gates = rng.choice(
        [0, -1e-4, -1, -50, -1e4], arrays["log_decay"].shape, p=(0.3, 0.67, *3 * (0.01,))
    )
    arrays["log_decay"] = jnp.asarray(gates, jnp.float32)
    shape = (*arrays["k"].shape[:-1], 1)
    lengths = rng.uniform(0, 1.4, shape) if write == "delta" else rng.lognormal(0, 1, shape)
    arrays["k"] = arrays["k"] * lengths.astype(np.float32)
    low = {name: x if name == "log_decay" else x.astype(dtype) for name, x in arrays.items()}
    with jax.enable_x64(True):
        high = {name: x.astype(jnp.float64) for name, x in low.items()}
        exact = jax.tree.map(np.asarray, (call(high, form="chunk"), gradient(high, form="chunk")))
    rounding = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8}[dtype]
    for index, run in enumerate((call, gradient)):
        got, base = run(low, form="chunk"), run(low, form="recurrent")
        for a, b, c in zip(*map(jax.tree.leaves, (got, base, exact[index])), strict=True):
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            assert np.isfinite(a).all()
            bound = 2 * np.abs(b - c).max() + rounding * np.abs(c).max()
            assert np.abs(a - c).max() <= bound
