import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

C, N, T = 3, 4, 11
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, float)


def damped(seed=0, channels=C):
    names = ("alpha", "delta", "beta", "gamma")
    arrays = {name: normal(seed + n, channels, N) for n, name in enumerate(names)}
    return arrays | {"omega": normal(seed + 9, C)}


def turning():
    names = dict(alpha=(C, N), delta=(C, N), theta=(C,), gamma=(C, N, 2), omega=(C,))
    return {name: normal(n, *shape) for n, (name, shape) in enumerate(names.items())}


def test_the_answer_to_an_impulse_is_a_sum_of_powers(x64):
    arrays, impulse = damped(), jnp.zeros((1, T, C)).at[0, 2].set(1.0)
    p, q = jax.nn.sigmoid(arrays["delta"]), jax.nn.sigmoid(arrays["alpha"])
    powers = (1 - p * q)[..., None] ** jnp.arange(T - 2)
    want = jnp.einsum("cn,cnt->tc", p * arrays["beta"] * arrays["gamma"], powers) / 2
    for form in "recurrent", "fft":
        got = ops.damped_ema(impulse, **arrays, activation="none", form=form)[0]
        close(got[2:], want.at[0].add(arrays["omega"]))
        close(got[:2], 0)


@pytest.mark.parametrize(
    ("operator", "arrays", "shape"),
    [(ops.damped_ema, damped, (2, C, N)), (ops.complex_ema, turning, (2, C, N, 2))],
    ids=["damped", "complex"],
)
def test_convolutions_continue_states_as_steps_do(operator, arrays, shape, x64):
    arrays, x, start = arrays(), normal(20, 2, T, C), normal(21, *shape)

    @functools.partial(jax.jit, static_argnums=0)
    def run(form, x, start):
        return operator(x, **arrays, initial_state=start, return_state=True, form=form)

    want, state = run("recurrent", x, start)
    got, last = run("fft", x, start)
    close(got, want)
    close(last, state)
    head, between = run("fft", x[:, :1], start)
    tail, last = run("fft", x[:, 1:], between)
    close(jnp.concatenate([head, tail], 1), want)
    close(last, state)


def test_truncation_forgets_what_is_older(x64):
    arrays, impulse = damped(), jnp.zeros((1, T, C)).at[0, 2].set(1.0)
    names = dict(static_argnames=("activation", "truncation"))
    run = jax.jit(ops.damped_ema, **names)
    run = functools.partial(run, impulse, **arrays, activation="none")
    close(run(truncation=3)[:, :5], run()[:, :5])
    close(run(truncation=3)[:, 5:], 0)
    assert jnp.abs(run()[:, 5:]).min() > 0
    close(run(truncation=2 * T), run())


def test_averages_in_both_directions_are_mirror_images(x64):
    arrays, x = damped(channels=2 * C), normal(3, 2, T, C)
    swapped = {n: a if n == "omega" else jnp.roll(a, C, 0) for n, a in arrays.items()}
    run = jax.jit(functools.partial(ops.damped_ema, bidirectional=True), static_argnames="form")
    want = run(x, **arrays)
    close(run(x[:, ::-1], **swapped)[:, ::-1], want)
    close(run(x, **arrays, form="fft"), want)


def test_without_a_read_only_the_token_itself_remains():
    arrays, x = (
        jax.tree.map(jnp.float32, damped() | {"gamma": jnp.zeros((C, N))}),
        jnp.ones((1, 5, C)),
    )
    np.testing.assert_allclose(
        ops.damped_ema(x, **arrays), jax.nn.silu(arrays["omega"] * x), rtol=1e-6
    )


def test_averages_that_do_not_turn_are_damped_ones(x64):
    arrays, x = turning(), normal(5, 1, T, C)
    arrays |= {"theta": jnp.full(C, -1e3), "gamma": arrays["gamma"].at[..., 1].set(0)}
    got = ops.complex_ema(x, **arrays)
    want = ops.damped_ema(
        x,
        arrays["delta"],
        arrays["alpha"],
        jnp.ones((C, N)),
        arrays["gamma"][..., 0],
        arrays["omega"],
        activation="none",
    )
    close(got, want)


def test_saturated_gates_have_derivatives_of_every_order():
    """Float32 holds neither how far from 1 such gates are nor the square of it."""
    arrays, x = jax.tree.map(jnp.float32, turning()), jnp.ones((1, 3, C))
    gates = jnp.broadcast_to(jnp.array([-80.0, 0.0, 60.0, 100.0]), (C, N))

    def run(gates):
        both = {"alpha": gates, "delta": gates}
        return jnp.sin(ops.complex_ema(x, **(arrays | both), form="fft")).sum()

    slopes = jax.jit(lambda gates: jax.jvp(jax.value_and_grad(run), (gates,), (gates,)))(gates)
    assert all(jnp.isfinite(a).all() for a in jax.tree.leaves(slopes))


def test_a_long_memory_keeps_its_rate():
    """Decays within 1e-8 of 1 are those of their logarithm, not of a rounded factor."""
    ones = jnp.ones((1, 1))
    x = jnp.zeros((1, 4000, 1)).at[0, 0].set(1.0)
    arrays = ones, -17 * ones, jnp.exp(17.0) * ones, ones, jnp.zeros(1)
    y = ops.damped_ema(x, *arrays, activation="none")[0, :, 0]
    rate = np.log1p(-1 / (1 + np.exp(17.0)) / (1 + np.exp(-1.0)))
    np.testing.assert_allclose(y[-1] / y[0] - 1, np.expm1(3999 * rate), rtol=0.05)


def test_statistics_are_those_of_all_steps_so_far(x64):
    x, weight, bias = normal(1, 2, T, 6), normal(2, 6), normal(3, 6)
    run = functools.partial(ops.timestep_norm, weight=weight, bias=bias, num_groups=2)
    run = jax.jit(run, static_argnames=("return_state", "prior_count"))
    got, mean, var = run(x, return_state=True)
    groups = x.reshape(2, T, 2, 3)
    for t in 0, 4, T - 1:
        seen = groups[:, : t + 1]
        m, v = seen.mean((1, 3), keepdims=True), seen.var((1, 3), keepdims=True)
        want = ((groups[:, t : t + 1] - m) / jnp.sqrt(v + 1e-5)).reshape(2, 6)
        close(got[:, t], want * (1 + weight) + bias)
    close(mean, m[:, 0, :, 0])
    close(var, v[:, 0, :, 0])
    head, *moments = run(x[:, :4], return_state=True)
    tail = run(x[:, 4:], prior_mean=moments[0], prior_var=moments[1], prior_count=4)
    close(jnp.concatenate([head, tail], 1), got)


def test_priors_count_as_steps(x64):
    x, ones = normal(1, 1, 5, 4), jnp.ones(4)

    def run(mean, var, count):
        return ops.timestep_norm(x, 0 * ones, ones, mean, var, num_groups=4, prior_count=count)

    slopes = jax.jit(jax.grad(lambda *prior: jnp.sin(run(*prior, 0)).sum(), (0, 1)))(ones, ones)
    assert all((slope == 0).all() for slope in slopes)
    close(run(2 * ones, 3 * ones, 1e14), (x - 2) / jnp.sqrt(3 + 1e-5) + 1)


def test_a_large_mean_does_not_cancel_the_variance():
    x = jax.random.normal(jax.random.key(0), (1, 30, 4))
    run = functools.partial(ops.timestep_norm, weight=jnp.zeros(4), bias=jnp.zeros(4), num_groups=1)
    np.testing.assert_allclose(run(x + 4096), run(x), atol=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of silu, none, got 'gelu'"),
        ({"form": "direct"}, "form must be one of auto, .*fft, got 'direct'"),
        ({"truncation": 2, "form": "chunk"}, "truncation must be positive, with form 'fft'"),
        ({"truncation": 2, "return_state": True}, "need no truncation"),
        ({"bidirectional": True}, "alpha must be of 6 channels"),
        ({"beta": jnp.ones((C, 2))}, "beta must be of 3 channels and N=4"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.damped_ema(jnp.ones((1, 2, C)), **(jax.tree.map(jnp.float32, damped()) | arguments))
