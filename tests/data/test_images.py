from pathlib import Path

import numpy as np
import pytest

from attn_lab.data import load_cifar10, load_mnist, load_tfds
from attn_lab.data.images import ArraySource, Images

MNIST = Path(__file__).parent / "mnist.npz"


def numbered(size):
    """Images each of which holds its own number."""
    image = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None, None], (size, 4, 6, 3))
    return ArraySource(image, np.arange(size, dtype=np.uint8) % 10)


@pytest.fixture(scope="module")
def images():
    return Images({"train": numbered(50), "test": numbered(21)}, 10, (0.5,) * 3, (0.25,) * 3)


def test_batches(images):
    seen = []
    for step in range(5):
        batch = images.batch(7, step, batch_size=10)
        assert batch["image"].shape == (10, 4, 6, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (10,) and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] % 10, batch["label"])
        again = images.batch(7, step, batch_size=10)
        np.testing.assert_array_equal(again["image"], batch["image"])
        seen.extend(batch["image"][:, 0, 0, 0])
    assert sorted(seen) == list(range(50)) and seen != sorted(seen)
    assert seen[:10] != list(images.batch(8, 0, batch_size=10)["image"][:, 0, 0, 0])


@pytest.mark.parametrize("batch_size", [1, 7, 8, 50])
def test_evaluation_covers_a_split_once(images, batch_size):
    batches = [rows.whole() for rows in images.evaluation_batches(batch_size=batch_size)]
    assert {b["image"].shape[0] for b in batches} == {batch_size}
    assert all(b["label"].dtype == np.int32 for b in batches)
    image, label = (np.concatenate([b[k] for b in batches]) for k in ("image", "label"))
    np.testing.assert_array_equal(image[label >= 0, 0, 0, 0], np.arange(21))
    np.testing.assert_array_equal(label[:21], np.arange(21) % 10)
    assert (label[21:] == -100).all() and len(label) - 21 < batch_size


def test_rows_of_a_batch_are_those_of_the_whole(images):
    rows = np.array([0, 3, 4])
    last = list(images.evaluation_batches(batch_size=6))[-1]
    for whole, some in (
        (images.batch(7, 2, batch_size=6), images.batch(7, 2, batch_size=6, rows=rows)),
        (last.whole(), last.make(rows)),
    ):
        for name, array in whole.items():
            np.testing.assert_array_equal(some[name], array[rows])


def test_only_the_rows_that_are_asked_for_are_read():
    class Source:
        def __len__(self):
            return 50

        def __getitem__(self, indices):
            assert len(indices) == 2
            return {"image": np.zeros((2, 4, 4, 1), np.uint8), "label": np.zeros(2, np.int32)}

    images = Images({"train": Source(), "test": Source()}, 10, (0.5,), (0.25,))
    images.batch(0, 3, batch_size=8, rows=[2, 5])
    for batch in images.evaluation_batches(batch_size=8):
        batch.make(np.array([0, 7]))


def test_mnist():
    images = load_mnist(MNIST)
    assert images.shape == (28, 28, 1) and images.num_classes == 10
    assert [len(images.splits[s]) for s in ("train", "test")] == [48, 16]
    first = images.splits["train"][np.array([0])]
    assert first["label"] == 5 and first["image"].max() == 255


def write_cifar10(folder, side=2):
    """Mosaics of images which hold their own number, and their labels."""
    from PIL import Image

    count = side * side
    for n, name in enumerate([f"train_{i}" for i in range(1, 6)] + ["test"]):
        tiles = np.arange(n * count, (n + 1) * count, dtype=np.uint8).reshape(side, side)
        mosaic = np.kron(tiles, np.ones((32, 32), np.uint8))
        mosaic = np.stack([mosaic, mosaic + 50, mosaic + 100], -1)
        Image.fromarray(mosaic).save(folder / f"{name}.webp", lossless=True)
    labels = np.arange(6 * count, dtype=np.uint8) % 10
    np.savez(folder / "labels.npz", y_train=labels[: 5 * count], y_test=labels[5 * count :])


def test_cifar10(tmp_path):
    write_cifar10(tmp_path)
    images = load_cifar10(tmp_path)
    assert images.shape == (32, 32, 3)
    train, test = (images.splits[s][np.arange(n)] for s, n in (("train", 20), ("test", 4)))
    want = np.arange(24)[:, None, None, None] + [0, 50, 100]
    want = np.broadcast_to(want, (24, 32, 32, 3))
    np.testing.assert_array_equal(np.concatenate([train["image"], test["image"]]), want)
    got = np.concatenate([train["label"], test["label"]])
    np.testing.assert_array_equal(got, np.arange(24) % 10)


def test_cifar10_with_something_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist: give a directory"):
        load_cifar10(tmp_path / "absent")
    write_cifar10(tmp_path)
    (tmp_path / "train_3.webp").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_3\.webp does not exist"):
        load_cifar10(tmp_path)
    write_cifar10(tmp_path)
    np.savez(tmp_path / "labels.npz", y_train=np.zeros(19), y_test=np.zeros(4))
    with pytest.raises(ValueError, match="20 and 19"):
        load_cifar10(tmp_path)


def test_missing_mnist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz does not exist: give the path"):
        load_mnist(tmp_path / "mnist.npz")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyDigits(tfds.core.GeneratorBasedBuilder):
        """The digits of the tests' MNIST file."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split):
            source = load_mnist(MNIST).splits[split]
            for i in range(len(source)):
                example = source[np.array([i])]
                yield i, {"image": example["image"][0], "label": int(example["label"][0])}

    path = tmp_path_factory.mktemp("tfds")
    builder = TinyDigits(data_dir=path, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return path


def test_tfds(tfds_dir):
    images = load_tfds("tiny_digits", data_dir=tfds_dir, train="train[:40]")
    assert images.shape == (28, 28, 1) and images.num_classes == 10
    assert [len(images.splits[s]) for s in ("train", "test")] == [40, 16]
    batch = images.batch(0, 0, batch_size=40)
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    (rows,) = images.evaluation_batches(batch_size=16)
    tested = rows.whole()
    source = load_mnist(MNIST).splits["test"][np.arange(16)]
    known = {image.tobytes(): label for image, label in zip(source["image"], source["label"])}
    stored = {image.tobytes(): label for image, label in zip(tested["image"], tested["label"])}
    assert stored == known


def test_tfds_that_is_not_there(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match="no_such_digits"):
        load_tfds("no_such_digits", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.* does not exist: prepare 'mnist'"):
        load_tfds("mnist", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())
