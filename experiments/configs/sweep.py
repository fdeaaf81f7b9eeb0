"""Sweeps by name: `python -m experiments.sweep --sweep=experiments/configs/sweep.py:NAME`.

- recall (default): three mixers of the quick recall preset, each at three learning rates and two
  seeds: 18 runs of about a minute on 2 CPU cores. `--plot=learning_rates,mixers --metric=accuracy`.
- tiny: 24 recall runs of 20 steps, which show that a sweep works before a large one starts.
"""

from experiments.sweep import Sweep, over, product, zip

RECALL = "experiments/configs/recall.py:quick"


def get_sweep(name: str = "recall") -> Sweep:
    """The sweep of that name.

    Raises:
      ValueError: there is none.
    """
    rates = over("learning_rates", [(1e-3,), (2.15e-3,), (1e-2,)])
    if name == "recall":
        mixers = over("mixers", ["softmax", "base_conv", "delta_rule"])
        return Sweep("recall", RECALL, product(mixers, rates, over("seed", range(2))))
    if name == "tiny":
        mixers = zip(over("mixers", ["softmax", "sliding_window"]), over("widths", [(16,), (8,)]))
        return Sweep("recall", RECALL, product(mixers, rates, over("seed", range(4))), TINY)
    raise ValueError(f"the sweep must be recall or tiny; got {name!r}")


TINY = {
    "task.vocab": 32,
    "train": ((16, 2, 100),),
    "test": ((16, 2, 30),),
    "batch_size": 8,
    "test_batch_size": 30,
    "steps": 20,
    "eval_every": 5,
    "checkpoint_every": 5,
    "model.num_layers": 1,
    "state_length": 16,
}
