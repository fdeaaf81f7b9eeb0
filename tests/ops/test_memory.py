import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab import ops
from attn_lab.ops.memory import read_layers, start_memory

B, H, D, F = 2, 2, 3, 5


def tokens(length, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    q, k, v = (jax.random.normal(key, (B, length, H, D)) for key in keys[:3])
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    rates = (jax.nn.sigmoid(jax.random.normal(key, (B, length, H))) for key in keys[3:])
    return q, k, v, *rates


def network(seed=9):
    w1, w2 = jax.random.split(jax.random.key(seed))
    return 0.5 * jax.random.normal(w1, (H, D, F)), 0.5 * jax.random.normal(w2, (H, F, D))


def mlp(weights, x):
    return jax.nn.silu(x @ weights[0]) @ weights[1] + x


def close(got, want, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def token_by_token(q, k, v, lr, momentum, decay, weights, chunk_size):
    """The rule as it is written, with gradients by autodiff, for one head of one sequence."""
    entry, past, out = weights, jax.tree.map(jnp.zeros_like, weights), []
    for t in range(len(q)):
        entry = weights if t % chunk_size == 0 else entry
        slope = jax.grad(lambda w: jnp.sum((mlp(w, k[t]) - v[t]) ** 2))(entry)  # noqa: B023
        past = jax.tree.map(lambda s, g: momentum[t] * s - lr[t] * g, past, slope)  # noqa: B023
        weights = jax.tree.map(lambda m, s: (1 - decay[t]) * m + s, weights, past)  # noqa: B023
        out.append(mlp(weights, q[t]))
    return jnp.stack(out), weights, past


@settings(max_examples=3, deadline=None)
@given(length=st.integers(1, 6), chunk_size=st.integers(1, 7))
def test_networks_follow_the_rule_of_the_card(length, chunk_size):
    """With the written gradient and with autodiff's, to the state."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: x.astype(float), tokens(length))
        weights = jax.tree.map(lambda x: x.astype(float), network())
        part = dict(chunk_size=chunk_size, return_state=True)
        got = ops.neural_memory_mlp(*arrays, *weights, **part)
        close(ops.neural_memory(*arrays, weights, apply_fn=mlp, **part), got)
        one = [x[1, :, 1] for x in arrays]
        want = jax.jit(token_by_token, static_argnums=7)(*one, [w[1] for w in weights], chunk_size)
        out, state = got
        here = (out[1, :, 1], *([w[1, 1] for w in x] for x in (state.memory, state.momentum)))
        close(here, want)


def test_without_momentum_and_decay_it_is_the_delta_rule():
    q, k, v, lr, *_ = tokens(7)
    start = jax.random.normal(jax.random.key(1), (B, H, D, D))
    nothing = jnp.zeros_like(lr)
    got, (memory, _) = ops.neural_memory_linear(
        q, k, v, lr / 2, nothing, nothing, start, return_state=True
    )
    want, state = ops.delta_rule(q, k, v, lr, scale=1.0, initial_state=start, return_state=True)
    close((got, memory), (want, state), 1e-5)


def test_without_rates_the_network_is_static():
    q, k, v, lr, momentum, _ = tokens(5)
    nothing, weights = jnp.zeros_like(lr), network()
    part = dict(chunk_size=2, return_state=True)
    out, state = ops.neural_memory_mlp(q, k, v, nothing, momentum, nothing, *weights, **part)
    want = read_layers(start_memory(weights, B).memory, q, residual=True)
    close((out, state.memory), (want, start_memory(weights, B).memory), 1e-6)


def test_in_one_chunk_all_errors_are_those_of_the_start():
    """Without momentum and decay: linear attention of the errors."""
    q, k, v, lr, *_ = tokens(6)
    start = jax.random.normal(jax.random.key(1), (B, H, D, D))
    nothing = jnp.zeros_like(lr)
    got = ops.neural_memory_linear(q, k, v, lr, nothing, nothing, start, chunk_size=8)
    errors = 2 * lr[..., None] * (v - jnp.einsum("bthd,bhde->bthe", k, start))
    weights = jnp.tril(jnp.ones((6, 6))) * jnp.einsum("bthd,bshd->bhts", q, k)
    want = jnp.einsum("bthd,bhde->bthe", q, start)
    close(got, want + jnp.einsum("bhts,bshe->bthe", weights, errors), 1e-5)


def test_gradients_are_finite_and_exact_where_nothing_is_kept(x64):
    """Of momentum 0 and decay 1, through which products of rates are 0."""
    arrays = jax.tree.map(lambda x: x.astype(float), tokens(5))
    start = jnp.ones((B, H, D, D))

    @jax.jit
    def loss(rates):
        out = ops.neural_memory_linear(*arrays[:4], *rates, start, chunk_size=4)
        return jnp.sum(jnp.sin(out))

    rates = jnp.zeros((B, 5, H)), jnp.ones((B, 5, H))
    rule = jax.grad(loss)(rates)
    for n in range(2):
        for place in (0, 1, 0), (1, 4, 1):
            moved = [
                [r.at[place].add(e * (m == n)) for m, r in enumerate(rates)] for e in (1e-5, -1e-5)
            ]
            slope = (loss(moved[0]) - loss(moved[1])) / 2e-5
            np.testing.assert_allclose(rule[n][place], slope, rtol=1e-6, atol=1e-8)


def test_one_program_continues_from_anywhere_in_a_chunk():
    """The place in the chunk is data: calls of two tokens, over chunks of three."""
    arrays, weights = tokens(8), network()
    part = dict(chunk_size=3, return_state=True)
    want = ops.neural_memory_mlp(*arrays, *weights, **part)
    run = jax.jit(
        lambda state, *x: ops.neural_memory_mlp(*x, *weights, initial_state=state, **part)
    )
    state, parts = start_memory(weights, B), []
    for t in range(0, 8, 2):
        out, state = run(state, *(x[:, t : t + 2] for x in arrays))
        parts.append(out)
    close((jnp.concatenate(parts, 1), state), want, 1e-5)
    assert run._cache_size() <= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be positive, got 0"),
        ({"k": jnp.zeros((B, 4, H, D + 1))}, "q and k must be"),
        ({"lr": jnp.zeros((B, 4))}, "lr must be"),
        ({"w2": jnp.zeros((H, D, D))}, r"w2 must be \[2, 5, 3\], got \[2, 3, 3\]"),
        ({"v": jnp.zeros((B, 4, H, 2)), "w2": jnp.zeros((H, F, 2))}, "residual=True needs Dv = D"),
    ],
)
def test_errors_name_the_argument(change, message):
    names = ("q", "k", "v", "lr", "momentum", "decay", "w1", "w2")
    arguments = dict(zip(names, (*tokens(4), *network()))) | change
    with pytest.raises(ValueError, match=message):
        ops.neural_memory_mlp(**arguments)


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="initial_state must be"):
        ops.neural_memory_linear(*tokens(4), jnp.zeros((B, H, D, D + 1)))
