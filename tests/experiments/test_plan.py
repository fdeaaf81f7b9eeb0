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

    assert module.collectives(hlo, Four) == {
        "all-gather seq": {"count": 1, "payload": 32, "sent": 16},
        "all-reduce data": {"count": 5, "payload": 160, "sent": 160},
    }


class Four:
    """A mesh of 2 x 2."""

    axis_names = "data", "seq"
    devices = np.zeros((2, 2))


@pytest.mark.parametrize(
    "line, expected",
    [
        # One array that is gathered while others compute, and two at once.
        (
            "(f32[4]{0}, f32[8]{0:T(8,128)(2,1)}) all-gather-start(%x), "
            "replica_groups={{0,1},{2,3}}",
            ("all-gather seq", 1, 32, 16),
        ),
        (
            "((f32[4]{0}, f32[6]), (f32[8]{0}, f32[12])) all-gather-start(%x, %y), "
            "replica_groups={{0,1},{2,3}}",
            ("all-gather seq", 1, 80, 40),
        ),
        (
            "(f32[4], f32[4], u32[]{:S(2)}, u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,2},{1,3}}",
            ("collective-permute data", 1, 16, 16),
        ),
        (
            "((f32[8]), f32[4]) reduce-scatter-start(%x), replica_groups=[2,2]<=[4]",
            ("reduce-scatter seq", 1, 32, 16),
        ),
        ("f32[4] reduce-scatter(%x), replica_groups=[2,2]<=[4]", ("reduce-scatter seq", 1, 32, 16)),
        (
            "(f32[8], s32[2]) all-reduce-start(%x, %y), replica_groups=[2,2]<=[2,2]T(1,0)",
            ("all-reduce data", 1, 40, 40),
        ),
        # Axes of a mesh, which may be factors of another's, and whose devices have another order.
        (
            "f32[8] all-to-all(%x), replica_groups=mesh['a'=2,'b'=1,'c'=2] {'c'}, dimensions={0}",
            ("all-to-all seq", 1, 32, 16),
        ),
        (
            "f32[8] all-to-all(%x), replica_groups=mesh['a'=2,'c'=2], device_ids=([2,2]T(1,0)) "
            "{'c'}, dimensions={0}",
            ("all-to-all data", 1, 32, 16),
        ),
        (
            "f32[8] all-to-all(%x), replica_groups=mesh['a'=4] {'a':(1)2}, dimensions={0}",
            ("all-to-all data", 1, 32, 16),
        ),
        (
            "f32[8] all-gather(%x), replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}",
            ("all-gather data+seq", 1, 32, 24),
        ),
        ("f32[8] all-reduce(%x), replica_groups={}", ("all-reduce data+seq", 1, 32, 48)),
        # Called computations: a TPU's reduction to parts, and one that is started and then awaited.
        (
            "f32[4] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1",
            ("reduce-scatter data+seq", 1, 32, 24),
        ),
        (
            "((f32[4]), f32[8], u32[]) async-start(%x), calls=%wrapped\n"
            "  %d = f32[8] async-done(%line), calls=%wrapped",
            ("all-gather seq", 1, 32, 16),
        ),
    ],
)
def test_every_form_of_a_collective_is_counted(line, expected):
    hlo = f"""
%all-reduce-scatter.1 (p: f32[8]) -> f32[4] {{
  %r = f32[8]{{0}} all-reduce(%p), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %s = f32[4] dynamic-slice(%r, %n), dynamic_slice_sizes={{4}}
}}

%wrapped (p: f32[4]) -> f32[8] {{
  ROOT %g = f32[8] all-gather(%p), replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %line = {line}
}}
"""
    name, *numbers = expected
    assert module.collectives(hlo, Four) == {name: dict(zip(("count", "payload", "sent"), numbers))}


def test_groups_that_cannot_be_read_are_an_error():
    with pytest.raises(ValueError, match="groups of a collective cannot be read"):
        module.groups_of("f32[8] all-reduce(%x), replica_groups=@devices", 4)


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
