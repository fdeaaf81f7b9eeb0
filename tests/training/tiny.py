"""A small classifier and its data, and a training run of it as a program."""

import sys
import time

import jax
import numpy as np
from flax import nnx

from attn_lab.training import cross_entropy, fit, make_optimizer


class Tiny(nnx.Module):
    """Two layers with dropout, a normalisation with running statistics and a frozen table."""

    def __init__(self, rngs, dropout=0.0, batch_norm=False):
        self.up = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs) if batch_norm else None
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x, rngs=None):
        x = jax.nn.gelu(self.up(x))
        if self.norm is not None:
            x = self.norm(x)
        return self.down(self.dropout(x, rngs=rngs, deterministic=rngs is None))


def loss_fn(model, batch, rngs):
    return cross_entropy(model(batch["x"], rngs), batch["label"])


def make_batch(step, seed=0, size=8, unlabelled=0.3):
    rng = np.random.default_rng([seed, step])
    x = rng.normal(size=(size, 4)).astype(np.float32)
    label = np.where(rng.random(size) < unlabelled, -100, x.argmax(-1)).astype(np.int32)
    return {"x": x, "label": label}


def run(workdir, *, steps=60, pause=0.0, config=None, **kwargs):
    """Trains for `steps` updates with everything that a run can have switched on."""

    def batch(step):
        time.sleep(pause)
        return make_batch(step)

    return fit(
        Tiny(nnx.Rngs(0), dropout=0.2, batch_norm=True),
        loss_fn,
        batch,
        make_optimizer(
            steps, learning_rate=1e-2, schedule="cosine", warmup=5, weight_decay=0.1, clip=1.0
        ),
        **{
            "steps": steps,
            "evals": {"valid": lambda step: [make_batch(i, seed=1) for i in range(3)]},
            "workdir": workdir,
            "config": {"steps": steps} if config is None else config,
            "log_every": 7,
            "eval_every": 10,
            "checkpoint_every": 8,
            "progress_seconds": 0,
        }
        | kwargs,
    )


if __name__ == "__main__":
    run(sys.argv[1], pause=float(sys.argv[2]))
