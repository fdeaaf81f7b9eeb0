import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrences
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from attn_kernels import tpu
from attn_kernels.parallel import sequence_parallel
from attn_kernels.recurrence import linear_attention
from attn_lab.catalogue import CATALOGUE, Sizes

KINDS = [(decay, write) for decay in (None, "scalar", "channel") for write in ("add", "delta")]
GATES = -np.inf, -1e4, -50, -1e-4, 0
KERNEL = dict(implementation="mosaic_tpu", chunk_size=16)


def inputs(decay, write, length, dtype=jnp.float32):
    """Grouped heads, keys of norm 1 and, where there are gates, mixtures of all of them."""
    rng = np.random.default_rng(length)

    def normal(heads, dim):
        return jnp.asarray(rng.normal(size=(1, length, heads, dim)), dtype)

    k = normal(1, 5)
    arrays = dict(q=normal(2, 5), k=k / jnp.linalg.norm(k, axis=-1, keepdims=True), v=normal(2, 3))
    arrays["initial_state"] = jnp.asarray(rng.normal(size=(1, 2, 5, 3)), jnp.float32)
    if decay:
        shape = (1, length, 2, 5) if decay == "channel" else (1, length, 2)
        gates = rng.choice(GATES, shape, p=(0.05, 0.05, 0.05, 0.5, 0.35))
        arrays["log_decay"] = jnp.asarray(gates, jnp.float32)
    if write == "delta":
        arrays["beta"] = jnp.asarray(rng.uniform(size=(1, length, 2)), dtype)
    return arrays


def check(arrays, rounding, **options):
    recurrences.check("mosaic_tpu", rounding, arrays, chunk_size=16, **options)


@pytest.mark.parametrize("decay, write", [("scalar", "delta"), ("channel", "add")])
def test_error_budget(decay, write):
    check(inputs(decay, write, 37), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, rounding", [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("length", [1, 7, 37])
@pytest.mark.parametrize("decay, write", KINDS)
def test_error_budget_of_all_kinds(decay, write, length, dtype, rounding):
    check(inputs(decay, write, length, dtype), rounding)


@pytest.mark.slow
@pytest.mark.parametrize("decay, write", KINDS)
def test_segments(decay, write):
    ids = jnp.asarray([[-1] * 2 + [3] * 9 + [1] * 1 + [2] * 16 + [-1] * 1 + [0] * 8])
    check(inputs(decay, write, 37), 2e-6, segment_ids=ids)


def test_gradients_inside_a_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = inputs("scalar", "delta", 37)

    def everywhere(arrays, **options):
        def call(arrays):
            return linear_attention(**arrays, return_state=True, **options)

        sharded = jax.shard_map(call, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        return sum(jnp.sin(x).sum() for x in sharded(arrays))

    got, want = (
        jax.jit(jax.grad(functools.partial(everywhere, **options)))(arrays)
        for options in (KERNEL, {"form": "recurrent"})
    )
    for name in arrays:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)


PARALLEL = {"form": "parallel"}
ROWS = [row for row in CATALOGUE if PARALLEL in map(dict, row.variants)]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_mechanisms_of_the_catalogue(row, monkeypatch):
    """Output and gradients within twice the error of the recurrence, where the kernel serves."""
    arrays = row.example(row.fit(Sizes(B=1, T=70, S=70)), jax.random.key(0))

    def run(arrays, **options):
        def loss(arrays):
            out = row.call(arrays, causal=row.causal[-1], **options)
            weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
            return (out * weights).sum(), out

        slopes, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        return {"out": out, **slopes}

    base = run(arrays, form="recurrent")
    with jax.enable_x64(True):
        exact = run({n: x.astype(jnp.float64) for n, x in arrays.items()}, form="recurrent")
    monkeypatch.setattr(tpu, "available", lambda: True)
    call = functools.partial(row.call, causal=row.causal[-1], form="chunk")
    assert "pallas_call" in str(jax.make_jaxpr(call)(arrays))
    got = run(arrays, form="chunk")
    for name, c in exact.items():
        a, b, c = (np.asarray(x, np.float64) for x in (got[name], base[name], c))
        bound = 2 * np.abs(b - c).max() + 2e-6 * np.abs(c).max()
        assert np.abs(a - c).max() <= bound, name


@pytest.mark.slow
def test_devices_of_a_mesh_run_it_on_their_own_rows_and_heads(monkeypatch):
    """Of a mesh of data, tensor and sequence axes, in programs for TPUs."""
    pytest.importorskip("libtpu", reason="there is no libtpu wheel for this platform")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    for sizes in (4, 2, 1), (2, 2, 2):
        mesh = jax.make_mesh(
            sizes,
            ("data", "tensor", "seq"),
            devices=devices,
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
        )
        sharding = jax.sharding.NamedSharding(mesh, P("data", "seq", "tensor"))
        x = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16, sharding=sharding)
        decay = jax.ShapeDtypeStruct((4, 256, 4), jnp.float32, sharding=sharding)

        def loss(q, k, v, log_decay, mesh=mesh):
            with sequence_parallel(mesh):
                return linear_attention(q, k, v, log_decay=log_decay).astype(jnp.float32).sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, decay).compile()
        assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(chunk_size=24), "power of two"),
        (dict(form="parallel"), "form"),
        (dict(v=jnp.ones((1, 7, 2, 257)), initial_state=None), "at most 256"),
    ],
)
def test_refusals(change, match):
    call = {**inputs(None, "add", 7), **KERNEL, **change}
    with pytest.raises(NotImplementedError, match=match):
        linear_attention(**call)


def temporaries(topology, decay, write, dim, length, dtype):
    """Bytes a head that the gradient takes on a TPU."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    heads = 2
    steps = 1, length, heads
    arrays = dict(q=array(*steps, dim), k=array(*steps, dim), v=array(*steps, 128))
    if decay:
        shape = (*steps, dim) if decay == "channel" else steps
        arrays["log_decay"] = array(*shape, dtype=jnp.float32)
    if write == "delta":
        arrays["beta"] = array(*steps)

    @jax.jit
    def gradient(arrays):
        def loss(arrays):
            out, state = linear_attention(**arrays, return_state=True, implementation="mosaic_tpu")
            return (out.astype(jnp.float32) ** 2).sum() + (state**2).sum()

        return jax.grad(loss)(arrays)

    compiled = gradient.lower(arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes / heads


TPUS = "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"
CONFIGURATIONS = [(*kind, dim, jnp.bfloat16) for kind in KINDS for dim in (64, 128)]
CONFIGURATIONS.append(("channel", "delta", 128, jnp.float32))
ALL = [(tpu, *configuration) for tpu in TPUS for configuration in CONFIGURATIONS]
CASES = [ALL[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL[1:])]


@pytest.mark.parametrize("topology, decay, write, dim, dtype", CASES)
def test_compiles_for_tpus_in_memory_linear_in_length(
    monkeypatch, topology, decay, write, dim, dtype
):
    pytest.importorskip("libtpu", reason="there is no libtpu wheel for this platform")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may compile as well
    short, long = 16384, 32768
    sizes = [temporaries(topology, decay, write, dim, length, dtype) for length in (short, long)]
    growth = (sizes[1] - sizes[0]) / (long - short)
    states = 4 * dim * 128  # bytes of the state of one step
    assert 0 < growth < states / 4
    assert sizes[1] / long < states / 4
