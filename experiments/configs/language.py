"""Language models of nanoGPT's shape: no biases, GELU, learned positions, tied head.

    python -m experiments.language --config=experiments/configs/language.py:PRESET --workdir=DIR

reads `data/tinyshakespeare/input.txt` (--config.data_dir says where `data` is). Other texts:
`--config.file=FILE --config.unit=byte` (or character), or an npz file of tokens with
`--config.file=wikitext2/wikitext2.npz --config.unit=token`. Other mixers:
`--config.model.mixers=NAME`, or one name for each layer with commas between them.

| preset | expected validation loss | time |
| --- | --- | --- |
| shakespeare_char_small | 1.88 nats per character at the end | 3 minutes on 2 CPU cores |
| shakespeare_char | 1.4697 at the best evaluation | 2 minutes on one H100 |

The expected losses are those that nanoGPT's readme states (Karpathy 2022,
https://github.com/karpathy/nanoGPT).
"""

from ml_collections import ConfigDict


def get_config(preset: str = "shakespeare_char_small") -> ConfigDict:
    """The config of a preset.

    Raises:
      ValueError: there is no such preset.
    """
    config = ConfigDict(
        {
            "seed": 0,
            "data_dir": "data",
            "file": "tinyshakespeare/input.txt",
            "unit": "character",
            "length": 64,
            "batch_size": 12,
            "accumulate": 1,
            "steps": 2000,
            "dtype": "auto",
            "model": {
                "num_layers": 4,
                "width": 128,
                "mixers": "dot_product_attention",
                "mixer_args": {"num_heads": 4},
                "positions": "learned",
                "bias": False,
                "dropout": 0.0,
                "residual_dropout": 0.0,
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup": 100,
                "floor": 1e-4,
                "betas": (0.9, 0.99),
                "weight_decay": 0.1,
                "decay": "matrices",
                "clip": 1.0,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "seq": 1},
            "sequence": "ring",
            "sequence_order": "contiguous",
            "log_every": 50,
            "eval_every": 250,
            "eval_batches": 20,
            "checkpoint_every": 250,
            "sample": {"prompt": "\n", "temperature": 0.8, "top_k": 200},
        }
    )
    if preset == "shakespeare_char":
        config.update(
            {
                "length": 256,
                "batch_size": 64,
                "steps": 5000,
                "eval_batches": 200,
                "model": {
                    "num_layers": 6,
                    "width": 384,
                    "dropout": 0.2,
                    "residual_dropout": 0.2,
                },
            }
        )
        config.model.mixer_args = {"num_heads": 6, "dropout": 0.2}
    elif preset != "shakespeare_char_small":
        raise ValueError(
            f"preset must be shakespeare_char_small or shakespeare_char; got {preset!r}"
        )
    return config
