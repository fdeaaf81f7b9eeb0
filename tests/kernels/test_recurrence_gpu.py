import functools

import h100
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrences
from recurrences import everything

from attn_kernels import gpu
from attn_kernels.recurrence import linear_attention
from attn_lab import ops

NEW = jax.version.__version_info__ >= (0, 11, 1)
needs_new_jax = pytest.mark.skipif(
    not NEW, reason=f"the kernel needs JAX 0.11.1, and so Python 3.12; this is {jax.__version__}"
)
ROUNDING = 2**-7  # of bfloat16, in which products are taken
inputs = functools.partial(recurrences.inputs, "additive")
check = functools.partial(recurrences.check, "mosaic_gpu", ROUNDING)
each_decay = pytest.mark.parametrize("decay", ["none", "head"])


@needs_new_jax
@each_decay
def test_error_budget(decay):
    """In interpret mode, on lengths that fill no chunk."""
    check(inputs(decay, 203))


@needs_new_jax
@pytest.mark.parametrize(
    "length, dim, width",
    [
        (70, 200, 40),
        *(
            pytest.param(length, *dims, marks=pytest.mark.slow)
            for dims in ((128, 128), (40, 200), (200, 40), (256, 136))
            for length in (1, 64, 70)
            if (length, *dims) != (70, 200, 40)
        ),
    ],
)
def test_error_budget_of_sizes(length, dim, width):
    check(inputs("head", length, dim, width))


@needs_new_jax
@pytest.mark.parametrize("decay", ["none", pytest.param("head", marks=pytest.mark.slow)])
def test_segments(decay):
    ids = jnp.asarray([[-1] * 2 + [3] * 9 + [1] + [2] * 70 + [-1] + [0] * 8])
    check(inputs(decay, ids.size), segment_ids=ids)


@pytest.mark.skipif(not gpu.available(), reason="there is no Hopper GPU")
@each_decay
@pytest.mark.parametrize("length, dim", [(4096, 64), (4096, 128), (1024, 256)])
def test_programs_that_fill_a_gpu(length, dim, decay):
    """Races would show: outputs and derivatives are right, and the same whenever they are run."""
    arrays = inputs(decay, length, dim, dim)
    arrays = {n: jnp.concatenate([x, x[:, ::-1]] * 32) for n, x in arrays.items()}
    run = jax.jit(functools.partial(everything, implementation="mosaic_gpu"))
    jax.tree.map(np.testing.assert_array_equal, run(arrays), run(arrays))
    check({n: x[:2] for n, x in arrays.items()}, form="chunk")


@needs_new_jax
def test_scale_has_a_derivative():
    arrays = inputs("head", 5)

    def loss(scale, **options):
        return linear_attention(**arrays, scale=scale, **options).astype(jnp.float32).sum()

    got, want = (
        jax.grad(functools.partial(loss, **options))(jnp.float32(0.3))
        for options in ({"implementation": "mosaic_gpu"}, {"form": "recurrent"})
    )
    np.testing.assert_allclose(got, want, rtol=4 * ROUNDING)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(beta=jnp.ones((1, 7, 2))), "delta rule"),
        (dict(log_decay=jnp.zeros((1, 7, 2, 40))), "decay per channel"),
        (dict(v=jnp.ones((1, 7, 2, 24))), "bfloat16"),
        (dict(chunk_size=32), "chunk_size"),
        (dict(form="parallel"), "form"),
    ],
    ids=["delta", "channel", "dtype", "chunk", "form"],
)
def test_refusals(change, match):
    call = {**inputs("head", 7), "implementation": "mosaic_gpu", **change}
    with pytest.raises(NotImplementedError, match=match if NEW or "form" in change else "JAX"):
        linear_attention(**call)


@needs_new_jax
@pytest.mark.parametrize(
    "dim, width",
    [(128, 128), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((64, 64), (256, 136)))],
)
def test_compiles_for_an_h100(monkeypatch, dim, width):
    """With its gradient; the compiler's report of registers and spills is printed."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    sharding = jax.sharding.SingleDeviceSharding(h100.device())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((2, 1003, *shape), dtype, sharding=sharding)

    arrays = dict(q=array(4, dim), k=array(2, dim), v=array(4, width))
    arrays["log_decay"] = array(4, dtype=jnp.float32)

    @jax.jit
    def gradient(arrays):
        def loss(arrays):
            call = functools.partial(linear_attention, implementation="mosaic_gpu")
            out, state = call(**arrays, return_state=True)
            return (out.astype(jnp.float32) ** 2).sum() + (state**2).sum()

        return jax.grad(loss)(arrays)

    gradient.trace(arrays).lower(lowering_platforms=("cuda",)).compile()


@needs_new_jax
def test_a_short_convolution_is_one_program_on_an_h100():
    """With the activation behind it, and holds nothing beside its input and output."""
    sharding = jax.sharding.SingleDeviceSharding(h100.device())
    x = jax.ShapeDtypeStruct((8, 4096, 1024), jnp.bfloat16, sharding=sharding)
    kernel = jax.ShapeDtypeStruct((4, 1024), jnp.float32, sharding=sharding)

    @jax.jit
    def convolved(x, kernel):
        return jax.nn.silu(ops.short_conv(x, kernel))

    program = convolved.trace(x, kernel).lower(lowering_platforms=("cuda",)).compile()
    assert program.memory_analysis().temp_size_in_bytes == 0
    entry = program.as_text().split("ENTRY")[1]
    assert entry.count(" fusion(") == 1 and "custom-call" not in entry
