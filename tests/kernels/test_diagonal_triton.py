import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrences

from attn_kernels import gpu
from attn_kernels.recurrence import diagonal_recurrence

pytest.importorskip("jax_triton")
triton_report = pytest.importorskip("triton_report")

GATES = -np.inf, -1e4, -50, -0.3, -1e-4, 0
# Which of decays, writes and reads vary in time; None is not given.
KINDS = {
    "constant": (False, None, None),
    "average": (False, False, False),
    "gated": (True, None, None),
    "selective": (True, True, True),
    "mixed": (False, True, False),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def inputs(kind, length=37, channels=5, size=3, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    decay, write, read = KINDS[kind]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def shape(varies):
        return (batch, length, channels, size) if varies else (channels, size)

    arrays = dict(x=normal(batch, length, channels), initial_state=normal(batch, channels, size))
    arrays["log_decay"] = jnp.asarray(rng.choice(GATES, shape(decay)), jnp.float32)
    for name, varies in ("write", write), ("read", read):
        if varies is not None:
            arrays[name] = normal(*shape(varies))
    return arrays


everything = functools.partial(recurrences.everything, function=diagonal_recurrence)
check = functools.partial(recurrences.check, "triton", None, function=diagonal_recurrence)


@kinds
def test_error_budget(kind):
    """In Triton's interpreter where there is no GPU, on sizes that fill no block."""
    check(inputs(kind))


@pytest.mark.parametrize("length", [1, 16, 32])
@pytest.mark.parametrize("size", [1, 16, 40])
def test_sizes(length, size):
    check(inputs("mixed", length, 3, size, 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    check(inputs("selective", dtype=dtype))


@pytest.mark.slow
def test_small_decays_do_not_drift():
    arrays = inputs("constant", 1000, 1, 4, 1)
    arrays["log_decay"] = jnp.array([[-1e-4, -1e-3, 0.0, -1.0]])
    check(arrays)


@pytest.mark.parametrize("kind", ["average", "selective"])
def test_long_sequences_are_cut_into_parts(monkeypatch, kind):
    from attn_kernels.recurrence.triton import diagonal, parts

    arrays = inputs(kind, 48, channels=16)
    monkeypatch.setattr(parts, "SHORTEST", 12)
    monkeypatch.setattr(parts, "PROCESSORS", 2)
    assert diagonal._number([arrays["x"]], arrays["initial_state"]) == 4
    check(arrays)


def test_is_mapped():
    """`jax.vmap` over some arguments equals a loop, for outputs and derivatives."""
    arrays = inputs("average")
    run = jax.jit(functools.partial(everything, implementation="triton"))
    for mapped in {"x"}, {"log_decay", "read"}:
        several = {n: jnp.stack([x, 0.5 * x]) if n in mapped else x for n, x in arrays.items()}
        axes = {name: 0 if name in mapped else None for name in arrays}
        got = jax.jit(jax.vmap(run, (axes,)))(several)
        each = [{n: x[i] if n in mapped else x for n, x in several.items()} for i in range(2)]
        want = jax.tree.map(lambda *x: jnp.stack(x), *map(run, each))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.skipif(not gpu.available(), reason="there is no Hopper GPU")
@kinds
@pytest.mark.parametrize(
    "length, channels, size, batch", [(1000, 512, 1, 8), (1000, 512, 16, 8), (8192, 64, 1, 2)]
)
def test_programs_that_fill_a_gpu(kind, length, channels, size, batch):
    """Some of whose sequences are cut into parts."""
    arrays = inputs(kind, length, channels, size, batch, jnp.bfloat16)
    run = jax.jit(functools.partial(everything, implementation="triton"))
    jax.tree.map(np.testing.assert_array_equal, run(arrays), run(arrays))
    check(arrays)


def test_none_takes_the_kernel_on_a_hopper_gpu(monkeypatch):
    from attn_kernels.recurrence.triton import diagonal

    served = []
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(diagonal, "walk", lambda x, *rest: served.append(x.shape) or (x, rest[-1]))
    for options in {}, {"form": "chunk"}, {"implementation": "xla"}:
        jax.eval_shape(functools.partial(diagonal_recurrence, **options), **inputs("average"))
    jax.eval_shape(diagonal_recurrence, **inputs("average", 4))
    assert len(served) == 1


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(log_decay=jnp.full((5, 3), -1 + 1j, jnp.complex64)), "complex64"),
        (dict(form="chunk"), "form"),
        (dict(log_decay=-jnp.ones((5, 300)), initial_state=None), "256"),
    ],
    ids=["complex", "form", "numbers"],
)
def test_refusals(change, match):
    with pytest.raises(NotImplementedError, match=match):
        diagonal_recurrence(**{**inputs("constant"), **change}, implementation="triton")


@pytest.mark.parametrize(
    "kind, size, capability",
    [
        ("average", 16, 80),
        ("gated", 1, 90),
        *(
            pytest.param(kind, size, capability, marks=pytest.mark.slow)
            for kind in KINDS
            for size in (1, 16)
            for capability in (80, 90)
        ),
    ],
)
def test_compiles_without_a_gpu(monkeypatch, kind, size, capability):
    """Registers, bytes of spills and of shared memory are printed."""
    from attn_kernels.recurrence.triton import diagonal

    found = triton_report.launches(monkeypatch, diagonal)
    arrays = inputs(kind, 1000, 64, size, dtype=jnp.bfloat16)
    jax.eval_shape(functools.partial(everything, implementation="triton"), arrays)
    assert [args[0].fn.__name__ for args in found] == ["_walk", "_walk_back"]
    for args in found:
        report = triton_report.report(*args, capability)
        print(f"sm_{capability}", args[0].fn.__name__, report)
        assert not report["stack"] and report["shared"] <= triton_report.SHARED[capability]
