import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from attn_lab.models import DecoderLM
from attn_lab.tasks.presets import recall_memory, zoology_figure2
from attn_lab.training import evaluate
from experiments import recall
from experiments.configs.recall import get_config

CONFIG = "experiments/configs/recall.py"
SMALL = {
    "task.vocab": 32,
    "train": ((16, 2, 100),),
    "test": ((16, 2, 30), (24, 3, 45)),
    "model.num_layers": 1,
    "batch_size": 8,
    "test_batch_size": 15,
    "steps": 40,
    "eval_every": 10,
    "checkpoint_every": 7,
    "state_length": 16,
    "mixers": "softmax,delta_rule",
    "widths": (16,),
}


def make_config(**changes):
    config = get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return config


def start(workdir, *flags):
    changes = [f"--config.{key}={value}" for key, value in SMALL.items()]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.recall"),
            *(f"--config={CONFIG}", f"--workdir={workdir}", *changes, *flags),
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def numbers(workdir):
    """Every file of a sweep that holds nothing of the clock."""
    files = [*workdir.rglob("config.json"), *workdir.rglob("metrics.jsonl")]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recall") / "whole"
    return workdir, recall.train(make_config(), workdir)


def test_a_killed_sweep_ends_like_an_uninterrupted_one(tmp_path, whole):
    workdir = tmp_path / "killed"
    process = start(workdir)
    while not list(workdir.glob("*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    time.sleep(random.uniform(0, 8))
    process.send_signal(signal.SIGKILL)
    process.wait()
    output, errors = start(workdir).communicate()
    # The kill may have left half a checkpoint, of which a run says that it leaves it out.
    assert all("is damaged" in line for line in errors.splitlines()), errors
    assert "delta_rule" in output and str(workdir / "recall.png") in output
    assert numbers(workdir) == numbers(whole[0])
    results = [(path / "results.json").read_bytes() for path in (workdir, whole[0])]
    assert results[0] == results[1]


def test_what_is_finished_is_not_trained_again(whole, monkeypatch):
    workdir, runs = whole

    def no_batch(config, parts, step):
        assert step == 0, "a batch was asked for training"
        return batch(config, parts, step)

    batch = recall.train_batch
    monkeypatch.setattr(recall, "train_batch", no_batch)
    before = numbers(workdir)
    assert recall.train(make_config(), workdir) == runs
    assert numbers(workdir) == before


def test_results(whole):
    workdir, runs = whole
    assert [run.name for run in runs] == ["softmax-16-2.15e-03", "delta_rule-16-2.15e-03"]
    for run, row in zip(runs, json.loads((workdir / "results.json").read_text())):
        assert row == json.loads(json.dumps(run._asdict()))
        assert [step for step, _ in run.curve] == [10, 20, 30, 40]
        assert run.accuracy == max(value for _, value in run.curve)
        # The parts hold 30 and 45 examples.
        by_part = run.by_part["16_2"] * 30 + run.by_part["24_3"] * 45
        assert run.accuracy == pytest.approx(by_part / 75)
    # Keys and values of 16 positions, 4 bytes a number.
    assert runs[0].state_bytes == 2 * 16 * 16 * 4
    assert (workdir / "recall.png").stat().st_size > 10_000


def test_the_plot_and_the_table_show_the_best_rate(tmp_path):
    point = dict(state_bytes=100, steps=2, by_part={})
    runs = [
        recall.Run("a", 8, 0.1, accuracy=0.5, curve=[(1, 0.5), (2, 0.4)], **point),
        recall.Run("a", 8, 0.2, accuracy=0.75, curve=[(1, 0.2), (2, 0.75)], **point),
        recall.Run("b", 8, 0.1, accuracy=0.25, curve=[(1, 0.1), (2, 0.25)], **point),
    ]
    assert recall.best_runs(runs) == runs[1:]
    text = recall.table(runs)
    assert "0.750" in text and "0.500" not in text
    recall.plot(runs, tmp_path / "recall.png", chance=0.25)
    assert (tmp_path / "recall.png").exists()


def test_an_epoch_goes_through_the_parts_in_order():
    config = make_config(train=((16, 2, 100), (24, 3, 60)))
    parts = recall.make_parts(config, "train")
    lengths = [
        recall.train_batch(config, parts, step).whole()["inputs"].shape
        for step in range(2 * (13 + 8))
    ]
    assert lengths == 2 * (13 * [(8, 16)] + 8 * [(8, 24)])
    first = np.concatenate(
        [recall.train_batch(config, parts, s).whole()["inputs"] for s in range(13)]
    )
    assert {x.tobytes() for x in first[:100]} == {x.tobytes() for x in parts[0].inputs}
    batch = recall.train_batch(config, parts, 14)
    some = batch.make(np.array([1, 6]))
    for name, array in batch.whole().items():
        np.testing.assert_array_equal(some[name], array[[1, 6]])


def test_parts_hold_the_labels_of_the_task():
    config = make_config()
    (train,), (test, longer) = (recall.make_parts(config, split) for split in ("train", "test"))
    assert train.inputs.shape == (100, 16) and longer.inputs.shape == (45, 24)
    assert longer.at.shape == longer.targets.shape == (45, 3)
    for x, at, targets in zip(longer.inputs, longer.at, longer.targets):
        context = dict(x[:6].reshape(3, 2))
        assert [context[key] for key in x[at]] == list(targets) and at.min() >= 6
    known = {x.tobytes() for x in train.inputs}
    assert len(known) > 90 and not known & {x.tobytes() for x in test.inputs}
    (again,) = recall.make_parts(config, "train")
    np.testing.assert_array_equal(again.inputs, train.inputs)


def test_the_loss_is_that_of_all_logits():
    config = make_config()
    (part, _) = recall.make_parts(config, "test")
    model = recall.make_model(config, "softmax", 16)
    metrics = evaluate(model, recall.test_batches(config, part, 0), recall.loss_fn)
    log_probs = jax.nn.log_softmax(model(part.inputs)[0])
    chosen = np.take_along_axis(np.asarray(log_probs), part.at[..., None], 1)
    loss = -np.take_along_axis(chosen, part.targets[..., None], 2).mean()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((chosen.argmax(-1) == part.targets).mean())


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.mixers=softmax,attentoin", "attentoin"),
        ("--config.models.softmax.mixer_args.num_heads=3", "3"),
        ("--config.batchsize=3", "--config.batchsize=3"),
        ("--config.task.vocab=8", "vocab"),
        ("--config.train=((15, 2, 100),)", "seq_len"),
        (f"--config={CONFIG}:zoology_figure2_63", "63"),
        (f"--config={CONFIG}:zoologie", "zoologie"),
        (f"--config={CONFIG}s", f"{CONFIG}s"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, flag, message):
    process = start(tmp_path / "run", flag)
    output, errors = process.communicate()
    assert process.returncode == 1 and not output
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "run").exists()


def test_the_workdir_of_another_config(whole):
    before = numbers(whole[0])
    process = start(whole[0], "--config.steps=50")
    output, errors = process.communicate()
    assert process.returncode == 1 and not output
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "steps (40 there, 50 asked)" in errors
    assert numbers(whole[0]) == before


@pytest.mark.parametrize(
    "preset", ["quick", "recurrent", "zoology_figure2", "zoology_figure2_512", "recall_memory"]
)
def test_every_model_of_a_preset_can_be_built(preset):
    config = get_config(preset)
    for mixer in [*config.models, *config.mixers.split(",")]:
        width = config.models[mixer].get("widths", (64,))[0]
        model = nnx.eval_shape(lambda m=mixer, w=width: recall.make_model(config, m, w))
        assert isinstance(model, DecoderLM) and len(model.blocks) in (2, 4)


def test_presets_are_full_size():
    config = get_config("zoology_figure2_512")
    assert config.train == ((512, 64, 100_000),) and config.test == ((512, 64, 3_000),)
    assert config.batch_size == 128 and config.epochs == 64 and config.task.vocab == 8192
    assert len(recall.sweep_points(config)) == 3 * 4 * 4
    assert config.learning_rates == zoology_figure2["learning_rates"]
    config = get_config("recall_memory")
    assert config.train == recall_memory["train"] and config.test == recall_memory["test"]
    widths = {(mixer, width) for mixer, width, _ in recall.sweep_points(config)}
    assert {("softmax", 128), ("sliding_window_1024", 128), ("delta_rule", 256)} <= widths


def test_state_sizes_are_the_published_ones():
    """At length 1024: two lists of width 128 and the convolution's 3; a window keeps its keys."""
    config = get_config("recall_memory")
    sizes = {
        (mixer, width): nnx.eval_shape(
            lambda m=mixer, w=width: recall.make_model(config, m, w)
        ).state_bytes(1024)
        for mixer, width in [("softmax", 64), ("sliding_window_8", 128), ("sliding_window_64", 128)]
    }
    published = {
        ("softmax", 64): 5.25e5,
        ("sliding_window_8", 128): 9.7e3,
        ("sliding_window_64", 128): 6.7e4,
    }
    for point, size in sizes.items():
        assert size == pytest.approx(published[point], rel=0.05), point
