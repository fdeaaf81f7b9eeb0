import json

import jax
import pytest

from attn_kernels.attention.blocks import KERNELS, KINDS, Blocks, blocks_of, fitting, table, using
from experiments import tune
from experiments.configs.tune import get_config


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_every_kernel_has_candidates(dim):
    for kernel in KERNELS:
        assert blocks_of(kernel, dim, "bfloat16", "plain").rows == 64
        assert list(tune.candidates(kernel, dim))


def test_the_fastest_blocks_win_and_a_killed_search_goes_on(tmp_path, monkeypatch):
    config = get_config()
    config.dims, config.kinds, config.length = (64,), ("plain",), 8
    built = []

    def lowered(config, case):
        built.append(case)
        if case["blocks"].slots == 3:
            raise ValueError("too large")
        columns = case["blocks"].columns
        return jax.jit(lambda *args: columns).lower(1.0, 1.0, 1.0)

    config.processes = 1
    monkeypatch.setattr(tune, "lowered", lowered)
    monkeypatch.setattr(tune, "inputs", lambda *given: (1.0, 1.0, 1.0))
    monkeypatch.setattr(tune, "timings", lambda run, repeats: [1 / int(run())])
    rows = tune.tune(config, tmp_path)
    assert [row["kernel"] for row in rows if row["device"] == "cpu"] == sorted(KERNELS)
    assert [row["blocks"][1] for row in rows if row["device"] == "cpu"] == [128, 256, 128]
    assert json.loads((tmp_path / "blocks.json").read_text()) == rows
    lines = (tmp_path / "cases.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(built)
    (tmp_path / "cases.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    assert tune.tune(config, tmp_path) == rows
    assert len(built) == 2 * len(lines) - 5


def test_an_unknown_kind_is_refused(tmp_path):
    config = get_config()
    config.kinds = ("soft",)
    with pytest.raises(ValueError, match="soft"):
        tune.tune(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_kernels_take_the_blocks_that_are_given():
    given = Blocks(64, 64, 1, 3)
    with using(outputs=given):
        assert blocks_of("outputs", 64, "bfloat16", "plain") == given
        assert blocks_of("row_slopes", 64, "bfloat16", "plain") != given
    with pytest.raises(ValueError, match="forward"), using(forward=given):
        pass


@pytest.mark.parametrize(
    ("kernel", "blocks", "dims", "pairs", "want"),
    [
        ("outputs", Blocks(64, 128, 2), (128, 128), 1, Blocks(64, 128, 2)),
        ("outputs", Blocks(64, 256, 3), (64, 64), 1, Blocks(64, 128, 3)),
        ("outputs", Blocks(64, 256, 3), (64,), 0, Blocks(64, 256, 3)),
        ("outputs", Blocks(64, 64, 2), (256, 192), 2, Blocks(64, 64, 1)),
        ("row_slopes", Blocks(64, 64, 1), (256, 256), 2, Blocks(64, 64, 1)),
        ("row_slopes", Blocks(64, 64, 1), (256, 256), 3, None),
    ],
)
def test_blocks_shrink_until_arrays_of_pairs_fit(kernel, blocks, dims, pairs, want):
    assert fitting(kernel, blocks, dims, pairs) == want


def test_the_table_is_of_known_kernels():
    for row in table():
        assert row["kernel"] in KERNELS
        assert row["kind"] in KINDS
        assert Blocks(*row["blocks"]).held % 64 == 0
