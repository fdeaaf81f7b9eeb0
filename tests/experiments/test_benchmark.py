import json

import jax
import pytest

from experiments import benchmark as module
from experiments.benchmark import benchmark
from experiments.configs.benchmark import get_config


def tiny(**changes):
    config = get_config()
    config.update(mechanisms="dot_product_attention", lengths=(16, 32), dim=8, repeats=1)
    config.update(changes)
    return config


def test_every_case_is_timed_written_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(
        module, "limits", lambda *_: {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    )
    result = benchmark(tiny(), tmp_path)
    rows = result["rows"]
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        assert row["milliseconds"] > 0 and row["flops"] > 0 and row["bytes"] > 0
        needed = max(row["flops"], row["bytes"]) / 1e9
        assert row["fraction_of_limit"] == pytest.approx(1e3 * needed / row["milliseconds"])
    shorter, longer = (next(r for r in rows if r["length"] == n) for n in (16, 32))
    assert longer["flops"] == 4 * shorter["flops"] and longer["bytes"] == 2 * shorter["bytes"]
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "benchmark.png").stat().st_size > 1000

    path = tmp_path / "cases.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:-2]) + kept[-2][:30])
    timed = []
    monkeypatch.setattr(module, "measure", lambda *case: timed.append(case) or {"error": "again"})
    again = benchmark(tiny(), tmp_path)["rows"]
    assert len(timed) == 2 and again[:-2] == rows[:-2] and len(again) == len(rows)
    with pytest.raises(ValueError, match="holds cases of another config"):
        benchmark(tiny(dim=16), tmp_path)


def test_what_does_not_fit_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(module, "timings", lambda call, repeats: [1.0])
    monkeypatch.setattr(module, "free_bytes", lambda: 0)
    config = tiny(lengths=(16,), passes=("forward_backward",))
    assert [r["error"] for r in benchmark(config, tmp_path / "a")["rows"]] == 2 * ["out of memory"]
    monkeypatch.setattr(
        module, "limits", lambda *_: {"flops_per_second": 1.0, "bytes_per_second": 1.0}
    )
    monkeypatch.setattr(module, "free_bytes", lambda: 10**12)
    monkeypatch.setattr(module, "timings", exhausted)
    assert [r["error"] for r in benchmark(config, tmp_path / "b")["rows"]] == 2 * ["out of memory"]


def test_families_name_their_implementations():
    config = get_config()
    config.family = "recurrence"
    found = {case["implementation"] for case, _ in module.cases(config)}
    assert found == {"recurrent", "parallel", "chunk"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanisms": "atention"}, "'atention' is unknown"),
        ({"implementations": "cuda"}, "implementation 'cuda' is unknown"),
        ({"passes": ("backward",)}, "passes must be of forward, forward_backward"),
        ({"mechanisms": "", "family": "masks"}, "family must be one of attention, recurrence"),
    ],
)
def test_errors_come_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark(tiny(**changes), tmp_path / "new")
    assert not (tmp_path / "new").exists()
