import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.data import epoch_indices, steps_per_epoch


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_example_once_an_epoch(size, batch_size, seed):
    epochs = 3
    steps = -(-epochs * size // batch_size)
    order = np.concatenate([epoch_indices(seed, step, batch_size, size) for step in range(steps)])
    for epoch in order[: epochs * size].reshape(epochs, size):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))


def test_any_step_can_be_asked_at_any_time():
    forwards = [epoch_indices(0, step, 32, 100) for step in range(30)]
    for step in reversed(range(30)):
        np.testing.assert_array_equal(epoch_indices(0, step, 32, 100), forwards[step])


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_indices(s, epoch, 50, 50)) for s in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("size, batch_size, steps", [(10, 5, 2), (11, 5, 3), (3, 5, 1)])
def test_steps_per_epoch(size, batch_size, steps):
    assert steps_per_epoch(size, batch_size) == steps


def test_no_examples():
    with pytest.raises(ValueError, match="size"):
        epoch_indices(0, 0, 4, 0)
