import dataclasses
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_kernels.attention import (
    Mask,
    ScoreMod,
    Softmax,
    api,
    attention,
    attention_weights,
    operand,
    relu,
    sigmoid,
    softmax,
    softmax_with_sink,
    streaming,
)

AXES = ["".join(c) for n in range(5) for c in itertools.combinations("bhqk", n)]


@dataclasses.dataclass(frozen=True)
class Causal:
    def __call__(self, b, h, q_index, k_index):
        return k_index <= q_index

    def tile(self, q_first, q_last, k_first, k_last):
        return k_first <= q_last, k_last <= q_first


def same(b, h, q_index, k_index, q_ids, k_ids):
    return q_ids == k_ids


def stream(block_q, block_k):
    """The streaming implementation with small tiles, so that small inputs fill a grid."""

    def attend(q, k, v, *, mask=None, score_mod=None, normalizer=softmax, scale=None):
        tile = api.tile_of(q, k, v, mask, score_mod, normalizer, scale)
        out, stats = streaming.attend(tile, block_q, block_k)
        out, report = jnp.swapaxes(out, 1, 2).astype(v.dtype), normalizer.report(stats)
        return (out,) if report is None else (out, jnp.swapaxes(report, 1, 2)[..., 0])

    return attend


def define(q, k, v, **parts):
    stats = isinstance(parts.get("normalizer", softmax), Softmax)
    out = attention(q, k, v, return_stats=stats, implementation="definition", **parts)
    return out if stats else (out,)


def inputs(seed, batch=2, q_len=13, k_len=19, heads=4, k_heads=2, v_heads=2, dim=5, v_dim=3):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (
        (batch, q_len, heads, dim),
        (batch, k_len, k_heads, dim),
        (batch, k_len, v_heads, v_dim),
    )
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def random_operand(seed, axes, batch, heads, q_len, k_len):
    lengths = dict(zip("bhqk", (batch, heads, q_len, k_len)))
    return operand(jax.random.normal(jax.random.key(seed), [lengths[a] for a in axes]), axes)


def close(got, want, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


masks = {
    "none": lambda ids_q, ids_k: None,
    "causal": lambda ids_q, ids_k: Mask(Causal()),
    "anticausal": lambda ids_q, ids_k: ~Mask(Causal()),
    "packed": lambda ids_q, ids_k: Mask(Causal()) & Mask(same, (ids_q, ids_k)),
    "union": lambda ids_q, ids_k: Mask(Causal()) | Mask(same, (ids_q, ids_k)),
}
normalizers = {
    "softmax": lambda sink: softmax,
    "sink": softmax_with_sink,
    "sigmoid": lambda sink: sigmoid,
    "relu": lambda sink: relu,
}


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99),
    q_len=st.integers(1, 17),
    k_len=st.integers(1, 17),
    group=st.sampled_from([(1, 1, 1), (4, 2, 4), (4, 4, 1), (3, 1, 3)]),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mask=st.sampled_from(sorted(masks)),
    normalizer=st.sampled_from(sorted(normalizers)),
    axes=st.lists(st.sampled_from(AXES), min_size=2, max_size=2),
)
def test_streaming_equals_definition(seed, q_len, k_len, group, blocks, mask, normalizer, axes):
    """Outputs, statistics, gradients of all arrays, forward mode and the gradient of a gradient."""
    with jax.enable_x64(True):
        heads, k_heads, v_heads = group
        q, k, v = inputs(seed, 2, q_len, k_len, heads, k_heads, v_heads)
        sizes = 2, heads, q_len, k_len
        scalings, shifts = (random_operand(seed + n, a, *sizes) for n, a in enumerate(axes))
        ids = jax.random.randint(jax.random.key(seed), (2, q_len + k_len), 0, 3)
        pattern = masks[mask](operand(ids[:, :q_len], "bq"), operand(ids[:, q_len:], "bk"))
        sink = jnp.linspace(-1.0, 1.0, heads)

        def modify(s, b, h, q_index, k_index, scaling, shift):
            return jnp.tanh(s) * scaling + shift * (q_index - k_index) + 0.1 * h

        def call(implementation):
            def function(q, k, v, scalings, shifts, sink):
                return implementation(
                    q,
                    k,
                    v,
                    mask=pattern,
                    score_mod=ScoreMod(modify, (scalings, shifts)),
                    normalizer=normalizers[normalizer](sink),
                    scale=0.7,
                )

            return function

        def scalar(implementation):
            def function(*args):
                outs = call(implementation)(*args)
                finite = [jnp.where(jnp.isfinite(x), x, 0) for x in outs]
                return sum(
                    jnp.sum(jnp.sin(x + jnp.arange(x.size).reshape(x.shape))) for x in finite
                )

            return function

        args = q, k, v, scalings, shifts, sink
        directions = jax.tree.map(lambda x: jnp.cos(3 * x), args)

        def everything(implementation):
            def derivatives(args):
                slope = jax.grad(scalar(implementation), range(6))
                return (*jax.jvp(scalar(implementation), args, directions), slope(*args))

            def function(args):
                outs = call(implementation)(*args)
                return outs, *jax.jvp(derivatives, (args,), (directions,))

            return jax.jit(function)(args)

        got, want = everything(stream(*blocks)), everything(define)
        close(got[:2], want[:2], 1e-8)
        close(got[2], want[2], 1e-6)


def test_reverse_over_reverse(x64):
    q, k, v = inputs(0)

    def penalty(implementation):
        def loss(q, k, v):
            return jnp.sum(jnp.sin(implementation(q, k, v, mask=Mask(Causal()))[0]))

        return lambda *args: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1, 2))(*args))

    got = jax.grad(penalty(stream(4, 3)), (0, 1, 2))(q, k, v)
    close(got, jax.grad(penalty(define), (0, 1, 2))(q, k, v), 1e-8)


@pytest.mark.parametrize("implementation", ["definition", "xla"])
@pytest.mark.parametrize("normalizer", [softmax, sigmoid, relu])
def test_rows_without_keys_are_zero_and_pass_no_gradient(implementation, normalizer):
    q, k, v = inputs(1)
    mask = Mask(lambda b, h, q_index, k_index: (k_index < 4) & (q_index % 2 == 0))

    def out(q, k, v):
        parts = dict(mask=mask, normalizer=normalizer, implementation=implementation)
        return attention(q, k, v, **parts)

    odd = (jnp.arange(13) + 6) % 2 == 1
    assert (out(q, k, v)[:, odd] == 0).all() and (out(q, k, v)[:, ~odd] != 0).any()
    dq, dk, dv = jax.grad(lambda *a: jnp.sum(jnp.cos(out(*a)) + out(*a)), (0, 1, 2))(q, k, v)
    assert (dq[:, odd] == 0).all() and (dk[:, 4:] == 0).all() and (dv[:, 4:] == 0).all()
    assert all(jnp.isfinite(x).all() for x in (dq, dk, dv))
    hessian = jax.jvp(jax.grad(lambda q: jnp.sum(out(q, k, v) ** 2)), (q,), (q,))[1]
    assert jnp.isfinite(hessian).all()


@pytest.mark.parametrize("implementation", ["definition", "xla"])
def test_extreme_scores_stay_finite(implementation):
    q, k, v = inputs(2)

    def loss(scale, *args):
        return jnp.sum(attention(*args, scale=scale, implementation=implementation) ** 2)

    for scale in (1e-6, 1e4, 1e30):
        out, grads = jax.value_and_grad(loss, (1, 2, 3))(scale, q, k, v)
        assert all(jnp.isfinite(x).all() for x in (out, *grads))
        if scale == 1e4:
            with jax.enable_x64(True):
                wide = (x.astype(float) for x in (q, k, v))
                np.testing.assert_allclose(out, loss(scale, *wide), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_error_stays_within_twice_that_of_the_definition(dtype):
    with jax.enable_x64(True):
        q, k, v = (x.astype(dtype) for x in inputs(3, 2, 64, 96, 4, 2, 2, 32, 16))
        ct = jax.random.normal(jax.random.key(9), (2, 64, 4, 16)).astype(dtype)

        def run(function, dtype):
            args = [x.astype(dtype) for x in (q, k, v)]
            out, pullback = jax.vjp(lambda *a: function(*a, mask=Mask(Causal()))[0], *args)
            return [np.asarray(x, np.float64) for x in (out, *pullback(ct.astype(dtype)))]

        truth = run(define, jnp.float64)
        for exact, ours, theirs in zip(truth, run(stream(16, 24), dtype), run(define, dtype)):
            unit = float(jnp.finfo(dtype).eps) * np.abs(exact).max()
            assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max() + unit


def test_causality_is_exact():
    q, k, v = inputs(4, q_len=19)
    early = jax.jacrev(lambda k, v: stream(4, 4)(q, k, v, mask=Mask(Causal()))[0][:, :7], (0, 1))
    for jacobian in early(k, v):
        late = jacobian[..., 7:, :, :]
        assert (late == 0).all() and (jacobian != 0).any()


def test_empty_tiles_are_never_visited():
    """Values of NaN behind the causal mask would reach the first rows through 0 * NaN."""
    q, k, v = inputs(5, q_len=16, k_len=16)
    v = v.at[:, 8:].set(jnp.nan)
    out = stream(4, 4)(q, k, v, mask=Mask(Causal()))[0]
    assert jnp.isfinite(out[:, :8]).all() and jnp.isnan(out[:, 8:]).all()


def test_parts_of_the_keys_combine_by_their_statistics():
    q, k, v = inputs(6)
    whole = attention(q, k, v)
    (a, log_a), (b, log_b) = (
        attention(q, k[:, part], v[:, part], return_stats=True) for part in (np.s_[:7], np.s_[7:])
    )
    total = jnp.logaddexp(log_a, log_b)
    joined = a * jnp.exp(log_a - total)[..., None] + b * jnp.exp(log_b - total)[..., None]
    close(joined, whole, 1e-5)


def test_weights_and_transformations():
    q, k, v = inputs(7)
    weights = attention_weights(q, k, mask=Mask(Causal()))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    out = attention(q, k, v, mask=Mask(Causal()))
    grouped = jnp.repeat(v, 2, axis=2)
    close(jnp.einsum("bhts,bshd->bthd", weights, grouped), out, 1e-5)
    jitted = jax.jit(lambda q, k, v, m: attention(q, k, v, mask=m))
    close(jitted(q, k, v, Mask(Causal())), out, 1e-5)
    jitted(q, k, v, Mask(Causal()))
    assert jitted._cache_size() == 1  # equal masks are equal arguments
    stacked = jax.vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])(q, k, v)
    close(stacked, attention(q, k, v), 1e-5)

    def loss(q):
        return jnp.sum(attention(q, k, v) ** 2)

    close(jax.grad(jax.remat(loss))(q), jax.grad(loss)(q), 1e-5)


def test_output_has_the_dtype_of_v_and_statistics_are_float32():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(8))
    out, stats = attention(q, k, v, return_stats=True)
    assert out.dtype == jnp.bfloat16 and stats.dtype == jnp.float32
    assert out.shape == (2, 13, 4, 3) and stats.shape == (2, 13, 4)


@pytest.mark.parametrize("normalizer", [softmax, sigmoid, relu])
def test_float32_stays_where_float64_is_allowed(normalizer, x64):
    q, k, v = (x.astype(jnp.float32) for x in inputs(8))
    run = lambda q: attention(q, k, v, normalizer=normalizer, implementation="xla")  # noqa: E731
    assert run(q).dtype == jax.grad(lambda q: run(q).sum())(q).dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=(2, 13, 20)), "q must be floating"),
        (dict(k=(2, 19, 3, 5)), "k has 3 heads"),
        (dict(k=(2, 19, 2, 6)), "must have the batch and dim of q"),
        (dict(v=(2, 18, 2, 3)), "must have the batch and length of k"),
        (dict(v=(2, 19, 3, 3)), "v has 3 heads"),
        (dict(k=(2, 0, 2, 5), v=(2, 0, 2, 3)), "at least one position"),
        (dict(mask=Mask(same, (np.zeros((1, 1, 13, 18), bool),) * 2)), "mask has an operand"),
        (dict(implementation="cuda"), "implementation must be None or one of"),
        (dict(normalizer=relu, return_stats=True), "has no statistics"),
        (dict(scale=np.ones(4)), "scale must be a number"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = dict(zip("qkv", inputs(9)))
    for name, value in change.items():
        is_shape = name in "qkv"
        arguments[name] = jnp.zeros(value) if is_shape else value
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: attention(**arguments))


def test_integers_are_refused():
    q, k, v = inputs(9)
    with pytest.raises(ValueError, match="v must be floating"):
        attention(q, k, v.astype(int))


def test_temporary_memory_is_linear_in_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
        loss = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, mask=Mask(Causal()))), (0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(32768) < 4.5 * temporaries(8192) < 200e6


@pytest.mark.slow
def test_a_step_at_length_32768_takes_under_2_gb():
    script = """
import jax, jax.numpy as jnp
from attn_kernels.attention import attention
from attn_lab.ops import causal_mask
x = jax.random.normal(jax.random.key(0), (3, 1, 32768, 1, 64))
def loss(x):
    return jnp.sum(attention(*x, mask=causal_mask()) ** 2)
step = jax.jit(lambda x: x - 1e-3 * jax.grad(loss)(x))
assert jnp.isfinite(step(x)).all()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2e6  # kB
