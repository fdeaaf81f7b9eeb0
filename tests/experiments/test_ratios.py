import pytest

from experiments.ratios import ratios


def row(mechanism, implementation, milliseconds, rate, plain="", **changes):
    sizes = {"pass": "forward", "length": 64, "batch": 1, "heads": 2, "head_dim": 8}
    times = {"milliseconds": milliseconds, "teraflops_per_second": rate}
    name = {"mechanism": mechanism, "implementation": implementation, "plain": plain}
    return name | sizes | times | changes


def test_programs_are_compared_with_their_plain_one_and_with_other_implementations():
    rows = [
        row("causal", "ours", 2.0, 400.0),
        row("causal", "theirs", 3.0, 300.0),
        row("capped", "ours", 2.5, 320.0, "causal"),
        row("capped", "theirs", 5.0, 150.0, "causal"),
        row("capped", "ours", 9.0, 80.0, "causal", length=128),
    ]
    del rows[3]["milliseconds"]
    rows.append(row("capped", "others", 7.5, 100.0, "causal"))
    plain, theirs, capped, longer, others = ratios(rows)
    assert plain["of_plain"] is None and plain["times_faster"] == {"theirs": 1.5}
    assert theirs["times_faster"] == {"ours": pytest.approx(2 / 3)}
    assert capped["of_plain"] == 0.8 and capped["times_faster"] == {"others": 3.0}
    assert longer["of_plain"] is None and longer["times_faster"] == {}
    assert others["of_plain"] is None and others["length"] == 64
