import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.attention.elementwise import (
    COMMON,
    KEYS,
    PAIRS,
    QUERIES,
    REWRITTEN,
    evaluate,
    obstacle,
)

ROW, COLUMN = (1, 1, 1, KEYS), (1, 1, QUERIES, 1)


def tile():
    rng = np.random.default_rng(0)
    scores, row, column = (rng.normal(size=n) for n in ((4, 5), (1, 5), (4, 1)))
    return tuple(jnp.asarray(x, jnp.float32) for x in (scores, row, column))


def cap(scores, row, column):
    return jnp.where(scores > row, 3 * jnp.tanh(scores / 3), jax.nn.gelu(scores * column) + row**2)


def test_a_function_of_a_tile_is_that_of_its_numbers():
    args = tile()
    got = evaluate(cap, args, (PAIRS, ROW, COLUMN))[0]
    np.testing.assert_allclose(got, cap(*args), rtol=1e-6)
    # Queries may lie along the other axis.
    turned = evaluate(cap, [x.T for x in args], (PAIRS, ROW, COLUMN))[0]
    np.testing.assert_allclose(turned.T, got, rtol=1e-6)


def test_differences_of_positions_are_converted_by_row_and_column():
    """As every number of them in between: they are exact."""
    q, k = (2**24 - 7 * jnp.arange(n, dtype=jnp.int32) for n in (4, 5))

    def decay(q, k):
        return (q - k).astype(jnp.float32) * 0.25 + (k - q)

    def run(q, k):
        return evaluate(decay, (q, k), ((QUERIES, 1), (KEYS,)), positions=(0, 1))[0]

    q = q[:, None]
    np.testing.assert_array_equal(run(q, k[None]), decay(q, k))
    eqns = jax.make_jaxpr(run)(q, k[None]).eqns
    converted = [e.outvars[0].aval.size for e in eqns if e.primitive.name == "convert_element_type"]
    assert sorted(converted) == [4, 4, 5, 5]


def test_axes_may_be_moved_and_brought_back():
    scores, _, column = tile()

    def there_and_back(scores, column):
        return jnp.swapaxes(jnp.swapaxes(scores, 2, 3) + jnp.swapaxes(column, 2, 3), 2, 3)

    got = evaluate(there_and_back, (scores, column), (PAIRS, COLUMN))[0]
    np.testing.assert_allclose(got, scores + column, rtol=1e-6)


def test_calls_and_derivatives_are_run_through():
    args = tile()

    @jax.jit
    def slopes(scores, row, column):
        value, pull = jax.vjp(jax.nn.softplus, jax.nn.relu(scores) * row)
        return pull(column + jnp.zeros_like(value))[0]

    assert (
        obstacle(
            slopes, [jax.ShapeDtypeStruct(s, jnp.float32) for s in (PAIRS, ROW, COLUMN)], COMMON
        )
        is None
    )
    got = evaluate(slopes, args, (PAIRS, ROW, COLUMN))[0]
    np.testing.assert_allclose(got, slopes(*args), rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in REWRITTEN if n != "add_any"])
def test_what_a_kernel_lacks_is_rewritten(name):
    written = {
        "exp_neg_sq": lambda x: jax.jvp(jax.lax.erf, (x,), (1 + 0 * x,))[1],
        "integer_pow": lambda x: x**3,
        "not": lambda x: jnp.where(~(x > 0), x, 0),
        "one_minus_square": lambda x: jax.jvp(jnp.tanh, (x,), (1 + 0 * x,))[1],
        "pow": lambda x: jnp.abs(x) ** 2.5,
        "rem of floats": lambda x: jax.lax.rem(x, jnp.float32(0.7)),
    }
    function = written.get(name) or getattr(jax.lax, name, None) or getattr(jnp, name)
    x = tile()[0] * 3
    want = function(jnp.abs(x) if name == "log1p" else x)
    got = evaluate(function, [jnp.abs(x) if name == "log1p" else x], [PAIRS], COMMON)[0]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function, match",
    [
        (lambda s, r, c: s - s.max(-1, keepdims=True), "reduce_max"),
        (lambda s, r, c: s + jnp.arange(s.shape[-1]), "iota"),
        (lambda s, r, c: s + np.arange(float(KEYS)), "closes over an array"),
        (lambda s, r, c: s.reshape(1, 1, -1).reshape(s.shape), "mixes"),
        (lambda s, r, c: s + s.sum(), "reduce_sum"),
        (lambda s, r, c: jax.lax.cumsum(s, 3), "cumsum"),
        (lambda s, r, c: jax.lax.lgamma(s), "lgamma"),
    ],
)
def test_what_is_not_elementwise_is_named(function, match):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (PAIRS, ROW, COLUMN)]
    assert match in obstacle(function, args, COMMON)
