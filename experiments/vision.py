"""Image classification with compact transformers of any mixer.

    python -m experiments.vision [--config=FILE[:PRESET]] [--config.KEY=VALUE] [--workdir=DIR]

The presets, with what they reach and how long they take, are in `experiments/configs/vision.py`.
The workdir receives `config.json`, `metrics.jsonl`, `timing.jsonl`, `checkpoints/` and
`accuracy.png`. The same command continues a run that was interrupted.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from attn_lab.data import (
    Images,
    Rows,
    augment,
    load_cifar10,
    load_mnist,
    load_tfds,
    steps_per_epoch,
)
from attn_lab.models import CompactTransformer
from attn_lab.training import (
    PARALLEL,
    Sums,
    compute_dtype,
    cross_entropy,
    fit,
    make_mesh,
    make_optimizer,
    plot_metrics,
    run_main,
)


def load_data(config: ConfigDict) -> Images:
    """MNIST, CIFAR-10, or the TFDS set of the config's name.

    Raises:
      FileNotFoundError: if it is not there.
    """
    folder = Path(config.data_dir)
    if config.dataset == "mnist":
        return load_mnist(folder / "mnist" / "mnist.npz")
    if config.dataset == "cifar10":
        return load_cifar10(folder / "cifar10")
    return load_tfds(config.dataset, data_dir=folder)


def build_model(config: ConfigDict, images: Images) -> CompactTransformer:
    """The model that the config describes, with fresh parameters."""
    size, _, channels = images.shape
    return CompactTransformer(
        num_classes=images.num_classes,
        image_size=size,
        channels=channels,
        dtype=compute_dtype(config.dtype),
        **config.model.to_dict(),
        rngs=nnx.Rngs(config.seed),
    )


def augmented(key: jax.Array, batch: dict, config: ConfigDict, num_classes: int):
    """Images in [0, 1] and label probabilities after the config's augmentation, on the device."""
    settings = config.augment
    keys = jax.random.split(key, 5)
    images = augment.to_unit(batch["image"])
    if settings.crop_scale:
        images = augment.random_resized_crop(keys[0], images, tuple(settings.crop_scale))
    if settings.crop_padding:
        images = augment.random_crop(keys[1], images, settings.crop_padding)
    if settings.flip:
        images = augment.random_flip(keys[2], images)
    if settings.rand_augment:
        images = augment.rand_augment(keys[3], images, magnitude=settings.rand_augment)
    labels = jax.nn.one_hot(batch["label"], num_classes)
    smooth = config.label_smoothing
    labels = (1 - smooth) * labels + smooth / num_classes
    return augment.mixup_cutmix(
        keys[4],
        images,
        labels,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        active=batch["mix"][0],
    )


def make_loss(config: ConfigDict, images: Images):
    """The loss of training (augmented, soft labels) and of evaluation (neither)."""
    scaled = functools.partial(augment.normalize, mean=images.mean, std=images.std)

    def loss_fn(model, batch, rngs) -> Sums:
        if rngs is None:
            logits, _ = model(scaled(augment.to_unit(batch["image"])))
            return cross_entropy(logits, batch["label"])
        pixels, labels = augmented(rngs.augment(), batch, config, images.num_classes)
        logits, _ = model(scaled(pixels), rngs=rngs)
        loss = -jnp.sum(labels * jax.nn.log_softmax(logits))
        return {"loss": (loss, jnp.float32(len(labels)))}

    return loss_fn


def train(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains and reports.

    Returns:
      `test/accuracy` and `test/loss` at the end, `best_test/accuracy` and `images_per_second` (0 if
      nothing was left to train).
    """
    workdir, images = Path(workdir), load_data(config)
    model = build_model(config, images)
    size = config.batch_size
    epoch = steps_per_epoch(len(images.splits["train"]), size)
    steps = round(config.epochs * epoch)
    every = math.ceil(config.eval_epochs * epoch)
    optimizer = config.optimizer.to_dict()
    optimizer["warmup"] = round(config.warmup_epochs * epoch)

    def batch(step):
        def make(rows):
            drawn = images.batch(config.seed, step, batch_size=size, rows=rows)
            return drawn | {"mix": np.full(len(rows), step < config.mix_epochs * epoch)}

        return Rows(size, make)

    result = fit(
        model,
        make_loss(config, images),
        batch,
        make_optimizer(steps, **optimizer),
        steps=steps,
        seed=config.seed,
        evals={"test": lambda _: images.evaluation_batches(batch_size=config.test_batch_size)},
        workdir=workdir,
        config=config,
        log_every=config.log_every,
        eval_every=every,
        checkpoint_every=every,
        mesh=make_mesh(**config.mesh.to_dict()),
        rules=PARALLEL,
        sequence=config.sequence,
        order=config.sequence_order,
        unit=("images", size),
    )
    tested = [row for row in result.rows if "test/accuracy" in row]
    seconds = sum(row["seconds"] for row in result.timing)
    seen = sum(row["seconds"] * row["images_per_second"] for row in result.timing)
    results = {
        "test/accuracy": tested[-1]["test/accuracy"],
        "test/loss": tested[-1]["test/loss"],
        "best_test/accuracy": max(row["test/accuracy"] for row in tested),
        "images_per_second": seen / seconds if seconds else 0.0,
    }
    if jax.process_index() == 0:
        plot_metrics(
            {"run": result.rows}, ["train/loss", "test/accuracy"], workdir / "accuracy.png"
        )
        for name, value in results.items():
            print(f"{name:20} {value:.4f}")
    return results


if __name__ == "__main__":
    run_main(train, Path(__file__).parent / "configs/vision.py", "runs/vision")
