"""Text and images; every batch is a function of (seed, step) alone."""

from attn_lab.data.images import Images, load_cifar10, load_mnist, load_tfds
from attn_lab.data.order import Rows, epoch_indices, steps_per_epoch
from attn_lab.data.text import Text, load_text, load_tokens

__all__ = [
    "Images",
    "Rows",
    "Text",
    "epoch_indices",
    "load_cifar10",
    "load_mnist",
    "load_text",
    "load_tfds",
    "load_tokens",
    "steps_per_epoch",
]
