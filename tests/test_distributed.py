"""Attention over devices by name, and a decoder on a mesh of eight, against one device."""

import os
import subprocess
import sys
from pathlib import Path

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attn_kernels.attention import entmax
from attn_kernels.parallel import sequence_parallel
from attn_lab import distributed, ops
from attn_lab.analysis import ring_load
from attn_lab.models import DecoderLM
from attn_lab.training import make_mesh, shard_batch

LAYOUTS = ("contiguous", "zigzag", "striped")
GOLDEN = (
    "merge_attention",
    "ring_attention--contiguous",
    "ring_attention--zigzag",
    "ring_attention--striped",
    "ring_load--contiguous",
    "ring_load--zigzag",
    "ring_load--striped",
    "tensor_parallel_attention",
)
MIXERS = {
    "attention": ("dot_product_attention", {"num_heads": 4, "num_kv_heads": 2}),
    "window": ("dot_product_attention", {"num_heads": 4, "window": 5}),
    "gated": ("gated_linear_attention", {"num_heads": 4}),
    "delta": ("gated_delta_rule", {"num_heads": 4}),
}


@pytest.mark.parametrize("stem", GOLDEN)
def test_golden(stem):
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        golden.check(stem, wide=True)


def arrays(heads=4, kv_heads=2, length=32):
    shapes = [(2, length, n, 8) for n in (heads, kv_heads, kv_heads)]
    return tuple(jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes))


def with_gradients(function, inputs):
    def loss(inputs):
        out = function(*inputs)
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(out)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)


def check_functions():
    """Inside a `shard_map` of all axes, as users call them."""
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = jax.make_mesh((2, 4), ("heads", "seq"), axis_types=(AxisType.Auto,) * 2)
    inputs, spec = arrays(), P(None, "seq", "heads")
    causal = ops.causal_mask()
    want = with_gradients(lambda q, k, v: ops.dot_product_attention(q, k, v, mask=causal), inputs)
    rows = causal.dense(32, 32)

    def sharded(function, *specs, out=spec):
        return jax.shard_map(function, mesh=mesh, in_specs=specs or (spec,) * 3, out_specs=out)

    def close(got, want, case):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=case),
            got,
            want,
        )

    for layout in LAYOUTS:
        order = ops.parallel.Layout(layout, 4, 8).permutation()
        for function in distributed.ring_attention, distributed.allgather_attention:

            def run(q, k, v, function=function, layout=layout, order=order):
                over = sharded(lambda *x: function(*x, axis_name="seq", layout=layout, causal=True))
                return over(*(x[:, order] for x in (q, k, v)))[:, order.argsort()]

            close(with_gradients(run, inputs), want, f"{function.__name__} {layout}")

    def whole(q, k, v):
        return ops.dot_product_attention(q, k, v, mask=causal)

    def exchanged(q, k, v):
        return distributed.all_to_all_attention(q, k, v, axis_name="seq", attention_fn=whole)

    everywhere = P(None, "seq")
    got = with_gradients(sharded(exchanged, *[everywhere] * 3, out=everywhere), inputs)
    close(got, want, "all_to_all_attention")

    def in_two_stages(q, k, v, mask):
        return distributed.ring_self_attention(q, k, v, axis_name="seq", mask=mask)

    stages = sharded(in_two_stages, spec, spec, spec, P("seq"))
    close(with_gradients(lambda *x: stages(*x, rows), inputs), want, "ring_self_attention")

    x = jax.random.normal(jax.random.key(0), (2, 9, 12))
    shapes = [(12, 4, 3)] * 3 + [(4, 3, 12)]
    # Scores in the tens would multiply the rounding that is compared.
    weights = [
        jax.random.normal(jax.random.key(n), shape) / 12**0.5 for n, shape in enumerate(shapes, 1)
    ]

    def one(*args):
        return ops.tensor_parallel_attention_reference(*args, num_shards=1, causal=True)

    def split(*args):
        return distributed.tensor_parallel_attention(*args, axis_name="seq", causal=True)

    specs = P(), *[P(None, "seq")] * 3, P("seq")
    got = with_gradients(sharded(split, *specs, out=P()), (x, *weights))
    close(got, with_gradients(one, (x, *weights)), "tensor_parallel_attention")


def check_models(modes=("ring",)):
    """Loss and gradients on a mesh of data 2 x tensor 2 x seq 2."""
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = make_mesh(data=2, tensor=2, seq=2)
    tokens = np.random.default_rng(0).integers(0, 32, (4, 33))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    columns = jax.sharding.NamedSharding(mesh, P(None, "tensor"))

    def place(x):
        return jax.device_put(x, columns) if x.ndim == 2 and x.shape[1] % 2 == 0 else x

    for name, (mixer, arguments) in MIXERS.items():
        model = DecoderLM(
            vocab_size=32,
            width=32,
            num_layers=1,
            mixers=mixer,
            mixer_args=arguments,
            max_len=32,
            rngs=nnx.Rngs(0),
        )
        graphdef, params = nnx.split(model)

        def loss(params, batch, graphdef=graphdef):
            logits, _ = nnx.merge(graphdef, params)(batch["tokens"])
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], 2)
            return -chosen.mean()

        want = jax.jit(jax.value_and_grad(loss))(params, batch)
        for mode in modes:

            def over(params, batch, mode=mode, loss=loss):
                with sequence_parallel(mesh, mode):
                    return jax.value_and_grad(loss)(params, batch)

            got = jax.jit(over)(jax.tree.map(place, params), shard_batch(batch, mesh))

            def close(a, b, case=f"{name} {mode}"):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6, err_msg=case)

            jax.tree.map(close, got, want)


def check_every_model():
    check_models(modes=("ring", "all_to_all", "allgather"))


@pytest.mark.parametrize(
    "check",
    [check_functions, check_models, pytest.param(check_every_model, marks=pytest.mark.slow)],
)
def test_eight_devices_agree_with_one(check):
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8); import test_distributed"
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", f"{code}; test_distributed.{check.__name__}()"]
    subprocess.run(command, check=True, env=env)


def test_joining_keys_of_any_partition_is_attention_over_all():
    q, k, v = arrays(length=9)
    parts = []
    for first, last in (0, 2), (2, 3), (3, 9):
        keys = slice(first, last)
        allowed = jnp.arange(9)[:, None] >= jnp.arange(first, last)
        mask = ops.masks.as_mask(allowed, False)
        part = ops.parallel.engine.attention(
            q, k[:, keys], v[:, keys], mask=mask, return_stats=True
        )
        parts.append(part)
    out, lse = ops.merge_attention(*(jnp.stack(x) for x in zip(*parts)))
    want = ops.parallel.engine.attention(q, k, v, mask=ops.causal_mask(), return_stats=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (out, lse), want
    )


def test_joining_nothing_is_nothing_with_finite_gradients():
    empty = jnp.zeros((2, 1, 3, 1, 4)), jnp.full((2, 1, 3, 1), -jnp.inf)
    out, lse = ops.merge_attention(*empty)
    assert (out == 0).all() and (lse == -jnp.inf).all()
    slopes = jax.grad(lambda *x: ops.merge_attention(*x)[0].sum(), (0, 1))(*empty)
    assert all(jnp.isfinite(x).all() for x in slopes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ring_loads_count_every_causal_pair_once(layout):
    load = ring_load(4, 24, layout)
    assert load.sum() == 24 * 25 // 2
    if layout == "zigzag":
        assert len(set(load.sum(1))) == 1 and all(len(set(step)) == 1 for step in load[:, 1:].T)
    if layout == "contiguous":
        assert [int((row == 36).sum()) for row in load] == [0, 1, 2, 3]


def test_what_does_not_fit_is_refused():
    q, k, v = arrays(length=10)
    with pytest.raises(ValueError, match="num_shards must divide the length 10, got 4"):
        ops.ring_attention_reference(q, k, v, num_shards=4)
    with pytest.raises(ValueError, match="even length a device"):
        ops.ring_attention_reference(q, k, v, num_shards=2, layout="zigzag")
    with pytest.raises(NotImplementedError, match="several passes"):
        distributed.ring_attention(q, k, v, axis_name="seq", normalizer=entmax(1.5))
    with pytest.raises(ValueError, match="layout must be one of"):
        ring_load(2, 8, "spiral")
    with pytest.raises(ValueError, match=r"multiple of 2 \* 3"):
        ring_load(3, 8, "zigzag")
