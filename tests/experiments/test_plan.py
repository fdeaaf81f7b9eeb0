import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from attn_lab.training import make_mesh
from experiments import plan as module
from experiments.configs import plan as presets
from experiments.configs.plan import get_config

PROGRAM = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.experiments.test_plan import MODES, tiny
from experiments.plan import plan
print(json.dumps({name: plan(tiny(*mode), "h100:4") for name, mode in MODES.items()}))
"""
MODES = {
    "data": ({"data": 4},),
    "fsdp": ({"fsdp": 4},),
    "recomputed": ({"fsdp": 4}, {"remat": True}),
    "tensor": ({"tensor": 4},),
    "ring": ({"seq": 4},),
    "all_to_all": ({"seq": 4}, {}, "all_to_all"),
    "allgather": ({"seq": 4}, {}, "allgather"),
    "recurrence": ({"seq": 4}, {"mixers": "gated_linear_attention"}),
}
N = 4
LAYERS, WIDTH, LENGTH, BATCH, HEADS = 2, 32, 64, 4, 4
STREAM = BATCH * LENGTH * WIDTH


def tiny(mesh, model=(), sequence="ring"):
    config = get_config("124m-softmax-2k")
    config.update(vocab_size=64, length=LENGTH, batch_size=BATCH, dtype="float32")
    config.update(sequence=sequence)
    config.model.update(num_layers=LAYERS, width=WIDTH, mlp_ratio=2.0, remat=False, tied=False)
    config.model.update(dict(model))
    config.model.mixer_args = {"num_heads": HEADS}
    config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "seq": 1} | mesh)
    return config


@pytest.fixture(scope="module")
def plans():
    """Plans of every mode on 4 CPU devices, which need a process of their own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def numbers(result, kind, axis):
    """Float32 numbers that a device puts into the collectives of a kind along an axis."""
    total = sum(
        each["payload"]
        for name, each in result["collectives"].items()
        if name.split(" ")[0] == kind and axis in name.split(" ")[1].split("+")
    )
    return total / 4


def exchanged_by_sequences():
    """What the modes of the axis "seq" send, by kind: the formulas of the documentation."""
    part = STREAM // N
    head, wide = WIDTH // 2 // HEADS, WIDTH // HEADS  # of gated linear attention
    rounds, state = 2, head * wide
    return {
        # Keys and values take 3 steps, in both passes; their derivatives 4, to arrive at home.
        "ring": ("collective-permute", LAYERS * 2 * (3 + 3 + 4) * part),
        # Queries, keys, values and outputs, and then their derivatives.
        "all_to_all": ("all-to-all", LAYERS * 2 * 4 * part),
        # A last state that nobody reads is not sent.
        "recurrence": (
            "collective-permute",
            LAYERS * 2 * BATCH * HEADS * (rounds * (head + state) + state),
        ),
    }


def again():
    """Parameters of the blocks, which are gathered twice if blocks are computed again."""
    return LAYERS * (4 * WIDTH**2 + 3 * 2 * WIDTH**2 + 2 * WIDTH)


def test_data_parallel_all_reduces_the_gradient(plans):
    count = plans["data"]["number_of_parameters"]
    assert count <= numbers(plans["data"], "all-reduce", "data") <= count + 16


@pytest.mark.parametrize("mode, axis", [("fsdp", "fsdp"), ("ring", "seq")])
def test_every_parameter_is_gathered_and_its_gradient_reduced(plans, mode, axis):
    count = plans[mode]["number_of_parameters"]
    assert numbers(plans[mode], "all-gather", axis) == count
    assert count <= numbers(plans[mode], "all-reduce", axis) <= 1.01 * count


def test_parameters_of_a_block_that_is_computed_again_are_gathered_again(plans):
    count = plans["recomputed"]["number_of_parameters"]
    assert numbers(plans["recomputed"], "all-gather", "fsdp") == count + again()


def test_tensor_parallel_all_reduces_the_stream(plans):
    # Two forward; backward one for each of q, k, v, up and gate; the embedding and the head.
    reduced = numbers(plans["tensor"], "all-reduce", "tensor")
    assert (7 * LAYERS + 2) * STREAM <= reduced <= (7 * LAYERS + 2.2) * STREAM


@pytest.mark.parametrize("mode", exchanged_by_sequences())
def test_sequences_send_what_the_formula_says(plans, mode):
    kind, count = exchanged_by_sequences()[mode]
    assert numbers(plans[mode], kind, "seq") == count


def test_allgather_gathers_keys_and_values_and_reduces_their_gradients(plans):
    result, both = plans["allgather"], LAYERS * 2 * STREAM
    assert numbers(result, "all-gather", "seq") == both + result["number_of_parameters"]
    assert numbers(result, "reduce-scatter", "seq") == both


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
        # A chain of fusions, in which it goes on while they compute.
        (
            'f32[8] all-gather(%x), replica_groups=[2,2]<=[4], frontend_attributes={chain_id="3"}\n'
            "  %n = f32[8] all-gather(%x), replica_groups=[2,2]<=[4], "
            'frontend_attributes={chain_id="3"}',
            ("all-gather seq", 1, 32, 16),
        ),
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


def test_products_of_every_device_are_counted_once():
    mesh = AbstractMesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)

    def f(x, w):
        split = P("seq"), P()
        return jax.shard_map(jnp.matmul, in_specs=split, out_specs=P("seq"), axis_names={"seq"})(
            x, w
        )

    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(f)(np.ones((8, 3)), np.ones((3, 5)))
    assert module.product_flops(jaxpr) == 2 * 8 * 3 * 5


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="topology must start with one of v4, v5e"):
        module.devices_of("v9:2x2")
    with pytest.raises(ValueError, match="mixer of the preset must be of softmax"):
        get_config("7b-lstm-2k")


@pytest.mark.slow
def test_a_tpu_program_sends_what_the_formulas_say():
    pytest.importorskip("libtpu", reason="there is no libtpu wheel here")
    # At a lower precision, operands of products are sent in bfloat16.
    with jax.default_matmul_precision("highest"):
        plans = {name: module.plan(tiny(*mode), "v5e:2x2") for name, mode in MODES.items()}
    for mode, result in plans.items():
        axis, count = next(iter(MODES[mode][0])), result["number_of_parameters"]
        gathered, reduced = (numbers(result, kind, axis) for kind in ("all-gather", "all-reduce"))
        assert result["fits"] and result["devices"] == N
        if mode in exchanged_by_sequences():
            kind, sent = exchanged_by_sequences()[mode]
            assert numbers(result, kind, "seq") == sent
        if mode == "tensor":
            assert (4 * LAYERS + 2) * STREAM <= reduced <= (4 * LAYERS + 2.2) * STREAM
            continue
        # Keys, values and the sums of their gradients, of which every device takes its part.
        both = LAYERS * 2 * STREAM * (mode == "allgather")
        assert count + both <= reduced <= 1.02 * count + both
        if axis != "data":  # weights of norms are added up instead
            count += (mode == "recomputed") * again()
            assert 0.99 * count <= gathered - both <= count


@pytest.mark.slow
@pytest.mark.parametrize("size", presets.SIZES)
def test_every_preset_can_be_traced(size):
    pytest.importorskip("libtpu", reason="there is no libtpu wheel here")
    devices = module.devices_of("v5e:16x16")
    for mixer in presets.MIXERS:
        for length, tokens in presets.LENGTHS.items():
            config = get_config(f"{size}-{mixer}-{length}")
            assert config.batch_size * config.length == 256 * 2**13
            mesh = make_mesh(**config.mesh.to_dict(), devices=devices)
            step, state, batch = module.abstract_step(config, mesh)
            assert module.product_flops(step.trace(state, batch).jaxpr) > 0
            parts = batch["inputs"].sharding.shard_shape((config.batch_size, tokens))
            assert parts[0] * parts[1] == 2**13


@pytest.mark.parametrize("rows, status", [(4, 0), (2**24, 1)])
def test_the_status_says_whether_a_step_fits(tmp_path, rows, status):
    config = tiny({"fsdp": 1})
    changes = {"vocab_size": 64, "length": LENGTH, "batch_size": rows, "mesh.fsdp": 1}
    changes |= {"mesh.data": 1, "model.width": WIDTH, "model.mixer_args.num_heads": HEADS}
    changes |= {"model.num_layers": 1}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.plan", f"--workdir={tmp_path}"),
            *("--config=experiments/configs/plan.py:124m-softmax-2k", "--topology=h100:1"),
            *(f"--config.{key}={value}" for key, value in changes.items()),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    verdict = ": does not fit" if status else ": fits"
    assert any(line.endswith(verdict) for line in done.stdout.splitlines()), done.stdout
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["tokens"] == rows * config.length and result["fits"] == (status == 0)


def test_the_documentation_has_the_rows_that_were_planned():
    rows = json.loads((module.ROOT / "benchmarks/plan.json").read_text())
    assert set(rows) == {f"{preset} {name}" for preset in presets.TABLE for name in module.TABLE}
    page = (module.ROOT / "docs/plan.md").read_text()
    assert module.with_table(page, rows) == page
    first = next(iter(rows))
    changed = rows | {first: rows[first] | {"fits": not rows[first]["fits"]}}
    assert module.with_table(page, changed) != page


def test_rows_are_saved_one_by_one_and_not_made_again(tmp_path, monkeypatch, plans):
    asked = []

    def planned(config, topology):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(topology)
        return plans["data"]

    monkeypatch.setattr(module, "plan", planned)
    with pytest.raises(KeyboardInterrupt):
        module.table(tmp_path / "plan.json")
    assert list(json.loads((tmp_path / "plan.json").read_text())) == [
        f"{presets.TABLE[0]} {topology}" for topology in asked
    ]
    monkeypatch.setattr(module, "plan", lambda config, topology: plans["fsdp"])
    rows = module.table(tmp_path / "plan.json")
    assert len(rows) == len(presets.TABLE) * len(module.TABLE)
    assert [row["mesh"]["data"] for row in rows.values()][:3] == [4, 4, 1]
