import math

import pytest

from experiments.growth import crossover, crossovers, fastest, growth

LENGTHS = 1024, 2048, 4096, 8192


def rows(mechanism, times, implementation="chunk"):
    series = {"mechanism": mechanism, "implementation": implementation, "pass": "forward"}
    for length, time in zip(LENGTHS, times):
        yield series | {"length": length} | ({"milliseconds": time} if time else {"error": "lost"})


def test_lines_exponents_and_the_crossover_with_the_fastest_baseline():
    linear = rows("linear", [2 + n / 512 for n in LENGTHS])
    softmax = rows("softmax", [(n / 1024) ** 2 for n in LENGTHS], "xla")
    slower = rows("softmax", [1e3] * 4, "definition")
    first, second, _ = growth([*linear, *softmax, *slower], "softmax")
    assert first["milliseconds_per_1024"] == pytest.approx(2)
    assert first["r_squared"] == pytest.approx(1)
    assert first["exponent"] == pytest.approx(math.log2(18 / 10))
    # 4, 6, 10 against 1, 4, 16: between 2,048 and 4,096
    assert first["crossover"] == pytest.approx(2048 * 2 ** (math.log(1.5) / math.log(2.4)))
    assert second["exponent"] == pytest.approx(2) and "crossover" not in second
    assert second["r_squared"] < 0.98


@pytest.mark.parametrize(
    ("times", "baseline", "length"),
    [
        ([1, 1, 1, 1], [2, 2, 2, 2], 1024),
        ([3, 3, 3, 3], [2, 2, 2, 2], None),
        ([1, 3, 1, 3], [2, 2, 2, 2], None),
        ([4, 4, 1, 1], [2, 2, 2, 2], 2048 * math.sqrt(2)),
        ([3, 3, 3, 3], [2, 2, None, None], 4096),
        ([1, 1, None, None], [2, 2, 2, None], None),
    ],
)
def test_crossover(times, baseline, length):
    of = lambda values: dict(zip(LENGTHS, (v or math.inf for v in values)))  # noqa: E731
    assert crossover(of(times), of(baseline)) == (length and pytest.approx(length))


def test_few_points_make_no_line():
    (entry,) = growth(rows("linear", [1, 2, None, None]), "softmax")
    assert entry.keys() == {"mechanism", "implementation", "pass", "crossover"}
    assert entry["crossover"] is None


def test_the_fastest_implementation_is_compared_with_each_of_the_baseline():
    slow = rows("linear", [9, 9, 9, 9])
    quick = rows("linear", [None, 2, 2, 2], "triton")
    first = rows("softmax", [1, 3, 9, 27], "xla")
    second = rows("softmax", [1, 1, 1, 4], "cudnn")
    third = rows("softmax", [None] * 4, "definition")
    best = fastest([*slow, *quick, *first, *second, *third], "softmax")
    assert [row["by"] for row in best[:4]] == ["chunk", "triton", "triton", "triton"]
    assert [row["milliseconds"] for row in best[:4]] == [9, 2, 2, 2]
    (entry,) = crossovers(best, "softmax")
    of = lambda *times: dict(zip(LENGTHS, times))  # noqa: E731
    assert entry["crossover"] == {
        "xla": crossover(of(9, 2, 2, 2), of(1, 3, 9, 27)),
        "cudnn": crossover(of(9, 2, 2, 2), of(1, 1, 1, 4)),
    }
    assert not crossovers(best, "dense")
