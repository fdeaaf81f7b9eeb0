import json

import jax
import numpy as np
import pytest

from attn_lab import ops
from attn_lab.catalogue import Sizes, find
from experiments import benchmark as module
from experiments.benchmark import benchmark
from experiments.configs.benchmark import PRESETS, get_config

LIMIT = {"flops_per_second": 1e9, "bytes_per_second": 2e9}


def tiny(**changes):
    config = get_config()
    config.update(mechanisms="dot_product_attention", lengths=(16, 32), head_dim=8, repeats=2)
    config.update(changes)
    return config


@pytest.fixture(autouse=True)
def no_limits_to_measure(monkeypatch):
    monkeypatch.setattr(module, "limits", lambda *_: dict(LIMIT))


def test_every_case_is_timed_written_and_not_repeated(tmp_path, monkeypatch, capsys):
    result = benchmark(tiny(), tmp_path)
    rows = result["rows"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert 0 < row["milliseconds"] <= row["median_milliseconds"]
        needed = max(row["flops"] / 1e9, row["bytes"] / 2e9)
        assert row["fraction_of_limit"] == pytest.approx(1e3 * needed / row["milliseconds"])
        per_second = row["flops"] / row["milliseconds"] * 1e3
        assert row["teraflops_per_second"] == pytest.approx(per_second / 1e12)
    first = {"mechanism": "dot_product_attention", "implementation": "xla", "pass": "forward"}
    shorter, longer = (row for row in rows if first.items() <= row.items())
    # Two heads; 136 pairs of 16 positions; two products of 8 channels; q, k, v and the output.
    assert shorter["flops"] == 2 * 136 * 2 * 2 * 8
    assert shorter["bytes"] == 4 * (2 * 16 * 8) * 4 and longer["bytes"] == 2 * shorter["bytes"]
    assert result["limits"] == LIMIT and result["versions"]["jax"] == jax.__version__
    assert result["device"] == jax.devices()[0].device_kind and result["command"]
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    head, *lines = capsys.readouterr().out.splitlines()
    lines, told = lines[: len(rows)], lines[len(rows) :]
    assert len(told) == len(result["growth"]) == 4
    assert len(lines) == len(rows) and len({len(line) for line in [head, *lines]}) == 1

    path = tmp_path / "cases.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    assert len(kept) == 1 + len(rows)
    path.write_text("".join(kept[:-2]) + kept[-2][:30])
    timed = []
    monkeypatch.setattr(module, "measure", lambda *given: timed.append(given) or {"error": "again"})
    monkeypatch.setattr(module, "limits", None)
    again = benchmark(tiny(), tmp_path)
    assert again["limits"] == LIMIT
    assert len(timed) == 2 and again["rows"][:-2] == rows[:-2] and len(again["rows"]) == len(rows)
    with pytest.raises(ValueError, match="another config, which differs in: head_dim"):
        benchmark(tiny(head_dim=16), tmp_path)
    assert path.read_text().count("\n") == 1 + len(rows)


def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    whole = module.measure

    def exhausted(call, repeats):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nand a long story")

    def measure(config, case, program, arrays):
        with monkeypatch.context() as patch:
            if case.sizes.T == 16:
                patch.setattr(module, "timings", exhausted)
            if case.sizes.T == 24:
                patch.setattr(module, "free_bytes", lambda: 0)
            return whole(config, case, program, arrays)

    monkeypatch.setattr(module, "measure", measure)
    config = tiny(lengths=(16, 24, 32), passes=("forward_backward",), implementations="definition")
    first, second, third = benchmark(config, tmp_path)["rows"]
    assert first["error"] == second["error"] == "out of memory" and "error" not in third
    assert first["reason"] == "RESOURCE_EXHAUSTED: 9 GB"
    assert "GB of temporaries, 0.0 GB free" in second["reason"]
    assert "fraction_of_limit" in third and "fraction_of_limit" not in first


def test_lengths_beyond_patience_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "timings", lambda call, repeats: [2.0])
    config = tiny(lengths=(16, 32), passes=("forward",), implementations="xla", patience=1.0)
    first, second = benchmark(config, tmp_path)["rows"]
    assert first["milliseconds"] == 2000 and second["error"] == "too slow"
    assert second["reason"] == "2.0 s at a smaller length, above patience=1.0"


def test_another_failure_is_not_called_out_of_memory(tmp_path, monkeypatch):
    def broken(call, repeats):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    monkeypatch.setattr(module, "timings", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        benchmark(tiny(), tmp_path)


def test_a_peer_is_timed_beside_ours(tmp_path, monkeypatch):
    def prepare(row, arrays, backward, constants, ours, seconds):
        assert row.name == "delta_rule" and arrays["q"].shape == (1, 16, 2, 8)
        assert ours(arrays).shape == arrays["v"].shape and not constants and seconds == 180
        return lambda: arrays["v"], {"temporary_megabytes": 3.0, "difference": 0.25}

    apart = []
    monkeypatch.setattr(module.peers, "peer_of", lambda row: "fla")
    monkeypatch.setattr(module.peers, "prepare", prepare)
    monkeypatch.setattr(module.peers, "compile_apart", lambda *given: apart.append(given[2:]))
    config = tiny(mechanisms="delta_rule", lengths=(16,), implementations="chunk,fla")
    rows = benchmark(config, tmp_path)["rows"]
    assert apart == [("float32", True, 180)]
    assert [row["implementation"] for row in rows] == ["chunk", "chunk", "fla", "fla"]
    assert rows[2]["difference"] == 0.25 and rows[2]["least_milliseconds"] > 0
    assert rows[2]["flops"] == rows[0]["flops"]


@pytest.mark.parametrize(
    ("raised", "error", "reason"),
    [
        (RuntimeError("wants another compiler\nand more"), "refused", "wants another compiler"),
        (TimeoutError("more than 180 s"), "too slow to tune", "more than 180 s"),
    ],
)
def test_a_peer_that_has_no_time_is_recorded_after_ours(
    raised, error, reason, tmp_path, monkeypatch
):
    def refuse(*_):
        raise raised

    monkeypatch.setattr(module.peers, "peer_of", lambda row: "flex")
    monkeypatch.setattr(module.peers, "prepare", refuse)
    rows = benchmark(tiny(implementations="xla,flex", lengths=(8, 16)), tmp_path)["rows"]
    assert all("milliseconds" in row for row in rows[:4])
    assert [(row["error"], row["reason"]) for row in rows[4:]] == 4 * [(error, reason)]


def test_a_kernel_that_refuses_is_recorded(tmp_path):
    config = tiny(
        mechanisms="",
        groups=({"mechanisms": "delta", "length": 64, "implementations": "xla,mosaic_gpu"},),
        dtype="bfloat16",
        passes=("forward",),
        repeats=1,
    )
    served, refused = benchmark(config, tmp_path)["rows"]
    assert served["milliseconds"] > 0
    assert refused["error"] == "refused" and "linear_attention" in refused["reason"]


def test_programs_are_timed_in_groups_and_compared(tmp_path, monkeypatch, capsys):
    config = tiny(
        mechanisms="",
        groups=(
            {"mechanisms": "full,causal,bias", "length": 16},
            {"mechanisms": "full,window-8", "length": 32, "head_dim": 4},
        ),
        implementations="definition,xla",
    )
    result = benchmark(config, tmp_path)
    names = [row["mechanism"] for row in result["rows"]]
    assert names == [n for n in ("full", "causal", "bias", "full", "window-8") for _ in range(4)]
    assert {(row["length"], row["head_dim"]) for row in result["rows"]} == {(16, 8), (32, 4)}
    by_name = {row["mechanism"]: row for row in result["rows"] if row["pass"] == "forward"}
    assert by_name["causal"]["flops"] == 2 * 136 * 2 * 2 * 8 == by_name["bias"]["flops"]
    assert by_name["window-8"]["flops"] == 2 * (36 + 24 * 8) * 2 * 2 * 4
    assert by_name["bias"]["bytes"] == by_name["causal"]["bytes"] + 4 * 2 * 16 * 16
    told = capsys.readouterr().out
    assert "causal xla forward, 1 x 16 x 2 x 8: " in told and "of its plain program's rate" in told
    assert len(result["ratios"]) == 5 * 2 * 2 and "growth" not in result
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    monkeypatch.setattr(module, "measure", None)
    assert benchmark(config, tmp_path)["ratios"] == result["ratios"]


def test_recurrences_are_timed_against_the_bandwidth(tmp_path):
    config = tiny(
        mechanisms="gla,gated_delta",
        groups=({"length": 16, "batch": 2},),
        implementations="recurrent,xla",
        dtype="bfloat16",
        repeats=1,
    )
    result = benchmark(config, tmp_path)
    assert len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        a_token = {"gla": 5 * 8 * 2, "gated_delta": 4 * 8 * 2 + 2 * 4}
        once = 2 * 32 * a_token[row["mechanism"]]
        assert row["bytes"] == once * (2 if row["pass"] == "forward_backward" else 1)
        seconds = row["milliseconds"] / 1e3
        assert row["fraction_of_bandwidth"] == pytest.approx(row["bytes"] / 2e9 / seconds)
    assert all(entry["of_plain"] is None for entry in result["ratios"])
    assert all(len(entry["times_faster"]) == 1 for entry in result["ratios"])
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_steps_of_decoding_are_timed_in_a_loop_and_alone(tmp_path):
    config = tiny(
        mechanisms="step_gla,step_delta",
        groups=({"length": 1}, {"length": 20}),
        implementations="xla",
        passes=("forward",),
        repeats=1,
    )
    rows = benchmark(config, tmp_path)["rows"]
    assert [row["length"] for row in rows] == [1, 1, 20, 20]
    for row in rows:
        assert row["microseconds_a_step"] == 1e3 * row["milliseconds"] / row["length"]
        gates = 8 if row["mechanism"] == "step_gla" else 1
        assert row["bytes"] == row["length"] * 2 * 4 * (2 * 8 * 8 + 4 * 8 + gates)


def test_crossovers_with_every_implementation_of_the_baseline(tmp_path, monkeypatch, capsys):
    def measure(config, case, program, arrays):
        slow = {"definition": 3.0, "recurrent": 4.0}.get(case.implementation, 1.0)
        attends = case.row.name == "causal"
        return {"milliseconds": slow * (case.sizes.T**2 / 32 if attends else case.sizes.T)}

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(
        module, "compile_all", lambda lower, items, processes: [None for _ in items]
    )
    config = tiny(
        mechanisms="causal,linear",
        groups=tuple({"length": length} for length in (8, 16, 32, 64)),
        implementations="definition,xla,recurrent",
        passes=("forward_backward",),
        baseline="causal",
    )
    (found,) = benchmark(config, tmp_path)["crossovers"]
    assert found["mechanism"] == "linear"
    assert found["crossover"] == {"definition": pytest.approx(32 / 3), "xla": 32}
    told = capsys.readouterr().out
    said = "linear forward_backward: faster than causal by definition from length 11 on, by xla"
    assert said in told
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.parametrize("preset", [n for n in PRESETS if n.endswith("h100") and n != "h100"])
def test_groups_of_presets_name_programs(preset):
    config = get_config(preset)
    config.groups = tuple(group | {"implementations": "xla"} for group in config.groups)
    config.implementations = "xla"
    cases = module.cases(config)
    assert all(case.row.family == "program" for case in cases)
    for group in {case.sizes for case in cases}:
        names = {case.row.name for case in cases if case.sizes == group}
        plain = {case.row.plain for case in cases if case.sizes == group} - {""}
        assert plain <= names | {"full"}


def test_flops_are_those_of_allowed_pairs():
    sizes = Sizes(B=2, T=64, S=64, H=4, K=4, D=8, V=8)
    a_pair = 2 * 2 * 4 * (8 + 8)
    window = find("sliding_window_attention")
    seen = np.asarray((ops.causal_mask() & ops.sliding_window_mask(4, 4)).dense(64, 64)).sum()
    assert module.flops_of(window, sizes, causal=True) == pytest.approx(a_pair * seen)
    softmax = find("dot_product_attention")
    assert module.flops_of(softmax, sizes, causal=False) == a_pair * 64 * 64
    recurrent = find("gated_linear_attention")
    assert module.flops_of(recurrent, sizes, causal=True) == recurrent.flops(sizes)


def test_limits_are_rates(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(module, "timings", lambda call, repeats: [call() is None, 2.0, 4.0][1:])
    found = module.limits("float32", 2)
    assert found == {"flops_per_second": 1024**3, "bytes_per_second": 2**26}


@pytest.mark.parametrize("preset", ["quick", "h100"])
def test_families_name_their_implementations(preset):
    config = get_config(preset)
    config.family = "recurrence"
    found = {case.implementation for case in module.cases(config)}
    assert found - {"cudnn"} == {"definition", "xla", "recurrent", "parallel", "chunk"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanisms": "atention"}, "'atention' is unknown; choose one of dot_product"),
        ({"implementations": "cuda"}, "'cuda' is not there; choose of definition, xla"),
        ({"implementations": "cudnn", "dtype": "float32"}, "; it needs a GPU, 16 bits"),
        ({"implementations": "fla"}, "it needs a GPU, PyTorch, fla-core"),
        ({"passes": ("backward",)}, "passes must be of forward, forward_backward"),
        ({"lengths": ()}, "lengths must have at least one entry"),
        ({"mechanisms": "", "family": "masks"}, "family must be one of attention, recurrence"),
    ],
)
def test_errors_come_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark(tiny(**changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_preset_that_is_not_there():
    with pytest.raises(ValueError, match=r"preset must be quick, recurrence.*; got 'h200'"):
        get_config("h200")
