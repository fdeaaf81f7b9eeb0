"""Published experiments on the tasks, as data: settings and the numbers they gave."""

# Arora, Eyuboglu, et al., Zoology, 2023, arXiv 2312.04927, figure 2. `published` was read off the
# figure, to about 0.02: best test accuracy over the learning rates at each width.
zoology_figure2 = {
    "data": {"vocab": 8192, "power": 0.01, "random_fill": False},
    "train_examples": 100_000,
    "test_examples": 3_000,
    # Sequence length: number of pairs, batch size.
    "settings": {
        64: {"num_kv_pairs": 4, "batch_size": 512},
        128: {"num_kv_pairs": 8, "batch_size": 512},
        256: {"num_kv_pairs": 16, "batch_size": 256},
        512: {"num_kv_pairs": 64, "batch_size": 128},
    },
    "widths": (64, 128, 256, 512),
    "learning_rates": (1e-4, 10 ** (-10 / 3), 10 ** (-8 / 3), 1e-2),
    "epochs": 64,
    "num_layers": 2,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "betas": (0.9, 0.999),
    "dropout": 0.1,
    "stop_accuracy": 0.99,
    "published": {
        "attention": {
            64: (1.0, 1.0, 1.0, 1.0),
            128: (1.0, 1.0, 1.0, 1.0),
            256: (1.0, 1.0, 1.0, 1.0),
            512: (1.0, 1.0, 1.0, 1.0),
        },
        "hyena": {
            64: (0.52, 0.75, 0.84, 0.86),
            128: (0.18, 0.64, 0.74, 0.84),
            256: (0.05, 0.13, 0.54, 0.69),
            512: (0.01, 0.03, 0.10, 0.17),
        },
        "rwkv4": {
            64: (0.76, 0.94, 0.97, 0.99),
            128: (0.18, 0.50, 0.76, 0.93),
            256: (0.05, 0.06, 0.67, 0.79),
            512: (0.01, 0.02, 0.15, 0.37),
        },
        "h3": {
            64: (0.93, 1.0, 0.99, 0.99),
            128: (0.25, 0.73, 0.91, 0.76),
            256: (0.10, 0.64, 0.62, 0.67),
            512: (0.01, 0.02, 0.02, 0.09),
        },
        "base_conv": {
            64: (0.70, 0.94, 0.97, 1.0),
            128: (0.37, 0.61, 0.84, 0.97),
            256: (0.14, 0.33, 0.81, 0.94),
            512: (0.01, 0.03, 0.10, 0.71),
        },
    },
}

# Arora, Eyuboglu, Zhang, et al., Based, 2024, arXiv 2402.18668: recall against the size of the
# state at length 1024, 4 bytes a number. `published` holds (bytes, accuracy) read off a figure.
recall_memory = {
    "data": {"vocab": 8192, "power": 0.01, "random_fill": True},
    # An epoch goes through the parts in this order: sequence length, pairs, examples.
    "train": (
        (64, 4, 100_000),
        (128, 8, 20_000),
        (256, 16, 20_000),
        (256, 32, 20_000),
        (256, 64, 20_000),
    ),
    "test": (
        (64, 4, 1_000),
        (64, 8, 1_000),
        (64, 16, 1_000),
        (128, 32, 1_000),
        (256, 64, 1_000),
        (512, 128, 1_000),
        (1024, 256, 1_000),
    ),
    "batch_size": 256,
    "test_batch_size": 32,
    "widths": {
        "attention": (64, 128),
        "sliding_window": (128,),
        "gated_linear_attention": (64, 128, 256),
        "delta_rule": (64, 128, 256),
        "gated_delta_rule": (64, 128, 256),
    },
    "windows": (8, 16, 32, 64, 128, 256, 512, 1024),
    "num_heads": {
        "attention": 1,
        "sliding_window": 1,
        "gated_linear_attention": 2,
        "delta_rule": 2,
        "gated_delta_rule": 2,
    },
    "learning_rates": (1e-3, 10**-2.5, 1e-2, 10**-1.5),
    "epochs": 32,
    "num_layers": 2,
    "schedule": "cosine",
    "weight_decay": 0.1,
    "betas": (0.9, 0.999),
    "dropout": 0.1,
    "stop_accuracy": 0.99,
    "state_length": 1024,
    "published": {
        "attention": ((5.25e5, 1.0),),
        "sliding_window": (
            (9.7e3, 0.08),
            (1.8e4, 0.145),
            (3.4e4, 0.31),
            (6.7e4, 0.515),
            (1.3e5, 0.656),
            (2.6e5, 0.797),
            (5.2e5, 0.936),
        ),
        "based": (
            (9.4e3, 0.667),
            (1.2e4, 0.719),
            (2.5e4, 0.84),
            (4.0e4, 0.913),
            (7.9e4, 0.987),
            (1.5e5, 0.99),
            (5.8e5, 1.0),
        ),
        "mamba": ((2.4e4, 0.70), (4.9e4, 0.76), (9.8e4, 0.86)),
        "mamba2": (
            (8.2e3, 0.52),
            (1.6e4, 0.69),
            (3.3e4, 0.784),
            (6.5e4, 0.832),
            (9.8e4, 0.844),
        ),
        "gated_linear_attention": ((4.9e3, 0.53), (1.8e4, 0.77), (6.8e4, 0.95)),
        "delta_rule": ((8.9e3, 0.79), (3.4e4, 0.963), (1.34e5, 0.995)),
        "gated_delta_rule": ((1.7e4, 0.89), (6.7e4, 0.988), (2.6e5, 0.993)),
        "rwkv7": ((1.7e4, 0.816), (1.3e5, 0.914), (1.0e6, 0.98)),
        "hyena": ((5.2e5, 0.185), (1.0e6, 0.30), (2.1e6, 0.41)),
    },
}
