import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

attend = jax.jit(ops.adaptive_filter_attention, static_argnames=("causal", "robust"))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def arguments(length=6, heads=2, dim=3):
    positive = jax.nn.softplus(normal(8, 5, heads))
    return {
        **{name: normal(n, 2, length, heads, dim, 2) for n, name in enumerate("qkv")},
        "times": jnp.cumsum(jax.nn.softplus(normal(3, length))),
        "mu": -0.3 * jax.nn.softplus(normal(4, heads)),
        "omega": normal(5, heads, dim),
        **dict(zip(("sigma2", "eta2", "gamma2", "nu", "tau"), positive)),
    }


def complex_definition(q, k, v, times, mu, omega, sigma2, eta2, gamma2, nu, tau, robust):
    """By complex numbers, as the equations stand."""
    q, k, v = (x[..., 0] + 1j * x[..., 1] for x in (q, k, v))
    apart = times[:, None] - times
    past = jnp.abs(apart)[..., None]
    decay = jnp.exp(mu * past)
    carry = jnp.exp(1j * omega * apart[..., None, None])
    noise = sigma2 * (1 - decay**2) / (-2 * mu) + eta2 * decay**2 + gamma2
    residual = q[:, :, None] - decay[..., None] * carry * k[:, None]
    residual = jnp.sum(jnp.abs(residual) ** 2, -1) / (nu * q.shape[-1] * noise)
    cost = jnp.log1p(residual) if robust else residual
    scores = tau**2 * (-jnp.log(noise) - cost)
    scores = jnp.where(jnp.tri(len(times), dtype=bool)[..., None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, 2) * decay
    out = jnp.einsum("btsh,tshd,bshd->bthd", weights, carry, v)
    return jnp.stack([out.real, out.imag], -1)


@pytest.mark.parametrize("robust", [False, True])
def test_it_is_the_filter_of_the_equations(robust, x64):
    inputs = arguments()
    got = attend(**inputs, robust=robust)
    close(got, complex_definition(**inputs, robust=robust))


def test_without_noise_decay_or_turning_it_is_softmax_attention(x64):
    inputs = arguments()
    unit = lambda x: x / jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)  # noqa: E731
    inputs |= dict(mu=jnp.zeros(2), omega=jnp.zeros((2, 3)), sigma2=jnp.zeros(2))
    inputs |= dict(q=unit(inputs["q"]), k=unit(inputs["k"]))
    got = attend(**inputs, robust=False)
    spread = 3 * inputs["nu"] * (inputs["eta2"] + inputs["gamma2"])
    flat = [inputs[name].reshape(2, 6, 2, 6) for name in "qkv"]
    flat[0] = flat[0] * (2 * inputs["tau"] ** 2 / spread)[:, None]
    want = ops.dot_product_attention(*flat, causal=True, scale=1.0)
    close(got.reshape(want.shape), want)


def test_slow_decays_have_the_limit_of_none(x64):
    """And its derivative: `(exp(x) - 1) / x` is expanded where the quotient would cancel."""
    inputs = arguments()

    def loss(mu):
        return jnp.sum(jnp.sin(attend(**inputs | {"mu": mu})))

    run = jax.jit(jax.value_and_grad(loss))
    at_zero, slope = run(jnp.zeros(2))
    step = jnp.array([-1e-6, 0.0])
    near, _ = run(step)
    close((at_zero - near) / 1e-6, slope[0], 1e-5)
    exact = jax.jit(jax.grad(_exact(inputs)))
    for mu in (-0.004, -0.006):  # pairs on both sides of the switch
        close(run(jnp.full(2, mu))[1], exact(jnp.full(2, mu)), 1e-8)


def _exact(inputs):
    return lambda mu: jnp.sum(jnp.sin(complex_definition(**inputs | {"mu": mu}, robust=True)))


def test_queries_may_have_times_of_their_own(x64):
    inputs = arguments()
    want = attend(**inputs)
    late = inputs | {"q": inputs["q"][:, 4:]}
    close(attend(**late), want[:, 4:])
    moved = late | {"query_times": inputs["times"][4:]}
    close(attend(**moved), want[:, 4:])
    mask = jnp.ones((6, 6), bool).at[2].set(False)

    def run(q):
        out = ops.adaptive_filter_attention(**inputs | {"q": q}, mask=mask)
        return out.sum(), out

    (_, out), slope = jax.jit(jax.value_and_grad(run, has_aux=True))(inputs["q"])
    assert (out[:, 2] == 0).all() and (slope[:, 2] == 0).all()
    assert jnp.isfinite(slope).all() and (slope[:, 1] != 0).any()


def test_errors_name_the_argument():
    inputs = arguments()
    with pytest.raises(ValueError, match=r"nu must be \[2\], got \[3\]"):
        ops.adaptive_filter_attention(**inputs | {"nu": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"k must be \[B, T, H, D, 2\]"):
        ops.adaptive_filter_attention(**inputs | {"k": inputs["k"][:, :, :1]})
