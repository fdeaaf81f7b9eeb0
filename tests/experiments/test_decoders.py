import json

import numpy as np
import pytest

from experiments import decoders as module
from experiments.configs.decoders import get_config, variant
from experiments.decoders import decoders

SOFTMAX = "dot_product_attention"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    words = ["attention", "kernel", "a", "of", "recall", "wave"]
    (path / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 2000)))
    return path


@pytest.fixture(autouse=True)
def no_limits_to_measure(monkeypatch):
    limit = {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    monkeypatch.setattr(module, "limits", lambda *_: dict(limit))


def tiny(data_dir, *variants, **changes):
    config = get_config()
    config.models.small.file = "text.txt"
    config.models.small.model.update(num_layers=1, width=16)
    config.models.small.optimizer.warmup = 2
    config.update(data_dir=str(data_dir), steps=5, untimed=2, variants=variants, **changes)
    return config


def softmax(name, length=16):
    return variant("small", name, (SOFTMAX, {"num_heads": 2, "implementation": name}), length, 2)


def test_variants_are_trained_written_and_compared(data_dir, tmp_path, monkeypatch, capsys):
    gated = variant("small", "gated", ("gated_linear_attention", {"num_heads": 2}), 8, 4)
    config = tiny(data_dir, softmax("xla"), softmax("definition"), softmax("cudnn"), gated)
    result = decoders(config, tmp_path)
    first, second, refused, last = result["rows"]
    assert refused["error"] == "refused" and "cudnn" in refused["reason"]
    for row in first, second, last:
        assert len(row["losses"]) == 5 and row["parameters"] > 0 and row["gigabytes"] > 0
        assert row["tokens_per_second"] == pytest.approx(32e3 / row["milliseconds_a_step"])
        assert row["utilisation"] == pytest.approx(row["teraflops_per_second"] * 1e3)
    assert first["flops"] == second["flops"] != last["flops"]
    (gap,) = result["differences"]
    want = np.abs(np.subtract(first["losses"], second["losses"]))
    assert gap["variant"] == "definition" and gap["beside"] == "xla"
    assert gap["difference"] == want.max() < 1e-4 and gap["step"] == 1 + want.argmax()
    assert json.loads((tmp_path / "decoders.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "decoders.png").stat().st_size > 1000
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5 and "refused: " in told[2] and "of xla" in told[4]

    path = tmp_path / "cases.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    assert len(kept) == 5
    path.write_text("".join(kept[:-1]) + kept[-1][:20])
    done = []
    monkeypatch.setattr(module, "trained", lambda *given: done.append(given) or {**last})
    assert decoders(config, tmp_path)["rows"] == result["rows"] and len(done) == 1


def test_the_first_loss_is_that_of_a_guess_and_losses_fall(data_dir, tmp_path):
    config = tiny(data_dir, softmax("xla"))
    config.update(steps=40)
    config.models.small.optimizer.learning_rate = 1e-2
    (row,) = decoders(config, tmp_path)["rows"]
    assert row["losses"][0] == pytest.approx(np.log(128), abs=0.1)
    assert row["losses"][-1] < row["losses"][0] - 1


@pytest.mark.slow
def test_steps_that_others_compile_are_those_of_this_process(data_dir, tmp_path):
    def losses(processes):
        config = tiny(data_dir, softmax("xla"), softmax("xla", length=8), processes=processes)
        config.models.small.model.update(num_layers=2, scan=True, unroll=2)
        return [row["losses"] for row in decoders(config, tmp_path / str(processes))["rows"]]

    assert losses(2) == losses(1)


def test_what_does_not_fit_is_recorded(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda: 0)
    (row,) = decoders(tiny(data_dir, softmax("xla")), tmp_path)["rows"]
    assert row["error"] == "out of memory" and "0.0 GB free" in row["reason"]
    assert (tmp_path / "decoders.png").stat().st_size > 1000


@pytest.mark.parametrize("preset", ["implementations_h100", "lengths_h100"])
def test_presets_name_models_of_their_size(preset):
    for key, config in module.variants(get_config(preset)):
        config.vocab_size = {"124m": 33280, "char": 128}[key["model"]]
        params, flops = module.model_flops(config)
        assert {"124m": 105e6, "char": 10e6}[key["model"]] < params < 130e6
        assert flops > 6 * params * config.batch_size * config.length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ()}, "variants must have at least one entry"),
        ({"variants": 2 * (softmax("xla"),)}, "variants must differ, got two of"),
        ({"variants": (softmax("xla") | {"model": "7b"},)}, "model must be one of small, got '7b'"),
        ({"untimed": 5}, "untimed must be 1 to 4, got 5"),
    ],
)
def test_errors_come_before_anything_is_written(changes, message, data_dir, tmp_path):
    config = tiny(data_dir, softmax("xla"))
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        decoders(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_preset_that_is_not_there():
    with pytest.raises(ValueError, match=r"preset must be quick, .* got 'h200'"):
        get_config("h200")
