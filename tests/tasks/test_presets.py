import itertools

import jax
import pytest

from attn_lab.tasks import mqar
from attn_lab.tasks.presets import recall_memory, zoology_figure2

PARTS = [
    *(
        (length, s["num_kv_pairs"], zoology_figure2)
        for length, s in zoology_figure2["settings"].items()
    ),
    *((length, pairs, recall_memory) for length, pairs, _ in recall_memory["train"]),
    *((length, pairs, recall_memory) for length, pairs, _ in recall_memory["test"]),
]


@pytest.mark.parametrize("length, pairs, preset", PARTS)
def test_every_part_can_be_generated(length, pairs, preset):
    draw = jax.eval_shape(
        lambda: mqar(jax.random.key(0), 3, seq_len=length, num_kv_pairs=pairs, **preset["data"])
    )
    assert draw["inputs"].shape == (3, length)


def test_there_is_a_published_number_for_every_width_and_length():
    for by_length in zoology_figure2["published"].values():
        assert set(by_length) == set(zoology_figure2["settings"])
        assert {len(row) for row in by_length.values()} == {len(zoology_figure2["widths"])}


def test_learning_rates_are_evenly_spaced_in_the_logarithm():
    for rates in zoology_figure2["learning_rates"], recall_memory["learning_rates"]:
        ratios = [b / a for a, b in itertools.pairwise(rates)]
        assert ratios == pytest.approx([ratios[0]] * 3)
