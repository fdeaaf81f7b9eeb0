import math
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from attn_lab.training import read_metrics
from experiments import language
from experiments.configs.language import get_config

CONFIG = "experiments/configs/language.py"
SMALL = {
    "length": 16,
    "batch_size": 4,
    "steps": 60,
    "log_every": 7,
    "eval_every": 20,
    "eval_batches": 2,
    "checkpoint_every": 9,
    "model.num_layers": 1,
    "model.width": 16,
    "model.mixer_args.num_heads": 2,
    "model.dropout": 0.1,
    "optimizer.warmup": 5,
    "sample.prompt": "a",
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with a text in which every word is as likely as every other."""
    words = ["attention", "naïve", "kernel", "a", "of", "recall", "wave"]
    path = tmp_path_factory.mktemp("data")
    text = " ".join(np.random.default_rng(0).choice(words, 2000))
    (path / "text.txt").write_text(text, encoding="utf-8")
    return path


def settings(data_dir, **changes):
    return SMALL | {"data_dir": str(data_dir), "file": "text.txt"} | changes


def make_config(data_dir, **changes):
    config = get_config()
    config.update_from_flattened_dict(settings(data_dir, **changes))
    return config


def start(workdir, data_dir, *flags):
    changes = [f"--config.{key}={value}" for key, value in settings(data_dir).items()]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.language"),
            *(f"--config={CONFIG}", f"--workdir={workdir}", *changes, *flags),
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path, data_dir):
    language.train(make_config(data_dir), tmp_path / "whole")
    process = start(tmp_path / "killed", data_dir)
    while not (tmp_path / "killed/metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    time.sleep(random.uniform(0, 3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    output, errors = start(tmp_path / "killed", data_dir).communicate()
    # The kill may have left half a checkpoint, of which a run says that it leaves it out.
    assert all("is damaged" in line for line in errors.splitlines()), errors
    assert "valid/bits_per_byte" in output
    for name in ("config.json", "metrics.jsonl", "sample.txt"):
        whole, killed = ((tmp_path / run / name).read_bytes() for run in ("whole", "killed"))
        assert whole == killed, name


def hosts(workdir, data_dir, *flags):
    """The two processes of a run over the loopback."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    together = f"--coordinator={address}", "--processes=2", *flags
    return [start(workdir, data_dir, *together, f"--process_id={i}") for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_two_hosts_of_which_one_is_lost_end_like_one(tmp_path, data_dir, lost):
    language.train(make_config(data_dir), tmp_path / "one")
    split = "--config.mesh.data=1", "--config.mesh.fsdp=2"
    running = hosts(tmp_path / "two", data_dir, *split)
    while not (tmp_path / "two/metrics.jsonl").exists():
        assert running[0].poll() is None, running[0].communicate()[1]
        time.sleep(0.02)
    time.sleep(random.uniform(0, 3))
    for process in running[lost], running[1 - lost]:  # the other one waits for it, and is ended
        process.send_signal(signal.SIGKILL)
        process.wait()
    for process in hosts(tmp_path / "two", data_dir, *split):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one, two = (read_metrics(tmp_path / run) for run in ("one", "two"))
    for row, expected in zip(two, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_hosts_of_which_one_is_told_to_stop_save_and_stop_together(tmp_path, data_dir, told):
    endless = "--config.steps=1000000", "--config.eval_every=0", "--config.checkpoint_every=0"
    running = hosts(tmp_path, data_dir, "--config.mesh.data=1", "--config.mesh.fsdp=2", *endless)
    while not (tmp_path / "timing.jsonl").exists():
        assert running[0].poll() is None, running[0].communicate()[1]
        time.sleep(0.02)
    running[told].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=100) for process in running] == 2 * [128 + signal.SIGTERM]
    (saved,) = (tmp_path / "checkpoints").glob("[0-9]*")
    assert (saved / "checksums.json").exists()


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_results_and_files(tmp_path, data_dir, unit):
    config = make_config(data_dir, unit=unit, eval_batches=0)
    results = language.train(config, tmp_path)
    text = language.load_data(config)
    loss = results["valid/loss"]
    assert results["best_valid/loss"] <= loss < math.log(text.vocab_size)
    assert results["valid/perplexity"] == pytest.approx(math.exp(loss))
    valid = text.tokens["valid"]
    nats_per_byte = loss * len(valid) / len(text.decode(valid).encode())
    assert results["valid/bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2))
    assert results["tokens_per_second"] > 0
    assert results["sample"].startswith("a") and len(results["sample"]) <= 16
    assert (tmp_path / "sample.txt").read_text() == results["sample"]
    assert (tmp_path / "loss.png").exists() and (tmp_path / "checkpoints/60").exists()
    assert read_metrics(tmp_path)[-1]["valid/loss"] == loss


def test_tokens(tmp_path):
    words = ["<eos>", "<unk>", "one", "two"]
    ids = np.tile(np.array([2, 3, 2, 0], np.uint16), 100)
    vocab = np.frombuffer("\n".join(words).encode(), np.uint8)
    np.savez(tmp_path / "tokens.npz", train=ids, valid=ids, vocab=vocab)
    changes = {"file": "tokens.npz", "unit": "token", "sample.prompt": "one two"}
    changes["optimizer.learning_rate"] = 0.01
    results = language.train(make_config(tmp_path, **changes), tmp_path / "run")
    assert results["valid/loss"] < 1
    assert results["sample"].startswith("one two")


def test_another_mixer_for_each_layer(tmp_path, data_dir):
    names = "gated_linear_attention,dot_product_attention"
    changes = {"model.mixers": names, "model.num_layers": 2, "steps": 10}
    results = language.train(make_config(data_dir, **changes), tmp_path)
    assert math.isfinite(results["valid/loss"])


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.data_dir=nowhere", "nowhere/text.txt"),
        ("--config.model.mixers=attentoin", "attentoin"),
        ("--config.model.mixer_args.num_heads=3", "3"),
        ("--config.length=100000", "length"),
        ("--config.unit=word", "unit"),
        ("--config.sample.prompt=ß", "'ß'"),
        ("--config.sample.prompt=", "sample.prompt"),
        ("--config.model.heads=3", "--config.model.heads=3"),
        (f"--config={CONFIG}:shakespear", "shakespear"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, data_dir, flag, message):
    process = start(tmp_path / "run", data_dir, flag)
    output, errors = process.communicate()
    assert process.returncode == 1 and not output
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "preset, parameters",
    [("shakespeare_char_small", 795_904), ("shakespeare_char", 10_646_784)],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    config = get_config(preset)
    model = nnx.eval_shape(lambda: language.build_model(config, 65))
    # The published count leaves out the table of positions.
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    positions = config.length * config.model.width
    assert count - positions == parameters
