"""Labelled images."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from attn_lab.data.files import existing
from attn_lab.data.order import IGNORE, Rows, epoch_indices


class Source(Protocol):
    """Examples by index: `source[indices]` is `{"image" [B, Y, X, C], "label" [B]}`."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, cut into splits.

    Attributes:
      splits: the examples by the name of their split, such as "train" and "test".
      num_classes: labels are in `0 .. num_classes - 1`.
      mean, std: of each channel over the training pixels, in units of 255.
    """

    splits: Mapping[str, Source]
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(Y, X, C)` of an image."""
        return next(iter(self.splits.values()))[np.arange(1)]["image"].shape[1:]

    def batch(
        self,
        seed: int,
        step: int,
        *,
        batch_size: int,
        split: str = "train",
        rows: Sequence[int] | slice = slice(None),
    ) -> dict[str, np.ndarray]:
        """Batch `step` of the split in the order of `epoch_indices`: each example once an epoch.

        Returns:
          `{"image": uint8 [batch_size, Y, X, C], "label": int32 [batch_size]}`, or `rows` of it.
        """
        source = self.splits[split]
        return source[epoch_indices(seed, step, batch_size, len(source))[rows]]

    def evaluation_batches(self, *, batch_size: int, split: str = "test") -> Iterator[Rows]:
        """The split once, in order; the last batch is filled with examples of label -100.

        Yields:
          `{"image": uint8 [batch_size, Y, X, C], "label": int32 [batch_size]}`, as `Rows`.
        """
        source = self.splits[split]

        def examples(first, rows):
            indices = first + rows
            batch = source[indices.clip(max=len(source) - 1)]
            batch["label"] = np.where(indices < len(source), batch["label"], np.int32(IGNORE))
            return batch

        for first in range(0, len(source), batch_size):
            yield Rows(batch_size, functools.partial(examples, first))


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Examples in memory: `image` uint8 `[N, Y, X, C]`, `label` int32 `[N]`."""

    image: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.image[indices], "label": self.label[indices].astype(np.int32)}


@dataclass(frozen=True, eq=False)
class TfdsSource:
    """Examples of a random-access TFDS source, read from disk when they are asked for."""

    source: Any
    keys: tuple[str, str]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        examples = self.source.__getitems__([int(i) for i in indices])
        image, label = ([example[key] for example in examples] for key in self.keys)
        shapes = {x.shape for x in image}
        if len(shapes) > 1:
            raise ValueError(f"images must have one shape; got {sorted(shapes)[:2]}")
        return {"image": np.stack(image), "label": np.array(label, np.int32)}


def load_mnist(path: str | Path) -> Images:
    """MNIST: 60,000 training and 10,000 test digits, 28 x 28 x 1.

    Args:
      path: npz file with `x_train`, `y_train`, `x_test`, `y_test` (the layout that Keras uses).

    Raises:
      FileNotFoundError: there is no such file.

    Source: LeCun, Bottou, Bengio, Haffner, 1998.
    """
    path = existing(path, "give the path of mnist.npz, with x_train, y_train, x_test and y_test")
    with np.load(path) as file:
        splits = {
            split: ArraySource(file[f"x_{split}"][..., None], file[f"y_{split}"])
            for split in ("train", "test")
        }
    return Images(splits, 10, mean=(0.1307,), std=(0.3081,))


def load_cifar10(directory: str | Path) -> Images:
    """CIFAR-10: 50,000 training and 10,000 test photographs, 32 x 32 x 3; needs Pillow.

    Args:
      directory: holds `train_1.webp` to `train_5.webp` and `test.webp`, each a lossless square
        mosaic of n x n images in row-major order, and `labels.npz` with `y_train` and `y_test`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a split has not as many images as labels.

    Source: Krizhevsky, 2009.
    """
    files = {"train": [f"train_{i}.webp" for i in range(1, 6)], "test": ["test.webp"]}
    remedy = "give a directory with train_1.webp to train_5.webp, test.webp and labels.npz"
    directory = existing(directory, remedy)
    splits = {}
    with np.load(existing(directory / "labels.npz", remedy)) as labels:
        for split, names in files.items():
            image = np.concatenate([_mosaic(existing(directory / n, remedy)) for n in names])
            label = labels[f"y_{split}"]
            if len(image) != len(label):
                raise ValueError(
                    f"{directory} must hold as many {split} images as labels; "
                    f"got {len(image)} and {len(label)}"
                )
            splits[split] = ArraySource(image, label)
    return Images(
        splits,
        10,
        mean=(0.49139968, 0.48215841, 0.44653091),
        std=(0.24703223, 0.24348513, 0.26158784),
    )


def _mosaic(path, size=32):
    from PIL import Image

    with Image.open(path) as file:
        mosaic = np.asarray(file.convert("RGB"))
    side = len(mosaic) // size
    tiles = mosaic.reshape(side, size, side, size, 3).swapaxes(1, 2)
    return tiles.reshape(-1, size, size, 3)


def load_tfds(
    name: str,
    *,
    data_dir: str | Path | None = None,
    train: str = "train",
    test: str = "test",
    download: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Images:
    """Any image classification set of TensorFlow Datasets, without TensorFlow.

    The set must be stored in a random-access format (array_record) and hold images of one shape.

    Args:
      name: such as "cifar100" or "my_set:1.0.0".
      data_dir: where TFDS keeps its data, by default its own choice.
      train, test: TFDS split expressions, such as "train[:90%]".
      download: whether a set that is not there is downloaded and prepared.
      mean, std: of each channel in units of 255, by default 1/2.

    Raises:
      FileNotFoundError: the set is not there.
      ValueError: the set has no image and label.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"TFDS knows no data set {name!r} and {data_dir or 'its data directory'} holds none"
        ) from error
    if not Path(builder.data_dir).exists():
        if not download:
            raise FileNotFoundError(
                f"{builder.data_dir} does not exist: prepare {name!r} with "
                'file_format="array_record", or ask for its download'
            )
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    features = builder.info.features
    keys = builder.info.supervised_keys or ("image", "label")
    if len(keys) != 2 or not set(keys) <= set(features):
        raise ValueError(f"{name!r} must hold an image and a label; got {sorted(features)}")
    splits = {
        split: TfdsSource(builder.as_data_source(split=expression), keys)
        for split, expression in {"train": train, "test": test}.items()
    }
    channels = features[keys[0]].shape[-1]
    half = (0.5,) * channels
    return Images(splits, features[keys[1]].num_classes, mean or half, std or half)
