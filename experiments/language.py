"""Language modelling on a real text: `python -m experiments.language --config=FILE[:PRESET]`.

The presets, with what they reach and how long they take, are in `experiments/configs/language.py`.
The workdir receives `config.json`, `metrics.jsonl`, `timing.jsonl`, `checkpoints/`, `loss.png` and
`sample.txt`. The same command continues a run that was interrupted.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from attn_lab.data.order import Rows
from attn_lab.data.text import Text, load_text, load_tokens
from attn_lab.models import DecoderLM, generate
from attn_lab.training import (
    PARALLEL,
    Result,
    compute_dtype,
    cross_entropy,
    fit,
    make_mesh,
    make_optimizer,
    plot_metrics,
    run_main,
)


def load_data(config: ConfigDict) -> Text:
    """The text that the config names, as bytes, characters or the tokens of an npz file.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = Path(config.data_dir) / config.file
    return load_tokens(path) if config.unit == "token" else load_text(path, unit=config.unit)


def build_model(config: ConfigDict, vocab_size: int) -> DecoderLM:
    """The decoder that the config describes, with fresh parameters."""
    arguments = config.model.to_dict()
    mixers = arguments.pop("mixers").split(",")
    return DecoderLM(
        vocab_size=vocab_size,
        max_len=config.length,
        mixers=mixers if len(mixers) > 1 else mixers[0],
        **arguments,
        dtype=compute_dtype(config.dtype),
        rngs=nnx.Rngs(config.seed),
    )


def loss_fn(model, batch, rngs):
    """Next-token cross-entropy."""
    logits, _ = model(batch["inputs"], rngs=rngs)
    return cross_entropy(logits, batch["targets"])


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, reports and samples.

    Returns:
      `train/loss`, `valid/loss` (nats per token, at the end), `best_valid/loss` (the lowest of all
      evaluations), `valid/perplexity` (per token), `valid/bits_per_byte`, `tokens_per_second`
      (0 if nothing was left to train) and `sample`.
    """
    workdir = Path(workdir)
    text = load_data(config)
    model = build_model(config, text.vocab_size)
    prompt = text.encode(config.sample.prompt)
    if not 0 < len(prompt) < config.length:
        raise ValueError(
            f"sample.prompt must have 1 to {config.length - 1} tokens; got {len(prompt)}"
        )
    crops = {"batch_size": config.batch_size, "length": config.length}

    def rows_of(seed, step, split="train"):
        make = functools.partial(text.batch, seed, step, **crops, split=split)
        return Rows(config.batch_size, lambda rows: make(rows=rows))

    def evaluation(split):
        def batches(step):
            if not config.eval_batches:
                return text.evaluation_batches(**crops, split=split)
            first = step * config.eval_batches
            draws = range(first, first + config.eval_batches)
            return (rows_of(config.seed + 1, draw, split=split) for draw in draws)

        return batches

    result = fit(
        model,
        loss_fn,
        functools.partial(rows_of, config.seed),
        make_optimizer(config.steps, **config.optimizer.to_dict()),
        steps=config.steps,
        seed=config.seed,
        evals={"eval_train": evaluation("train"), "valid": evaluation("valid")},
        workdir=workdir,
        config=config,
        log_every=config.log_every,
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        accumulate=config.accumulate,
        mesh=make_mesh(**config.mesh.to_dict()),
        rules=PARALLEL,
        sequence=config.sequence,
        order=config.sequence_order,
        unit=("tokens", config.batch_size * config.length),
    )
    results = summarize(result, text)
    tokens = generate(
        result.model,
        jnp.asarray(prompt)[None],
        max_new_tokens=config.length - len(prompt),
        key=jax.random.key(config.seed),
        temperature=config.sample.temperature,
        top_k=config.sample.top_k,
    )
    results["sample"] = text.decode(jax.device_get(tokens[0]))
    if jax.process_index() == 0:
        (workdir / "sample.txt").write_text(results["sample"])
        plot_metrics({"run": result.rows}, ["train/loss", "valid/loss"], workdir / "loss.png")
        for name, value in results.items():
            print(f"{name}\n{value}" if name == "sample" else f"{name:22} {value:.4f}")
    return results


def summarize(result: Result, text: Text) -> dict[str, float]:
    """Losses, perplexity, bits per byte and speed of a run."""
    losses = [row["valid/loss"] for row in result.rows if "valid/loss" in row]
    seconds = sum(row["seconds"] for row in result.timing)
    tokens = sum(row["seconds"] * row["tokens_per_second"] for row in result.timing)
    return {
        "train/loss": result.rows[-1]["eval_train/loss"],
        "valid/loss": losses[-1],
        "best_valid/loss": min(losses),
        "valid/perplexity": math.exp(losses[-1]),
        "valid/bits_per_byte": losses[-1] / math.log(2) / text.bytes_per_token("valid"),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
    }


if __name__ == "__main__":
    config_file = Path(__file__).parent / "configs/language.py"
    run_main(train, config_file, "runs/language")
