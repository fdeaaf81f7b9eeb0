import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.data.images import ArraySource, Images
from attn_lab.models import CompactTransformer
from attn_lab.training import read_metrics
from experiments import vision
from experiments.configs.vision import NAMES, get_config

ROOT = Path(__file__).parents[2]
CONFIG = "experiments/configs/vision.py"
SMALL = {
    "batch_size": 8,
    "test_batch_size": 8,
    "epochs": 2.0,
    "warmup_epochs": 0.5,
    "mix_epochs": 1.0,
    "eval_epochs": 1.0,
    "log_every": 3,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with the digits of the tests."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    (folder / "mnist/mnist.npz").write_bytes((ROOT / "tests/data/mnist.npz").read_bytes())
    return folder


def make_config(data_dir, preset="mnist", **changes):
    config = get_config(preset)
    config.update_from_flattened_dict(SMALL | {"data_dir": str(data_dir)} | changes)
    return config


def test_results_and_files_and_resuming(tmp_path, data_dir):
    config = make_config(data_dir)
    results = vision.train(config, tmp_path)
    assert math.isfinite(results["test/loss"]) and results["images_per_second"] > 0
    assert 0 <= results["test/accuracy"] <= results["best_test/accuracy"] <= 1
    rows = read_metrics(tmp_path)
    assert rows[-1]["step"] == 12 and rows[-1]["test/accuracy"] == results["test/accuracy"]
    assert [row["step"] for row in rows if "test/loss" in row] == [6, 12]
    assert (tmp_path / "accuracy.png").exists() and (tmp_path / "checkpoints/12").exists()
    again = vision.train(config, tmp_path)
    assert read_metrics(tmp_path) == rows
    assert again | {"images_per_second": 0} == results | {"images_per_second": 0}


def test_every_augmentation_trains(tmp_path, data_dir):
    recipe = get_config("cct_2_3x2").augment.to_dict()
    changes = {f"augment.{name}": value for name, value in recipe.items()}
    changes |= {
        "augment.crop_padding": 2,
        "label_smoothing": 0.1,
        "model.mixer": "sigmoid_attention",
    }
    results = vision.train(make_config(data_dir, **changes), tmp_path)
    assert math.isfinite(results["test/loss"])


@pytest.fixture(scope="module")
def batch():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    return {"image": pixels, "label": np.arange(8, dtype=np.int32), "mix": np.full(8, True)}


def augmented(batch, preset, **changes):
    config = get_config(preset)
    config.update_from_flattened_dict(changes)
    return vision.augmented(jax.random.key(0), batch, config, 10)


def test_without_augmentation_images_and_labels_are_themselves(batch):
    images, labels = augmented(
        batch, "cct_quick", **{"augment.crop_padding": 0, "augment.flip": False}
    )
    np.testing.assert_allclose(images, batch["image"] / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(labels, np.eye(10)[:8])


@pytest.mark.parametrize("mix", [True, False])
def test_labels_of_the_recipe(batch, mix):
    images, labels = augmented(batch | {"mix": np.full(8, mix)}, "cct_7_3x1")
    assert images.shape == (8, 16, 16, 3) and images.min() >= 0 and images.max() <= 1 + 1e-5
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(labels.min(1), 0.01, rtol=1e-5)
    assert (np.isclose(labels.max(1), 0.91, rtol=1e-5).all()) is np.bool_(not mix)


class Linear(nnx.Module):
    """Logits `[B, 10]` that do not depend on `rngs`."""

    def __init__(self, size):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (size, 10)))

    def __call__(self, x, rngs=None):
        return x.reshape(len(x), -1) @ self.kernel[...], {}


def test_the_losses_of_training_and_evaluation_agree_without_augmentation(batch):
    config = get_config("cct_quick")
    config.update_from_flattened_dict({"augment.crop_padding": 0, "augment.flip": False})
    source = ArraySource(batch["image"], batch["label"])
    images = Images({"train": source, "test": source}, 10, (0.4,) * 3, (0.3,) * 3)
    loss_fn = vision.make_loss(config, images)
    model = Linear(batch["image"][0].size)
    trained = loss_fn(model, batch, nnx.Rngs(0))["loss"]
    tested = loss_fn(model, batch, None)["loss"]
    np.testing.assert_allclose(trained[0] / trained[1], tested[0] / tested[1], rtol=1e-5)
    scaled = (batch["image"].reshape(8, -1) / 255 - 0.4) / 0.3
    log_probs = jax.nn.log_softmax(jnp.asarray(scaled @ np.asarray(model.kernel[...])))
    want = -log_probs[np.arange(8), batch["label"]].sum()
    np.testing.assert_allclose(tested[0], want, rtol=1e-5)
    padded = batch | {"label": np.where(np.arange(8) < 5, batch["label"], -100)}
    assert loss_fn(model, padded, None)["loss"][1] == 5


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.data_dir=nowhere", "nowhere/mnist/mnist.npz"),
        ("--config.dataset=cifar10", "cifar10"),
        ("--config.dataset=no_such_set", "no_such_set"),
        ("--config.model.mixer=attentoin", "attentoin"),
        ("--config.model.kernels=3", "--config.model.kernels=3"),
        (f"--config={CONFIG}:cct_9_3x2", "cct_9_3x2"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, data_dir, flag, message):
    flags = [f"--config={CONFIG}", f"--config.data_dir={data_dir}", flag]
    run = subprocess.run(
        [sys.executable, "-m", "experiments.vision", f"--workdir={tmp_path / 'run'}", *flags],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert message in run.stderr
    assert not (tmp_path / "run").exists()


def test_the_workdir_of_another_config(tmp_path, data_dir):
    vision.train(make_config(data_dir, epochs=0.5, warmup_epochs=0.0), tmp_path)
    before = (tmp_path / "config.json").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="seed"):
        vision.train(make_config(data_dir, epochs=0.5, warmup_epochs=0.0, seed=1), tmp_path)
    after = (tmp_path / "config.json").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
    assert before == after


PARAMETERS = {
    "cct_2_3x2": 283_723,
    "cct_4_3x2": 482_123,
    "cct_6_3x1": 3_233_803,
    "cct_6_3x2": 3_326_923,
    "cct_7_3x1": 3_760_139,
    "cct_7_3x2": 3_853_259,
    "cvt_2_4": 214_539,
    "cvt_4_4": 412_939,
    "cvt_6_4": 3_190_283,
    "cvt_7_4": 3_716_619,
    "vit_lite_2_4": 214_666,
    "vit_lite_4_4": 413_066,
    "vit_lite_6_4": 3_190_538,
    "vit_lite_7_4": 3_716_874,
}


@pytest.mark.parametrize("preset", NAMES)
def test_presets_have_the_published_number_of_parameters(preset):
    source = ArraySource(np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1))
    images = Images({"train": source}, 10, (0.5,) * 3, (0.5,) * 3)
    model = nnx.eval_shape(lambda: vision.build_model(get_config(preset), images))
    assert isinstance(model, CompactTransformer)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == PARAMETERS[preset]


def test_the_recipe_of_300_epochs():
    config = get_config("cct_7_3x1")
    assert (config.epochs, config.warmup_epochs, config.mix_epochs) == (300, 10, 175)
    assert config.batch_size == 128 and config.label_smoothing == 0.1
    assert config.optimizer.learning_rate == 5.5e-4 and config.optimizer.weight_decay == 0.06
    assert config.augment.to_dict() == {
        "crop_scale": (0.8, 1.0),
        "crop_padding": 0,
        "flip": True,
        "rand_augment": 9.0,
        "mixup": 0.8,
        "cutmix": 1.0,
    }
