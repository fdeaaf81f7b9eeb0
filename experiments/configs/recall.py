"""Multi-query associative recall (Arora et al., Zoology, 2023, arXiv 2312.04927).

    python -m experiments.recall --config=experiments/configs/recall.py:PRESET --workdir=DIR

- quick (default): five mixers at length 32 with 4 pairs, width 64. Softmax attention goes above
  0.99, the convolutions stay near guessing among the values seen. 3 minutes on 2 CPU cores.
- zoology_figure2: length 64 with 4 pairs, softmax attention, h3 and base_conv_4, four widths and
  four learning rates. Published: attention 1.00 at every width; h3 0.93, 1.00, 0.99, 0.99 and
  base_conv 0.70, 0.94, 0.97, 1.00 at widths 64, 128, 256, 512.
- zoology_figure2_128, _256, _512: other lengths, with 8, 16 and 64 pairs. Published: attention
  1.00; base_conv 0.37 to 0.97, 0.14 to 0.94, 0.01 to 0.71 from width 64 to 512.
- recall_memory: lengths to 1024 with up to 256 pairs, after training on lengths to 256 with up to
  64. Published, at equal state: delta rules above gated linear attention above sliding windows.
- recurrent: every mixer that carries a state instead of all keys, and softmax beside them, on the
  task of `quick`: a gated short convolution, then the mixer, 400 steps each. The state is counted
  at length 1024. 40 minutes on 2 CPU cores.

`--config.mixers=a,b` takes any names of `config.models` or `attn_lab.nn.MIXERS`;
`--config.widths="(64, 128)"` and `--config.learning_rates="(1e-3,)"` narrow or widen the sweep. The
published numbers were read off the authors' figure, to about 0.02; they trained all but attention
with four layers at first, which are `base_conv_4` and `h3_4`, and with two later.
"""

from ml_collections import ConfigDict

from attn_lab.tasks import presets

SHORT_CONV = {"short_conv": 4, "qk_norm": "l2"}
RECURRENT = (
    "linear_attention",
    "retention",
    "gated_linear_attention",
    "delta_rule",
    "gated_delta_rule",
    "refined_gated_linear_attention",
    "ssd",
    "lightning_attention",
    "norm_linear_attention",
    "block_diagonal_attention",
    "flow_attention",
    "linear_log_normal_attention",
    "linear_log_normal_diag_attention",
    "fastmax_attention",
    "latte_attention",
    "sparse_state_expansion",
    "local_linear_attention",
    "adaptive_filter_attention",
    "mega",
    "megalodon",
    "wkv",
    "neural_memory_mlp",
    "base_conv",
    "h3",
    "hyena",
    "selective_lookup",
    "grassmann_mixing",
    "gated_associative_memory",
    "mixed_chunk_attention",
)


def get_config(preset: str = "quick") -> ConfigDict:
    """The config of a preset.

    Raises:
      ValueError: there is no such preset.
    """
    config = ConfigDict(
        {
            "seed": 0,
            "task": {"vocab": 64, "power": 0.01, "random_fill": False},
            "train": ((32, 4, 20_000),),
            "test": ((32, 4, 1_000),),
            "batch_size": 128,
            "test_batch_size": 500,
            "steps": 2000,
            "epochs": 0,
            "eval_every": 50,
            "checkpoint_every": 250,
            "stop_accuracy": 0.99,
            "state_length": 32,
            "dtype": "float32",
            "matmul_precision": "default",
            "mixers": "softmax,sliding_window,base_conv,gated_linear_attention,delta_rule",
            "widths": (64,),
            "learning_rates": (2.15e-3,),
            "model": {
                "num_layers": 2,
                "mlp": "identity",
                "positions": None,
                "dropout": 0.1,
            },
            "models": models(),
            "optimizer": {
                "schedule": "constant",
                "weight_decay": 0.1,
                "betas": (0.9, 0.999),
            },
        }
    )
    name, _, length = preset.rpartition("_")
    if preset == "zoology_figure2" or (name == "zoology_figure2" and length.isdigit()):
        zoology(config, 64 if preset == "zoology_figure2" else int(length))
    elif preset == "recall_memory":
        recall_memory(config)
    elif preset == "recurrent":
        recurrent(config)
    elif preset != "quick":
        raise ValueError(
            "preset must be quick, recurrent, zoology_figure2[_128, _256, _512] or recall_memory; "
            f"got {preset!r}"
        )
    return config


def models() -> dict:
    """The models of the quick preset and of figure 2: settings of `DecoderLM` by name."""
    attention = {"num_heads": 1, "bias": True, "out_bias": True, "dropout": 0.1}
    convolutions = [{"kernel_size": 3}, {"kernel_size": -1}]
    return {
        "softmax": {
            "mixers": "dot_product_attention",
            "mixer_args": attention,
            "positions": "learned",
        },
        "sliding_window": {
            "mixers": "dot_product_attention",
            "mixer_args": attention | {"window": 8},
        },
        "base_conv": {"mixer_args": convolutions},
        "base_conv_4": {"mixers": "base_conv", "mixer_args": 2 * convolutions, "num_layers": 4},
        "gated_linear_attention": {
            "mixer_args": {
                "num_heads": 1,
                "gate": "scalar",
                "expand_k": 1.0,
                "activation": "silu",
                "output_gate": None,
                **SHORT_CONV,
            }
        },
        "delta_rule": {"mixer_args": {"num_heads": 1, **SHORT_CONV}},
    }


def zoology(config: ConfigDict, length: int) -> None:
    """Figure 2 of Zoology at one length."""
    preset = presets.zoology_figure2
    if length not in preset["settings"]:
        raise ValueError(f"zoology_figure2 has lengths {list(preset['settings'])}; got {length}")
    setting = preset["settings"][length]
    pairs = setting["num_kv_pairs"]
    h3 = {"mixers": "h3", "mixer_args": {"d_state": length, "head_dim": 2}}
    config.models.update(h3=h3, h3_4=h3 | {"num_layers": 4})
    config.update(
        task=preset["data"],
        train=((length, pairs, preset["train_examples"]),),
        test=((length, pairs, preset["test_examples"]),),
        batch_size=setting["batch_size"],
        epochs=preset["epochs"],
        eval_every=0,
        checkpoint_every=0,
        stop_accuracy=preset["stop_accuracy"],
        matmul_precision="highest",
        state_length=length,
        mixers="softmax,h3,base_conv_4",
        widths=preset["widths"],
        learning_rates=preset["learning_rates"],
        optimizer={"schedule": preset["schedule"], "weight_decay": preset["weight_decay"]},
    )


def recall_memory(config: ConfigDict) -> None:
    """Recall against the size of the state: a short convolution, then the mixer under test."""
    preset = presets.recall_memory
    config.update(
        task=preset["data"],
        train=tuple(preset["train"]),
        test=tuple(preset["test"]),
        batch_size=preset["batch_size"],
        test_batch_size=preset["test_batch_size"],
        epochs=preset["epochs"],
        eval_every=0,
        checkpoint_every=0,
        stop_accuracy=preset["stop_accuracy"],
        matmul_precision="highest",
        state_length=preset["state_length"],
        widths=(),
        learning_rates=preset["learning_rates"],
        optimizer={"schedule": preset["schedule"], "weight_decay": preset["weight_decay"]},
    )
    tested = {"softmax": ("attention", "dot_product_attention", {})}
    for window in preset["windows"]:
        own = {"window": window}
        tested[f"sliding_window_{window}"] = ("sliding_window", "dot_product_attention", own)
    recurrent = {"output_gate": None, **SHORT_CONV, "activation": "silu"}
    tested["gated_linear_attention"] = ("gated_linear_attention",) * 2 + (recurrent,)
    tested["delta_rule"] = ("delta_rule",) * 2 + (SHORT_CONV,)
    gated = {"short_conv": 4, "output_gate": False}
    tested["gated_delta_rule"] = ("gated_delta_rule",) * 2 + (gated,)
    config.models = {
        name: {
            "mixers": ["base_conv", mixer],
            "mixer_args": [{}, {"num_heads": preset["num_heads"][row], **arguments}],
            "widths": preset["widths"][row],
        }
        for name, (row, mixer, arguments) in tested.items()
    }
    config.mixers = ",".join(tested)


def recurrent(config: ConfigDict) -> None:
    """Every recurrent mixer by name, within a fixed small number of steps."""
    names = "dot_product_attention", *RECURRENT
    config.update(steps=400, state_length=1024, mixers=",".join(names), models={})
    config.models = {name: {"mixers": ["base_conv", name]} for name in names}
