"""Calls of attention that kernels must agree with the definition on."""

import jax
import jax.numpy as jnp
import numpy as np

from attn_kernels.attention import ScoreMod, attention, operand, sigmoid, softmax_with_sink
from attn_lab import ops

HEADS = 2
causal = ops.sliding_window_mask(-1, 0)


def capped(score, b, h, q, k, cap, slope):
    return cap * jnp.tanh(score / cap) - slope * jnp.abs(q - k)


def scaled(score, b, h, q, k, row, column):
    return score * row + column


def added(score, b, h, q, k, bias):
    return score + bias


def cases(q_len, k_len, dense=True):
    """Settings of `attention`, with operands of every combination of axes."""
    rng = np.random.default_rng(0)

    def normal(axes, *shape):
        return operand(jnp.asarray(rng.normal(size=shape), jnp.float32), axes)

    ids = jnp.arange(q_len) // 50
    slopes = jnp.linspace(0.1, 1, HEADS)
    found = {
        "full": {},
        "causal": {"mask": causal},
        "capped_slopes": {
            "mask": ops.sliding_window_mask(70, 0),
            "score_mod": ScoreMod(capped, (operand(jnp.float32(0.5), ""), operand(slopes, "h"))),
        },
        "rows_and_columns": {
            "score_mod": ScoreMod(scaled, (normal("bq", 1, q_len), normal("hk", HEADS, k_len)))
        },
        "sigmoid": {"mask": causal, "normalizer": sigmoid},
        "sink": {
            "mask": ops.sliding_window_mask(40, 0),
            "normalizer": softmax_with_sink(jnp.asarray([0.3, -1.0])),
        },
        "sink_of_rows": {
            "normalizer": softmax_with_sink(normal("hq", HEADS, q_len)[0, ..., 0], "hq")
        },
        "segments": {"mask": ops.segment_mask(ids[None]) & causal} if q_len == k_len else {},
    }
    if dense:
        bias = ScoreMod(added, (normal("hqk", HEADS, q_len, k_len),))
        found["bias"] = {"mask": causal, "score_mod": bias}
        half = ScoreMod(added, (bias.operands[0].astype(jnp.bfloat16),))
        found["bias_of_16_bits"] = {"mask": ops.sliding_window_mask(70, 30), "score_mod": half}
    return found


CASES = list(cases(8, 8))


def inputs(q_len, k_len, dtype=jnp.float32, dim=16, width=8):
    rng = np.random.default_rng(q_len)
    shapes = (1, q_len, HEADS, dim), (1, k_len, 1, dim), (1, k_len, 1, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def everything(arrays, case, implementation):
    """Output, statistics, and gradients of all arguments and operands, cotangents on both."""
    leaves, treedef = jax.tree.flatten(case)
    floats = [n for n, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    stats = case.get("normalizer") != sigmoid

    def loss(arrays, moving):
        given = list(leaves)
        for n, x in zip(floats, moving):
            given[n] = x
        case = treedef.unflatten(given)
        found = attention(*arrays, **case, implementation=implementation, return_stats=stats)
        total = 0
        for x in jax.tree.leaves(found):
            x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
            total += (x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum()
        return total, found

    moving = [leaves[n] for n in floats]
    slopes = jax.grad(loss, (0, 1), has_aux=True)
    return jitted(slopes, implementation)(arrays, moving)


def jitted(function, implementation):
    """But for the interpreter of GPUs: it waits for ever if two kernels run at a time."""
    eager = implementation == "mosaic_gpu" and jax.default_backend() == "cpu"
    return function if eager else jax.jit(function)


def on_cpu(function, *args):
    """What it gives there: compilers for GPUs take long for a reference that runs once."""
    (cpu, *_) = jax.devices("cpu")
    with jax.default_device(cpu):
        return function(*jax.device_put(args, cpu))


def check(implementation, case, arrays, rounding):
    """An implementation errs at most twice as much as the definition in the same precision."""
    got = everything(arrays, case, implementation)
    base = on_cpu(lambda *args: everything(*args, "definition"), arrays, case)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (arrays, case),
        )
        exact = on_cpu(lambda *args: everything(*args, "definition"), *wide)
    for n, (a, b, c) in enumerate(zip(*map(jax.tree.leaves, (got, base, exact)), strict=True)):
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(c))
        a, b, c = (np.where(np.isfinite(c), x, 0) for x in (a, b, c))
        bound = 2 * np.abs(b - c).max() + rounding * np.abs(c).max()
        assert np.abs(a - c).max() <= bound, n


def check_mechanism(implementation, row, sizes, dtype, rounding):
    """The same of a row of the catalogue, its output and the gradients of its arrays."""

    def cast(arrays, dtype):
        floats = {n: jnp.issubdtype(x.dtype, jnp.floating) for n, x in arrays.items()}
        return {n: x.astype(dtype) if floats[n] else x for n, x in arrays.items()}

    def run(arrays, name):
        def loss(arrays):
            out = row.call(arrays, causal=row.causal[-1], implementation=name)
            wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
            return (wide * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        slopes, out = jitted(jax.grad(loss, has_aux=True), implementation)(arrays)
        return {"out": out, **slopes}

    arrays = cast(row.example(row.fit(sizes), jax.random.key(0)), dtype)
    got = run(arrays, implementation)
    base = on_cpu(lambda arrays: run(arrays, "definition"), arrays)
    with jax.enable_x64(True):
        exact = on_cpu(lambda arrays: run(cast(arrays, jnp.float64), "definition"), arrays)
    for name, c in exact.items():
        a, b, c = (np.asarray(x, np.float64) for x in (got[name], base[name], c))
        bound = 2 * np.abs(b - c).max() + rounding * np.abs(c).max()
        assert np.abs(a - c).max() <= bound, name
