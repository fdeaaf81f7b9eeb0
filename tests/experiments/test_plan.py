import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import plan as module
from experiments.configs.plan import get_config

PROGRAM = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.experiments.test_plan import tiny
from experiments.plan import plan
modes = {"data": {}, "fsdp": {"data": 1, "fsdp": 4}, "tensor": {"data": 1, "tensor": 4}}
modes["ring"] = {"data": 1, "seq": 4}
print(json.dumps({name: plan(tiny(**mesh), "h100:4") for name, mesh in modes.items()}))
"""
LAYERS, WIDTH, LENGTH, BATCH = 2, 32, 64, 4


def tiny(**mesh):
    config = get_config("124m-softmax-2k")
    config.update(vocab_size=64, length=LENGTH, batch_size=BATCH, dtype="float32")
    config.model.update(num_layers=LAYERS, width=WIDTH, mlp_ratio=2.0, remat=False, tied=False)
    config.model.mixer_args.num_heads = 4
    config.mesh.update({"data": 4, "fsdp": 1, "tensor": 1, "seq": 1} | mesh)
    return config


@pytest.fixture(scope="module")
def plans():
    """Plans of every mode on 4 CPU devices, which need a process of their own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def payload(result, kind, axis):
    return sum(
        each["payload"]
        for name, each in result["collectives"].items()
        if name.split(" ")[0] == kind and axis in name.split(" ")[1].split("+")
    )


def test_data_parallel_all_reduces_the_gradient(plans):
    number = 4 * plans["data"]["number_of_parameters"]
    assert number <= payload(plans["data"], "all-reduce", "data") <= number + 64


def test_fsdp_gathers_every_parameter(plans):
    number = 4 * plans["fsdp"]["number_of_parameters"]
    assert payload(plans["fsdp"], "all-gather", "fsdp") == number
    # CPU reduces whole gradients where a TPU may scatter them.
    assert number <= payload(plans["fsdp"], "all-reduce", "fsdp") <= 1.01 * number


def test_tensor_parallel_all_reduces_the_stream(plans):
    stream = 4 * BATCH * LENGTH * WIDTH
    # Two forward; backward one for each of q, k, v, up and gate; the embedding and the head.
    reduced = payload(plans["tensor"], "all-reduce", "tensor")
    assert (7 * LAYERS + 2) * stream <= reduced <= (7 * LAYERS + 2.2) * stream


def test_ring_sends_keys_and_values_around(plans):
    part = 4 * BATCH * LENGTH // 4 * WIDTH
    sent = payload(plans["ring"], "collective-permute", "seq")
    # Keys and values take 3 steps, in both passes; their derivatives 4, to arrive at home.
    assert sent == LAYERS * 2 * (3 + 3 + 4) * part


def test_state_is_split_and_fits(plans):
    whole, split = plans["data"], plans["fsdp"]
    assert whole["bytes"]["parameters"] == 4 * whole["number_of_parameters"]
    assert split["bytes"]["parameters"] < 0.3 * whole["bytes"]["parameters"]
    assert all(each["fits"] for each in plans.values())


def test_loops_and_groups_are_counted():
    hlo = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(5)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %g = bf16[16]{0} all-gather(%y), replica_groups={{0,1},{2,3}}, dimensions={0}
}
"""

    class Four:
        axis_names = "data", "seq"
        devices = np.zeros((2, 2))

    assert module.collectives(hlo, Four) == {
        "all-gather seq": {"count": 1, "payload": 32, "sent": 16},
        "all-reduce data": {"count": 5, "payload": 160, "sent": 160},
    }


def test_products_in_loops_are_counted():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    jaxpr = jax.make_jaxpr(f)(np.ones((2, 3)), np.ones((5, 3, 3)))
    assert module.product_flops(jaxpr) == 5 * 2 * 2 * 3 * 3


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="topology must start with one of v4, v5e"):
        module.devices_of("v9:2x2")
    with pytest.raises(ValueError, match="mixer of the preset must be of softmax"):
        get_config("7b-lstm-2k")


@pytest.mark.slow
def test_a_tpu_topology_is_compiled_for():
    pytest.importorskip("libtpu", reason="there is no libtpu wheel here")
    result = module.plan(tiny(), "v5e:2x2")
    assert result["fits"] and result["devices"] == 4
    assert payload(result, "all-reduce", "data") >= 4 * result["number_of_parameters"]
