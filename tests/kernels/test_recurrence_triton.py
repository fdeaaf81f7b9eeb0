import functools
import importlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrences
from recurrences import everything, inputs

from attn_kernels import gpu
from attn_kernels.recurrence import linear_attention

pytest.importorskip("jax_triton")
triton_report = pytest.importorskip("triton_report")

ROUNDING = 2**-7  # of bfloat16, in which products are taken
check = functools.partial(recurrences.check, "triton", ROUNDING)


@pytest.mark.parametrize("write", ["additive", "delta"])
@pytest.mark.parametrize("decay", ["none", "head"])
def test_error_budget(write, decay):
    """In Triton's interpreter where there is no GPU, on lengths that fill no chunk."""
    check(inputs(write, decay, 140))


@pytest.mark.parametrize("write, decay", [("additive", "channel"), ("delta", "head")])
def test_programs_of_other_gpus(monkeypatch, write, decay):
    monkeypatch.setattr(gpu, "hopper", lambda: False)
    check(inputs(write, decay, 70))


@pytest.mark.slow
@pytest.mark.parametrize("write", ["additive", "delta"])
@pytest.mark.parametrize("length", [1, 64, 70])
@pytest.mark.parametrize("dim, width", [(128, 128), (40, 200), (256, 32)])
def test_error_budget_of_sizes(write, length, dim, width):
    first = inputs(write, "head", length, dim, width)
    # Of one step beta has one derivative a row, a sum that may happen to cancel.
    last = dict(first, v=2 * first["v"], initial_state=first["initial_state"][:, ::-1])
    check({n: jnp.concatenate([x, x[:, ::-1], last[n]]) for n, x in first.items()})


@pytest.mark.parametrize("write", ["additive", "delta"])
def test_float16(write):
    check(inputs(write, "head", 70, dtype=jnp.float16))


@pytest.mark.parametrize("write", ["additive", "delta"])
def test_segments(write):
    ids = jnp.asarray([[-1] * 2 + [3] * 9 + [1] + [2] * 70 + [-1] + [0] * 8])
    check(inputs(write, "head", ids.size), segment_ids=ids)


@pytest.mark.parametrize(
    "write, decay",
    [("additive", "none"), ("additive", "head"), ("additive", "channel"), ("delta", "head")],
)
def test_long_sequences_are_cut_into_parts(monkeypatch, write, decay):
    from attn_kernels.recurrence.triton import parts

    monkeypatch.setattr(parts, "SHORTEST", 64)
    monkeypatch.setattr(parts, "PROCESSORS", 4 * 2)
    arrays = {n: jnp.concatenate([x, x[:, ::-1]]) for n, x in inputs(write, decay, 256).items()}
    assert parts.number(256, arrays["initial_state"], {}) == 4
    check(arrays)


def test_is_mapped():
    """`jax.vmap` over some arguments equals a loop, for outputs and derivatives."""
    arrays = inputs("delta", "head", 70)
    several = dict(arrays, v=jnp.stack([arrays["v"], -2 * arrays["v"]]))
    axes = {name: 0 if name == "v" else None for name in arrays}
    run = jax.jit(functools.partial(everything, implementation="triton"))
    got = jax.jit(jax.vmap(run, (axes,)))(several)
    want = [run(dict(arrays, v=v)) for v in several["v"]]
    want = jax.tree.map(lambda *x: jnp.stack(x), *want)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
@pytest.mark.parametrize("write", ["additive", "delta"])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("length, dim", [(4096, 64), (4096, 128), (1024, 256)])
def test_programs_that_fill_a_gpu(write, decay, length, dim):
    """Races would show: outputs and derivatives are right, and the same whenever they are run."""
    if (write, decay) == ("delta", "channel"):
        pytest.skip("there is no such kernel")
    arrays = inputs(write, decay, length, dim, dim)
    arrays = {n: jnp.concatenate([x, x[:, ::-1]] * 32) for n, x in arrays.items()}
    run = jax.jit(functools.partial(everything, implementation="triton"))
    jax.tree.map(np.testing.assert_array_equal, run(arrays), run(arrays))
    check({n: x[:2] for n, x in arrays.items()}, form="chunk")


def test_scale_has_a_derivative():
    arrays = inputs("delta", "head", 5)

    def loss(scale, **options):
        out = linear_attention(**arrays, scale=scale, **options)
        return (out.astype(jnp.float32) ** 2).sum()

    got, want = (
        jax.grad(functools.partial(loss, **options))(jnp.float32(0.3))
        for options in ({"implementation": "triton"}, {"form": "recurrent"})
    )
    np.testing.assert_allclose(got, want, rtol=4 * ROUNDING)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(v=jnp.ones((1, 7, 2, 24))), "bfloat16"),
        (dict(chunk_size=32), "chunk_size"),
        (dict(form="parallel"), "form"),
    ],
    ids=["dtype", "chunk", "form"],
)
def test_refusals(change, match):
    call = {**inputs("delta", "head", 7), "implementation": "triton", **change}
    with pytest.raises(NotImplementedError, match=match):
        linear_attention(**call)


def test_triton_keeps_the_place_of_its_binaries():
    """For PyTorch's kernels in the same process."""
    code = "import triton, attn_kernels.recurrence.triton; print(triton.knobs.cache.dir)"
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_CACHE_DIR"}
    for given in environment, environment | {"TRITON_CACHE_DIR": "somewhere"}:
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
        assert ran.stdout.strip().endswith(given.get("TRITON_CACHE_DIR", ".triton/cache"))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "write, decay, dim, width",
    [
        ("delta", "head", 128, 128),
        *(
            pytest.param(write, decay, dim, dim, marks=pytest.mark.slow)
            for write in ("additive", "delta")
            for decay in ("none", "head")
            for dim in (64, 128, 256)
        ),
    ],
)
def test_compiles_without_a_gpu(monkeypatch, capability, write, decay, dim, width):
    """By Triton's own compiler; registers, bytes of spills and of shared memory are printed."""
    from attn_kernels.recurrence.triton import delta, walk

    monkeypatch.setattr(gpu, "hopper", lambda: capability == 90)
    found = triton_report.launches(monkeypatch, delta, walk)
    arrays = inputs(write, decay, 1024, dim, width)
    jax.eval_shape(functools.partial(everything, implementation="triton"), arrays)
    jax.eval_shape(functools.partial(linear_attention, implementation="triton"), **arrays)
    assert len(found) > 3
    for kernel, *args in found:
        report = triton_report.report(kernel, *args, capability)
        print(f"sm_{capability}", kernel.fn.__name__, args[-2:], report)
        assert report["shared"] <= triton_report.SHARED[capability]
        # An A100 has the operands of products in registers: those of 256 channels do not fit.
        assert report["stack"] < 1024 or (capability, dim) == (80, 256)


@pytest.mark.parametrize(
    "write, decay, dtype, batch, taken",
    [
        ("additive", "channel", jnp.bfloat16, 34, "triton"),
        ("additive", "head", jnp.bfloat16, 1, "triton"),
        ("additive", "head", jnp.float16, 34, "triton"),
        ("additive", "head", jnp.bfloat16, 34, "mosaic_gpu"),
        ("delta", "none", jnp.float16, 1, "triton"),
        ("delta", "head", jnp.bfloat16, 1, "triton"),
        ("additive", "head", jnp.float32, 1, None),
    ],
)
def test_none_takes_the_kernels_on_a_hopper_gpu(monkeypatch, write, decay, dtype, batch, taken):
    if taken == "mosaic_gpu" and not gpu.supported():
        pytest.skip("Pallas' kernel needs a newer JAX")
    served = []
    monkeypatch.setattr(gpu, "available", lambda: True)
    for name in "triton", "mosaic_gpu":
        kernels = importlib.import_module(f"attn_kernels.recurrence.{name}")

        def chunked(q, k, v, log_decay, state, *_, name=name, **__):
            served.append(name)
            return v, state

        monkeypatch.setattr(kernels, "chunked", chunked)
    arrays = inputs(write, decay, 9, 16, 16, dtype)
    arrays = {n: jnp.repeat(x, batch, 0) for n, x in arrays.items()}
    jax.eval_shape(linear_attention, **arrays)
    assert served == ([taken] if taken else [])
