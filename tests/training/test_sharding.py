import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attn_lab.data import Rows
from attn_lab.training import FSDP, make_mesh, shard_batch, state_sharding
from attn_lab.training.sharding import rows_here, shard_largest

EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from tests.training.tiny import Tiny, loss_fn, make_batch
from attn_lab.training import *

assert jax.device_count() == 8
optimizer = make_optimizer(5, learning_rate=1e-2, weight_decay=0.1, clip=1.0)
batches = [make_batch(i, size=16) for i in range(3)]

def train(mesh, rules, accumulate=1):
    graphdef, state = create_state(Tiny(nnx.Rngs(0), dropout=0.2, batch_norm=True), optimizer)
    shardings = state_sharding(state, mesh, rules)
    state = jax.device_put(state, shardings)
    step = make_train_step(
        graphdef, loss_fn, optimizer, shardings=shardings, accumulate=accumulate
    )
    for batch in batches:
        state, metrics = step(state, shard_batch(batch, mesh))
    model = nnx.merge(graphdef, state.params, state.other)
    valid = evaluate(model, [shard_batch(batch, mesh) for batch in batches], loss_fn)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or 1 / 0, state, shardings)
    return jax.device_get((state, metrics, valid)), state

tensor = (("up/kernel", P(None, "tensor")), ("down/kernel", P("tensor", "fsdp")), *FSDP)
for accumulate in (1, 2):
    one, _ = train(make_mesh(devices=jax.devices()[:1]), (), accumulate)
    for sizes, rules in (
        (dict(), ()),
        (dict(data=2, fsdp=-1), FSDP),
        (dict(data=1, fsdp=2, tensor=4), tensor),
    ):
        many, state = train(make_mesh(**sizes), rules, accumulate)
        close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, one, many)
kernel = state.params["up"]["kernel"]
assert kernel.sharding.spec == P(None, "tensor")
assert kernel.addressable_shards[0].data.shape == (4, 4)
mu = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
      if "mu" in jax.tree_util.keystr(path) and leaf.shape == (4, 16)]
assert [leaf.sharding.spec for leaf in mu] == [P(None, "tensor")]
try:
    shard_batch(make_batch(0, size=12), make_mesh())
except ValueError as error:
    assert "batch label of shape (12,)" in str(error), error
else:
    raise AssertionError
"""


def test_eight_devices_make_the_same_update_as_one():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=env, check=True)


DECODER = """
import re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from attn_kernels import parallel
from attn_lab.models import DecoderLM
from attn_lab.training import *

jax.config.update("jax_default_matmul_precision", "highest")
tokens = np.asarray(jax.random.randint(jax.random.key(0), (8, 33), 0, 96))
batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
optimizer = Optimizer(*optax.sgd(1.0), lambda step: 1.0)

seen = []

def loss_fn(model, batch, rngs):
    seen.append(parallel.current())
    return cross_entropy(model(batch["inputs"], rngs=rngs)[0], batch["targets"])

def train(mixer, arguments, mesh, rules, order="contiguous", **options):
    settings = dict(vocab_size=96, width=32, num_layers=1, max_len=32, mlp="swiglu") | options
    model = DecoderLM(
        mixers=mixer, mixer_args={"num_heads": 4} | arguments, init_std=0.2, rngs=nnx.Rngs(0),
        **settings,
    )
    graphdef, state = create_state(model, optimizer)
    shardings = state_sharding(state, mesh, rules)
    state, placed = jax.device_put(state, shardings), shard_batch(batch, mesh)
    step = make_train_step(
        graphdef, on_mesh(loss_fn, mesh, rules, order=order), optimizer, shardings=shardings
    ).lower(state, placed).compile()
    state, metrics = step(state, placed)
    return jax.device_get((state.params, metrics)), state.params, step.as_text()

cases = eval(sys.argv[1])
for mixer, arguments, sizes, options in cases:
    one, _, _ = train(mixer, arguments, make_mesh(devices=jax.devices()[:1]), (), **options)
    many, params, hlo = train(mixer, arguments, make_mesh(**sizes), PARALLEL, **options)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), one, many)
    up = params["blocks"][0]["mlp"]["up"]["kernel"]
    shared = sizes.get("fsdp", 1) * sizes.get("seq", 1)
    split = 32 // shared, 128 // sizes.get("tensor", 1)
    assert up.addressable_shards[0].data.shape == split, up.sharding
    gathers = [line for line in hlo.splitlines() if " all-gather(" in line]
    whole = [line for line in gathers if re.search(r"= f32\\[[0-9]+,[0-9]+,96\\]", line)]
    assert not whole, whole  # logits stay where their words are
    if "seq" in sizes:
        assert seen[-1].order == options.get("order", "contiguous")
"""
MIXED = (
    dict(data=2, fsdp=2, tensor=2),
    dict(data=2, tensor=2, seq=2),
    dict(data=1, fsdp=2, tensor=2, seq=2),
)
SCANNED = {"num_layers": 2, "scan": True, "remat": True}
FEW = [
    ("dot_product_attention", {}, MIXED[2], SCANNED | {"order": "zigzag"}),
    ("gated_delta_rule", {"head_dim": 8}, MIXED[1], {}),
]
EACH = (
    dict(data=8),
    dict(data=1, fsdp=8),
    dict(data=2, tensor=4),
    dict(data=2, seq=4),
)
MIXERS = (
    ("dot_product_attention", {}),
    ("dot_product_attention", {"window": 5}),
    ("neighborhood_attention", {"window": 4, "dilation": 2}),
    ("gated_linear_attention", {}),
    ("gated_delta_rule", {"head_dim": 8}),
)
ALL = [(*mixer, sizes, {}) for mixer in MIXERS for sizes in (*EACH, *MIXED)]
ALL += [(*mixer, MIXED[2], SCANNED) for mixer in MIXERS]
ALL += [(*MIXERS[0], dict(data=2, seq=4), {"order": order}) for order in ("zigzag", "striped")]


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=len)
def test_decoders_on_every_mesh_have_the_loss_and_gradients_of_one_device(cases):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", DECODER, repr(cases)], env=env, check=True)


def test_mesh_sizes():
    mesh = make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor", "seq")
    assert mesh.size == jax.device_count() == mesh.shape["data"]
    for sizes in ({"data": 3, "fsdp": 5}, {"data": -1, "seq": -1}, {"data": 0}, {"tensor": 7919}):
        with pytest.raises(ValueError, match="mesh sizes must multiply"):
            make_mesh(**sizes)


def test_the_first_rule_that_is_found_in_the_path_counts():
    state = {"a": {"kernel": np.zeros((2, 4)), "scale": np.zeros(())}, "b": np.zeros(3)}
    rules = (("a/ker", P("fsdp", "tensor")), ("a", P("data")), ("nothing", P("seq")))
    shardings = state_sharding(state, make_mesh(), rules)
    assert shardings["a"]["kernel"].spec == P("fsdp", "tensor")
    assert shardings["a"]["scale"].spec == shardings["b"].spec == P()


def test_a_rule_that_does_not_fit_names_the_array():
    with pytest.raises(ValueError, match=r"does not fit a/b of shape \(3,\)"):
        state_sharding({"a": {"b": np.zeros(3)}}, make_mesh(), (("b", P("fsdp", "tensor")),))
    with pytest.raises(ValueError, match="does not fit b"):
        state_sharding({"b": np.zeros(3)}, make_mesh(), (("b", P("model")),))


def test_fsdp_splits_the_largest_axis_that_divides():
    class Mesh:
        def __init__(self, size):
            self.shape = {"fsdp": size}

    assert shard_largest((6, 9, 4), Mesh(3)) == P(None, "fsdp")
    assert shard_largest((6, 9, 4), Mesh(2)) == P("fsdp")
    assert shard_largest((6, 9), Mesh(4)) == P()
    assert state_sharding({"w": np.zeros((4, 8))}, make_mesh(), FSDP)["w"].spec == P(None, "fsdp")


def test_a_batch_is_split_along_its_first_axes():
    batch = {"image": np.zeros((8, 4, 4, 1)), "label": np.arange(8)}
    placed = shard_batch(batch, make_mesh())
    assert placed["image"].sharding.spec == P(("data", "fsdp"), "seq")
    assert placed["label"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(placed["label"], batch["label"])


def test_rows_are_placed_like_a_batch_that_holds_them():
    whole = {"image": np.arange(96).reshape(8, 4, 3), "label": np.arange(8)}
    mesh = make_mesh()
    placed = shard_batch(Rows(8, lambda rows: {k: x[rows] for k, x in whole.items()}), mesh)
    assert rows_here(8, mesh).tolist() == list(range(8))
    for name, array in shard_batch(whole, mesh).items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding == array.sharding


HOST = """
import sys
import jax, numpy as np

address, number = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(address, 2, number)
from attn_lab.data import Rows
from attn_lab.training import make_mesh, shard_batch

whole = {"inputs": np.arange(16 * 4).reshape(16, 4), "label": np.arange(16)}
asked = []

def make(rows):
    asked.append(rows.tolist())
    return {name: array[rows] for name, array in whole.items()}

# Hosts have half of the rows each; two rows in four, as their devices are side by side along "seq";
# and all rows where they share the sequences alone.
devices = jax.devices()
mixed = np.array(devices).reshape(2, 2, 2).swapaxes(0, 1).ravel().tolist()
half = list(range(8 * number, 8 * number + 8))
quarters = [n for n in range(16) if n // 4 % 2 == number]
for sizes, order, rows in (
    (dict(data=4, fsdp=2), devices, half),
    (dict(data=4, seq=2), mixed, quarters),
    (dict(data=2, tensor=2, seq=2), devices, half),
    (dict(data=1, seq=8), devices, list(range(16))),
):
    if sizes.get("seq") == 8:
        whole["inputs"] = np.arange(16 * 8).reshape(16, 8)
    placed = shard_batch(Rows(16, make), make_mesh(**sizes, devices=order))
    assert asked.pop() == rows, (sizes, rows)
    for name, array in placed.items():
        assert array.shape == whole[name].shape
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[name][shard.index])
"""


def test_a_host_makes_the_rows_that_its_devices_hold():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(number)], stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    for host in hosts:
        _, errors = host.communicate(timeout=200)
        assert host.returncode == 0, errors
