"""Which blocks the kernel of attention for GPUs is fastest with.

    python -m experiments.tune --workdir=DIR

- (no preset): head dimensions 64, 128 and 256, bfloat16, all kinds of calls, at 32,768 tokens of 16
  heads. Most of the time is compilation, by `config.processes`.

`--config.install=True` writes the table into the package as well.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config."""
    return ConfigDict(
        {
            "dims": (64, 128, 256),
            "dtypes": ("bfloat16",),
            "kinds": ("plain", "modified", "weights"),
            "batch": 4,
            "length": 8192,
            "heads": 16,
            "repeats": 4,
            "processes": 12,
            "install": False,
        }
    )
