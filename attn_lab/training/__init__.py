"""Training: mesh and sharding rules, optimizer, jitted train step, loop, checkpoints, metrics."""

from attn_lab.training.config import claim_workdir, run_main
from attn_lab.training.loop import Result, fit
from attn_lab.training.losses import Sums, cross_entropy
from attn_lab.training.metrics import plot_metrics, read_metrics
from attn_lab.training.optimizer import Optimizer, make_optimizer, make_schedule
from attn_lab.training.sharding import (
    FSDP,
    PARALLEL,
    REPLICATED,
    make_mesh,
    shard_batch,
    state_sharding,
)
from attn_lab.training.step import (
    TrainState,
    compute_dtype,
    create_state,
    evaluate,
    make_train_step,
    on_mesh,
)

__all__ = [
    "FSDP",
    "PARALLEL",
    "REPLICATED",
    "Optimizer",
    "Result",
    "Sums",
    "TrainState",
    "claim_workdir",
    "compute_dtype",
    "create_state",
    "cross_entropy",
    "evaluate",
    "fit",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "on_mesh",
    "plot_metrics",
    "read_metrics",
    "run_main",
    "shard_batch",
    "state_sharding",
]
