import functools

import calls
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import CASES, HEADS, cases, causal, inputs
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from attn_kernels.attention import ScoreMod, attention, mosaic_tpu
from attn_kernels.parallel import sequence_parallel
from attn_lab import ops
from attn_lab.catalogue import CATALOGUE, Sizes

KERNEL = {"implementation": "mosaic_tpu"}
check = functools.partial(calls.check, "mosaic_tpu")


@pytest.fixture
def small_blocks(monkeypatch):
    """Tiles so small that the examples fill a grid of them."""
    monkeypatch.setattr(mosaic_tpu, "BLOCK", 128)


QUICK = "capped_slopes", "rows_and_columns"


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_error_budget(name, small_blocks):
    q_len, k_len = (192, 192) if name == "segments" else (130, 200)
    check(cases(q_len, k_len)[name], inputs(q_len, k_len), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [(1, 1), (131, 7)], ids=str)
def test_error_budget_in_bfloat16_of_odd_lengths(name, lengths, small_blocks):
    check(cases(*lengths)[name], inputs(*lengths, jnp.bfloat16), 2**-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "bias"])
def test_kernels_run_in_the_interpreter_of_tpus(name, small_blocks):
    with pltpu.force_tpu_interpret_mode():
        check(cases(130, 200)[name], inputs(130, 200), 2e-6)


STREAMED = {"implementation": "xla"}
ROWS = [row for row in CATALOGUE if STREAMED in map(dict, row.variants)]
NOT_SERVED = {
    "topk_attention": "_Largest",
    "straight_through_hard_attention": "best_key",
    "compositional_attention": "inner products",
    "mlp_score_attention": "inner products",
    "neighborhood_attention_relative_bias": "inner products",
    "local_linear_attention": "forward mode",
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_mechanisms_of_the_catalogue(row):
    """Output and gradients of every one within twice the error of its definition, or a reason."""
    check = functools.partial(
        calls.check_mechanism, "mosaic_tpu", row, Sizes(B=1, T=37, S=53), jnp.float32, 5e-7
    )
    if row.name not in NOT_SERVED:
        return check()
    with pytest.raises(NotImplementedError, match=NOT_SERVED[row.name]):
        check()


def test_transformations(small_blocks):
    """vmap over segments, of gradients, and remat."""
    q, _, _ = inputs(130, 130)
    q = jnp.stack([q, q + 1])
    ids = jnp.arange(130) // jnp.asarray([[30], [60]])

    def loss(q, ids, implementation):
        mask = ops.segment_mask(ids[None])
        return jnp.sin(attention(q, q, q, mask=mask, implementation=implementation)).sum()

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(implementation):
        one = jax.checkpoint(functools.partial(loss, implementation=implementation))
        return jax.vmap(jax.grad(one))(q, ids)

    np.testing.assert_allclose(slopes("mosaic_tpu"), slopes("xla"), rtol=1e-4, atol=1e-5)


def test_gradients_inside_a_shard_map(small_blocks):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = inputs(130, 130)

    def loss(q, k, v, implementation):
        options = {"mask": causal, "implementation": implementation}
        call = functools.partial(attention, **options)
        # Keys and values are shared by the devices, and gather their gradients.
        specs = {"in_specs": (P("data"), P(), P()), "out_specs": P("data")}
        return jnp.sin(jax.shard_map(call, mesh=mesh, **specs)(q, k, v)).sum()

    slopes = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    for got, want in zip(slopes(*arrays, "mosaic_tpu"), slopes(*arrays, "xla")):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def lgamma(score, b, h, q, k):
    return jax.lax.lgamma(score)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"dtype": jnp.float16}, "q is float16"),
        ({"score_mod": ScoreMod(lgamma)}, "lgamma"),
        ({"dim": 520}, "at most 512"),
        ({"k_len": 2**27}, "lists of tiles"),
    ],
    ids=["float16", "lgamma", "wide", "long"],
)
def test_refusals(change, match):
    sizes = {"k_len": 5, "dtype": jnp.float32, "dim": 8} | change
    score_mod = sizes.pop("score_mod", None)
    shapes = jax.eval_shape(lambda: inputs(3, 5, sizes["dtype"], sizes["dim"]))
    q, k, v = (
        jax.ShapeDtypeStruct((x.shape[0], sizes["k_len"], *x.shape[2:]), x.dtype) if n else x
        for n, x in enumerate(shapes)
    )
    call = functools.partial(attention, score_mod=score_mod)
    with pytest.raises(NotImplementedError, match=match):
        jax.eval_shape(functools.partial(call, **KERNEL), q, k, v)


def test_none_is_the_kernel_on_a_tpu_where_it_serves(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arrays = inputs(3, 5)

    def kernels(**options):
        jaxpr = jax.make_jaxpr(functools.partial(attention, **options))(*arrays)
        return str(jaxpr).count("pallas_call")

    assert kernels() == 1
    assert kernels(implementation="xla") == kernels(score_mod=ScoreMod(lgamma)) == 0
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert kernels() == 0


def gradient(case, tpu, length, dim, dtype):
    """The compiled program of output and all gradients for a TPU."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=tpu).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    leaves, treedef = jax.tree.flatten(case)
    floats = [n for n, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(q, k, v, moving, fixed):
        given = [moving.get(n, fixed.get(n)) for n in range(len(leaves))]
        out = attention(q, k, v, **treedef.unflatten(given), **KERNEL)
        return (out.astype(jnp.float32) ** 2).sum()

    def described(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arrays = [
        jax.ShapeDtypeStruct((1, length, HEADS, dim), dtype, sharding=sharding) for _ in range(3)
    ]
    moving = {n: described(leaves[n]) for n in floats}
    fixed = {n: described(x) for n, x in enumerate(leaves) if n not in floats}
    return jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arrays, moving, fixed).compile()


@pytest.fixture
def compiles_for_tpu(monkeypatch):
    pytest.importorskip("libtpu", reason="there is no libtpu wheel for this platform")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may compile as well


TPUS = "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"
CONFIGURATIONS = [(name, 128, jnp.bfloat16) for name in CASES]
CONFIGURATIONS += [("capped_slopes", 64, jnp.bfloat16), ("capped_slopes", 256, jnp.float32)]
CONFIGURATIONS += [("causal", 512, jnp.bfloat16)]
ALL = [(tpu, *each) for tpu in TPUS for each in CONFIGURATIONS]
FIRST = ALL[2]


@pytest.mark.parametrize(
    "tpu, name, dim, dtype",
    [FIRST, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL if each != FIRST)],
)
def test_compiles_for_tpus(compiles_for_tpu, tpu, name, dim, dtype):
    gradient(cases(1024, 1024)[name], tpu, 1024, dim, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("name", ["causal", "capped_slopes", "sink"])
def test_temporaries_are_no_more_than_some_arrays_like_q(compiles_for_tpu, tpu, name):
    length = 2**17  # shorter arrays fit into VMEM and do not count
    case = cases(length, length, dense=False)[name]
    program = gradient(case, tpu, length, 128, jnp.bfloat16)
    assert program.memory_analysis().temp_size_in_bytes < length * HEADS * (7 * 2 * 128 + 8 * 4)


@pytest.mark.slow
def test_devices_of_a_mesh_run_it_on_their_own_rows_and_heads(compiles_for_tpu):
    """Of a mesh of data, tensor and sequence axes, in programs for TPUs."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    for sizes, mode in (((4, 2, 1), "ring"), ((2, 2, 2), "all_to_all")):
        mesh = jax.make_mesh(
            sizes,
            ("data", "tensor", "seq"),
            devices=devices,
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
        )
        sharding = jax.sharding.NamedSharding(mesh, P("data", "seq", "tensor"))
        x = jax.ShapeDtypeStruct((4, 2048, 4, 64), jnp.bfloat16, sharding=sharding)

        def loss(q, k, v, mesh=mesh, mode=mode):
            with sequence_parallel(mesh, mode):
                return attention(q, k, v, mask=causal).astype(jnp.float32).sum()

        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x)
        assert lowered.compile().as_text().count('custom_call_target="tpu_custom_call"') == 3
