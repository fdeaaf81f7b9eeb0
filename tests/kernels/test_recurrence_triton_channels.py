import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrences
from recurrences import GATES as EXTREME
from recurrences import everything

from attn_kernels import gpu

pytest.importorskip("triton")
pytest.importorskip("jax_triton")

from attn_kernels.recurrence.triton import channels

ROUNDING = {jnp.bfloat16: 2**-7, jnp.float16: 2**-10}  # in which products are taken
GATES = ["mild", "strong", "extreme"]


def inputs(gates, length, dim=40, width=24, dtype=jnp.bfloat16, heads=(2, 1, 2, 2)):
    """Gates that one product serves, that it does not, and mixtures that forget all."""
    rng = np.random.default_rng(length)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    of = dict(zip("qkvg", heads))
    arrays = {n: normal(1, length, of[n], dim) for n in "qk"}
    arrays["v"] = normal(1, length, of["v"], width)
    state = rng.normal(size=(1, max(heads), dim, width))
    arrays["initial_state"] = jnp.asarray(state, jnp.float32)
    shape = 1, length, of["g"], dim
    decay = {
        "mild": lambda: -0.1 * np.exp(rng.normal(size=shape)),
        "strong": lambda: -np.exp(2 * rng.normal(size=shape)),
        "extreme": lambda: rng.choice(EXTREME, shape, p=(0.02, 0.02, 0.02, 0.5, 0.44)),
    }
    arrays["log_decay"] = jnp.asarray(decay[gates](), jnp.float32)
    return arrays


def check(arrays, **options):
    recurrences.check("triton", ROUNDING[arrays["q"].dtype.type], arrays, **options)


@pytest.mark.parametrize("gates", GATES)
def test_error_budget(gates):
    check(inputs(gates, 140))


@pytest.mark.parametrize("gates", GATES)
def test_float16(gates):
    check(inputs(gates, 70, dtype=jnp.float16))


def test_gates_in_the_dtype_of_the_rest():
    arrays = inputs("mild", 70)
    check({**arrays, "log_decay": arrays["log_decay"].astype(jnp.bfloat16)})


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 64, 70])
@pytest.mark.parametrize("dim, width", [(128, 128), (16, 200), (256, 16)])
def test_error_budget_of_sizes(length, dim, width):
    check(inputs("extreme", length, dim, width, heads=(1, 2, 1, 1)))


def test_segments():
    ids = jnp.asarray([[-1] * 2 + [3] * 9 + [1] + [2] * 60 + [-1] + [0] * 8])
    check(inputs("mild", ids.size), segment_ids=ids)


@pytest.mark.parametrize("gates", GATES)
def test_prepared_chunks(gates):
    arrays = inputs(gates, 140)
    found = channels.prepare_channels(arrays["q"], arrays["k"], arrays["log_decay"], 2, 0.3)
    q, k, g = (np.asarray(arrays[n], np.float64) for n in ("q", "k", "log_decay"))
    k = np.repeat(k, 2, 2)
    for n in range(3):
        at = slice(64 * n, min(64 * n + 64, 140))
        b = np.cumsum(np.maximum(g[:, at], -120), 1)
        between = b[:, :, None] - b[:, None]
        seen = np.tri(b.shape[1])[None, :, :, None, None] > 0
        decay = np.exp(np.where(seen, between, -np.inf))
        pairs = 0.3 * q[:, at, None] * k[:, None, at] * decay
        carried, kept = 0.3 * q[:, at] * np.exp(b), k[:, at] * np.exp(b[:, -1:] - b)
        want = carried, kept, np.moveaxis(pairs.sum(-1), 3, 2), np.exp(b[:, -1])
        got = *(x[:, at] for x in found[:3]), found[3][:, n]
        got = *got[:2], got[2][..., : b.shape[1]], got[3]
        # Both factors of a term of the weights are rounded.
        terms = np.abs(carried), np.abs(kept), 2 * np.abs(pairs).sum(-1), want[3]
        for x, y, size in zip(got, want, terms, strict=True):
            bound = 2**-8 * size.max() + 1e-37
            np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=bound)


@pytest.mark.skipif(not gpu.available(), reason="there is no Hopper GPU")
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("length, dim", [(4096, 64), (4096, 128), (1024, 256)])
def test_programs_that_fill_a_gpu(length, dim, gates):
    """Races would show: outputs and derivatives are right, and the same whenever they are run."""
    arrays = inputs(gates, length, dim, dim)
    arrays = {n: jnp.concatenate([x, -jnp.abs(x), x[::-1] / 2, x] * 16) for n, x in arrays.items()}
    run = jax.jit(functools.partial(everything, implementation="triton"))
    jax.tree.map(np.testing.assert_array_equal, run(arrays), run(arrays))
    check({n: x[:3] for n, x in arrays.items()}, form="chunk")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dim, dtype",
    [
        (64, jnp.bfloat16),
        (128, jnp.bfloat16),
        *(
            pytest.param(dim, dtype, marks=pytest.mark.slow)
            for dim, dtype in ((256, jnp.bfloat16), (64, jnp.float16), (128, jnp.float16))
        ),
    ],
)
@pytest.mark.parametrize("kernel", ["prepare", "local"])
def test_compiles_for_a_gpu(monkeypatch, kernel, dim, dtype, capability):
    """The compiler's report is printed."""
    from triton_report import SHARED, report

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    program, results = {
        "prepare": (channels._prepare, ("carried", "kept", "weights")),
        "local": (
            channels._local,
            ("v", "carried", "kept", "states", "d_out", "d_states", "dq", "dk"),
        ),
    }[kernel]
    short = {jnp.bfloat16: "*bf16", jnp.float16: "*fp16"}[dtype]
    types = {f"{n}_ptr": short for n in ("q", "k", *results)}
    types |= {f"{n}_ptr": "*fp32" for n in ("gates", "total")}
    q, gates = (jax.ShapeDtypeStruct((1, 4096, 4, dim), x) for x in (dtype, jnp.float32))
    constants = channels._constants(kernel, q, gates, 4, 0.1) | dict(k_heads=4)
    if kernel == "local":
        types["d_gates_ptr"] = "*fp32"
        constants |= dict(v_heads=4, width=dim, columns=channels.columns(dim))
        constants |= dict(direct=dtype == jnp.bfloat16)
    warps, stages = constants.pop("warps"), constants.pop("stages")
    found = report(program, types, constants, warps, stages, capability)
    print(kernel, dim, dtype.__name__, capability, found)
    assert found["shared"] <= SHARED[capability]
