"""One suite for every row of the catalogue."""

import dataclasses
import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from attn_kernels.attention import streaming
from attn_lab.catalogue import CATALOGUE, Mechanism, Sizes, find

OPERATORS = [row for row in CATALOGUE if row.family in ("attention", "recurrence", "convolution")]
KEY = jax.random.key(0)
VARIED = [row for row in OPERATORS if len(row.variants) > 1]
operators = pytest.mark.parametrize("row", OPERATORS, ids=lambda row: row.name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that the examples fill a grid of them."""
    monkeypatch.setattr(streaming, "BLOCK", 16)


def run(row: Mechanism, arrays, causal, variant):
    """Output and gradients of all arguments under a fixed cotangent, jitted."""

    def loss(arrays):
        out = row.call(arrays, causal=causal, **variant)
        ct = jax.random.normal(jax.random.key(1), out.shape)
        return jnp.sum(out.astype(jnp.float32) * ct), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {"out": out, **grads}


def example(row: Mechanism, sizes: Sizes):
    return row.example(sizes, KEY)


@pytest.mark.parametrize(
    "wide", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "float64"]
)
@pytest.mark.parametrize("stem", sorted({stem for row in CATALOGUE for stem in row.golden}))
def test_golden(stem, wide):
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
        golden.check(stem, wide)


@pytest.mark.parametrize("stem", sorted(path.stem for path in golden.FOLDER.glob("*.npz")))
def test_every_golden_file_is_used(stem):
    named = {stem for row in CATALOGUE for stem in row.golden}
    tests = [p for p in golden.FOLDER.parent.rglob("test_*.py") if p.name != Path(__file__).name]
    assert stem in named or any(f'"{stem}"' in path.read_text() for path in tests)


@pytest.mark.parametrize(
    ("causal", "dtype"),
    [(0, jnp.float32), (-1, jnp.bfloat16)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("row", VARIED, ids=lambda row: row.name)
def test_variants_stay_within_twice_the_error_of_the_definition(row, causal, dtype, small_tiles):
    """Against float64, output and all gradients, with grouped heads and a prime length."""
    sizes, causal = Sizes(B=1, T=37, S=53), row.causal[causal]
    arrays = {k: v.astype(dtype) for k, v in example(row, sizes).items()}
    with jax.enable_x64(True):
        wide = {k: v.astype(jnp.float64) for k, v in arrays.items()}
        truth = jax.tree.map(np.asarray, run(row, wide, causal, row.variants[0]))
    base = jax.tree.map(lambda x: np.asarray(x, float), run(row, arrays, causal, row.variants[0]))
    largest = max(np.abs(exact).max() for exact in truth.values())
    for variant in row.variants[1:]:
        got = run(row, arrays, causal, variant)
        for name, exact in truth.items():
            error = np.abs(np.asarray(got[name], float) - exact).max()
            size = np.abs(exact).max()
            if size < 1e-10 * largest:  # terms cancel in every row: what is left is their rounding
                size = largest * np.sqrt(sizes.T)
            unit = 4 * float(jnp.finfo(dtype).eps) * size
            allowed = 2 * np.abs(base[name] - exact).max() + unit
            assert error <= allowed, (variant, name, error, allowed)


@pytest.mark.parametrize("row", VARIED, ids=lambda row: row.name)
def test_derivatives_of_gradients_are_those_of_the_definition(row, small_tiles, x64):
    """Forward over reverse, along one direction of all arguments."""
    arrays = {n: x.astype(float) for n, x in example(row, Sizes(B=1, T=18, S=19)).items()}
    ways = jax.tree.map(jnp.cos, arrays)

    def curvature(variant):
        def slopes(arrays):
            return jax.grad(lambda x: jnp.sum(jnp.sin(row.call(x, **variant))))(arrays)

        return jax.jit(lambda: jax.jvp(slopes, (arrays,), (ways,))[1])()

    first, *others = map(curvature, row.variants)
    for other in others:
        for name, want in first.items():
            size = np.abs(want).max(initial=1.0)
            np.testing.assert_allclose(other[name], want, rtol=1e-6, atol=1e-7 * size, err_msg=name)


@operators
@pytest.mark.parametrize(
    ("causal", "sizes"),
    [
        (0, Sizes(B=1, T=1, S=1)),
        (-1, Sizes(B=3, T=13, S=7)),
        (0, Sizes(B=1, T=7, S=13, H=6, K=3, D=5, V=3)),
    ],
    ids=["one", "long_queries", "odd"],
)
def test_shapes_and_finite_gradients(row, causal, sizes):
    sizes, causal = row.fit(sizes), row.causal[causal]
    got = run(row, example(row, sizes), causal, {})
    flat = any(row.arguments.get(name, ("", ""))[1] == "BTD" for name in "xv")
    channels = (sizes.D,) if flat else (sizes.H, sizes.V)
    wanted = sizes.B, sizes.T, *channels
    assert got["out"].shape == wanted
    assert all(jnp.isfinite(x).all() for x in got.values())


@operators
def test_late_inputs_have_exactly_no_influence_on_early_outputs(row):
    if True not in row.causal:
        pytest.skip("not causal")
    sizes, cut = row.fit(Sizes(B=1, T=9, S=9, H=2, K=1, D=3, V=3)), 4
    arrays = example(row, sizes)
    in_sequence = [n for n, (_, axes) in row.arguments.items() if axes[1:2] in ("T", "S")]
    jacobian = jax.jit(jax.jacrev(lambda x: row.call(arrays | x, causal=True)[:, :cut]))(
        {n: arrays[n] for n in in_sequence}
    )
    out_rank = jax.eval_shape(lambda: row.call(arrays, causal=True)).ndim
    for name, slopes in jacobian.items():
        late = jnp.take(slopes, jnp.arange(cut, 9), axis=out_rank + 1)
        assert (late == 0).all(), name
        assert (slopes != 0).any(), name


def takes_mask(row):
    return row.family == "attention" and "mask" in inspect.signature(row.function).parameters


@pytest.mark.parametrize(
    "row", [row for row in OPERATORS if takes_mask(row)], ids=lambda row: row.name
)
def test_rows_without_a_key_are_zero_with_zero_gradients(row):
    if "mask" in row.settings:
        row = dataclasses.replace(row, settings={})
    sizes = row.fit(Sizes(B=1, T=5, S=5))
    arrays = {n: x for n, x in example(row, sizes).items() if not n.startswith("sink")}
    allowed = jnp.ones((5, 5), bool).at[jnp.array([1, 4])].set(False).at[3, 1:].set(False)
    for variant in row.variants:
        got = run(row, arrays, row.causal[0], {"mask": allowed, **variant})
        assert (got["out"][:, 1] == 0).all() and (got["out"][:, 4] == 0).all()
        assert (got["out"][:, 2] != 0).any()
        for name, x in got.items():
            assert jnp.isfinite(x).all(), name
            if name.startswith("q") or name == "gate":
                assert (x[:, 1] == 0).all(), name


@operators
def test_extreme_inputs_stay_finite(row):
    sizes = row.fit(Sizes(B=1, T=33, S=33))
    arrays = dict(example(row, sizes))
    for name in arrays:
        if name == "log_decay":
            pick = jax.random.randint(KEY, arrays[name].shape, 0, 5)
            arrays[name] = jnp.array([0.0, -1e-4, -1.0, -50.0, -1e4])[pick]
        elif name.startswith("q"):
            arrays[name] = 1e4 * arrays[name]
    for variant in row.variants:
        assert all(
            jnp.isfinite(x).all() for x in run(row, arrays, row.causal[-1], variant).values()
        )


@operators
def test_transformations(row):
    """vmap, grad of vmap and remat give what plain calls give, jitted all."""
    sizes = row.fit(Sizes(B=2, T=8, S=8))
    arrays = example(row, sizes)
    batched = {n for n, (_, axes) in row.arguments.items() if axes[0] == "B"}
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    axes = {n: 0 if n in batched else None for n in arrays}

    def one(arrays):
        return row.call({n: x[None] if n in batched else x for n, x in arrays.items()})[0]

    def out_and_slopes(call):
        def loss(arrays):
            out = call(arrays)
            return jnp.sum(jnp.sin(out)), out

        slopes, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        return out, slopes

    want = out_and_slopes(row.call)
    for other in (jax.vmap(one, (axes,)), jax.checkpoint(row.call)):
        jax.tree.map(close, out_and_slopes(other), want)


def check_sharded():
    """Every row by `shard_map` over eight devices, two along the batch and four along heads."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=kinds)
    for row in OPERATORS:
        sizes = row.fit(Sizes(B=2, T=8, S=8, H=8, K=4))
        arrays, names = example(row, sizes), {"B": "data"}
        if row.heads_apart:
            names |= {a: "heads" for a in "HK" if getattr(sizes, a) > 1}
        specs = {n: PartitionSpec(*map(names.get, axes)) for n, (_, axes) in row.arguments.items()}
        out_spec = PartitionSpec("data", None, names.get("H") if "q" in "".join(arrays) else None)
        sharded = jax.shard_map(row.call, mesh=mesh, in_specs=(specs,), out_specs=out_spec)
        got, want = jax.jit(sharded)(arrays), jax.jit(row.call)(arrays)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=row.name)


def test_eight_devices_along_batch_and_heads_agree_with_one():
    code = "jax.config.update('jax_num_cpu_devices', 8)"
    code = f"import jax; {code}; import test_conformance; test_conformance.check_sharded()"
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


@operators
def test_rows_have_costs_and_a_summary(row):
    sizes = row.fit(Sizes())
    assert row.flops(sizes) > 0 and row.bytes(sizes) > 0 and len(row.summary) > 20
    twice = dataclasses.replace(sizes, B=2 * sizes.B)
    assert row.flops(twice) == 2 * row.flops(sizes)


def test_names_are_unique_and_unknown_ones_are_refused():
    assert len({row.name for row in CATALOGUE}) == len(CATALOGUE)
    with pytest.raises(ValueError, match="'atention' is unknown; choose one of dot_product"):
        find("atention")
