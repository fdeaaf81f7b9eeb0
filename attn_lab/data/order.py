"""The order of a finite data set, computed from a seed and a step instead of remembered."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

IGNORE = -100  # the label of what only fills up a batch


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch that is made when its rows are asked for: each of several hosts makes its own alone.

    Attributes:
      size: the number of rows of the whole batch.
      make: `make(rows)`, with ascending indices `[N]` of rows, gives these as a pytree of arrays
        whose first axis is N.
    """

    size: int
    make: Callable[[np.ndarray], Any]

    def whole(self) -> Any:
        """All rows."""
        return self.make(np.arange(self.size))


def epoch_indices(seed: int, step: int, batch_size: int, size: int) -> np.ndarray:
    """Indices of the examples in batch `step`: every example once an epoch, each epoch shuffled.

    Batches are cut out of the endless sequence of epochs, epoch e being a permutation drawn from
    (seed, e); one batch may hold the end of an epoch and the beginning of the next.

    Args:
      seed, step: at least 0.
      batch_size: B.
      size: number of examples.

    Returns:
      int64 `[B]` in `0 .. size - 1`.

    Raises:
      ValueError: there are no examples.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, size)
    indices = np.empty(batch_size, np.int64)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        indices[here] = _permutation(seed, epoch, size)[offsets[here]]
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(seed, epoch, size):
    return np.random.default_rng((seed, epoch)).permutation(size)


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Number of batches that go once through `size` examples."""
    return -(-size // batch_size)
