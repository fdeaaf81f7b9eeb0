import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import on_cpu
from recurrences import within

from attn_kernels import gpu
from attn_kernels.recurrence import linear_attention, step

pytest.importorskip("triton")
pytest.importorskip("jax_triton")

GATES = -np.inf, -1e4, -50, -0.3, -1e-4, 0
kinds = [
    pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"]),
    pytest.mark.parametrize("decay", ["none", "head", "channel"]),
]


def each_kind(test):
    return functools.reduce(lambda test, mark: mark(test), kinds, test)


def inputs(decay, delta, batch=2, dim=40, width=24, dtype=jnp.float32, heads=(2, 1, 4, 2)):
    rng = np.random.default_rng(dim)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    most = max(heads)
    arrays = dict(q=normal(batch, heads[0], dim), k=normal(batch, heads[1], dim) / dim**0.5)
    arrays["v"] = normal(batch, heads[2], width)
    arrays["state"] = normal(batch, most, dim, width).astype(jnp.float32)
    if decay != "none":
        shape = (batch, heads[3], dim)[: 2 + (decay == "channel")]
        arrays["log_decay"] = jnp.asarray(rng.choice(GATES, shape), jnp.float32)
    if delta:
        arrays["beta"] = jnp.asarray(rng.uniform(size=(batch, heads[3])), dtype)
    return arrays


def check(arrays, **options):
    """The kernel errs at most twice as much as XLA in the same precision."""
    got = step(**arrays, implementation="triton", **options)

    def plain(arrays):
        return step(**arrays, implementation="xla", **options)

    base = on_cpu(plain, arrays)
    with jax.enable_x64(True):
        exact = on_cpu(plain, {n: x.astype(jnp.float64) for n, x in arrays.items()})
    within(got, base, exact)


@each_kind
def test_error_budget(decay, delta):
    check(inputs(decay, delta))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dim, width", [(64, 64), (7, 130), (130, 7), (512, 16)])
def test_sizes_and_dtypes(dim, width, dtype):
    check(inputs("channel", True, 1, dim, width, dtype, heads=(2, 2, 2, 1)), scale=0.3)


def test_steps_equal_one_call():
    """In a scan, whose carry is the state."""
    arrays = inputs("channel", True, 1)
    steps = {n: jnp.stack([x, -x, x / 2], 1) for n, x in arrays.items() if n != "state"}
    steps["log_decay"] = jnp.abs(steps["log_decay"]) * -1

    def body(state, now):
        out, state = step(state, **now, implementation="triton")
        return state, out

    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), steps)
    state, out = jax.jit(functools.partial(jax.lax.scan, body))(arrays["state"], along)
    want = linear_attention(
        **steps, initial_state=arrays["state"], return_state=True, form="recurrent"
    )
    for x, y in zip((jnp.moveaxis(out, 0, 1), state), want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@each_kind
def test_derivatives_are_those_of_xla(decay, delta):
    arrays = inputs(decay, delta)
    if "log_decay" in arrays:
        arrays["log_decay"] = jnp.maximum(arrays["log_decay"], -3)
    arrays["scale"] = jnp.float32(0.3)

    def loss(arrays, implementation):
        out, state = step(**arrays, implementation=implementation)
        return (out**2).sum() + (state**2).sum()

    got, want = (jax.grad(loss)(arrays, implementation) for implementation in ("triton", "xla"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_vmap():
    arrays = inputs("head", True)
    one = jax.vmap(lambda arrays: step(**arrays, implementation="triton"))
    got = one(jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), arrays))
    want = step(**arrays, implementation="triton")
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, jnp.stack([y, y[::-1]]))


def test_none_takes_the_kernel_for_what_xla_reads_twice(monkeypatch):
    from attn_kernels.recurrence.triton import step as kernel

    served = []
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(kernel, "step", lambda *args: served.append(args) or (args[3], args[0]))
    for delta, batch in (True, 128), (False, 128), (True, 8):
        arrays = inputs("head", delta, 1, 128, 128, heads=(16, 16, 16, 16))
        arrays = {n: jnp.broadcast_to(x, (batch, *x.shape[1:])) for n, x in arrays.items()}
        jax.eval_shape(step, **arrays)
    assert len(served) == 1


def test_refusals():
    arrays = inputs("none", False)
    with pytest.raises(ValueError, match="implementation"):
        step(**arrays, implementation="cuda")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        step(**jax.tree.map(lambda x: x.astype(jnp.float64), arrays), implementation="triton")


@pytest.mark.skipif(not gpu.available(), reason="there is no Hopper GPU")
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_programs_that_fill_a_gpu(batch, dim):
    check(inputs("channel", True, batch, dim, dim, jnp.bfloat16, heads=(32, 32, 32, 32)))


@each_kind
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu(decay, delta, capability):
    """The compiler's report is printed."""
    from triton_report import SHARED, report

    from attn_kernels.recurrence.triton import step as kernel

    dim = 128
    rows, columns = kernel._block(dim, dim)
    types = {f"{n}_ptr": "*bf16" for n in ("q", "k", "v", "beta", "out")}
    types |= {f"{n}_ptr": "*fp32" for n in ("state", "gate", "last")}
    constants = {f"{n}_heads": 32 for n in ("q", "k", "v", "gate", "beta")}
    constants |= dict(heads=32, dim=dim, width=dim, rows=rows, columns=columns, delta=delta)
    constants |= dict(per_head=decay == "head", per_channel=decay == "channel", scale=0.1)
    found = report(kernel._step, types, constants, kernel.WARPS, 2, capability)
    print(decay, delta, capability, found)
    assert not found["stack"] and found["shared"] <= SHARED[capability]
