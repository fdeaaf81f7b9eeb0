"""Another library's version of a mechanism, to be timed beside ours: flash-linear-attention.

It needs a GPU, and PyTorch and `fla-core` beside JAX; nothing here is imported before it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax

from attn_lab.catalogue import Mechanism

NAME = "fla"
# of a row: the module of fla.ops, its function, and its names for our arguments
FUNCTIONS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "linear_attention": ("linear_attn", "chunk_linear_attn", {}),
    "retention": ("retention", "chunk_retention", {}),
    "gated_linear_attention": ("gla", "chunk_gla", {"log_decay": "g"}),
    "delta_rule": ("delta_rule", "chunk_delta_rule", {}),
    "gated_delta_rule": ("gated_delta_rule", "chunk_gated_delta_rule", {"log_decay": "g"}),
}


def has_peer(row: Mechanism) -> bool:
    """Whether the library has the mechanism, and both it and a GPU are there."""
    there = jax.default_backend() == "gpu" and importlib.util.find_spec("fla") is not None
    return there and row.name in FUNCTIONS


class Call:
    """The peer of a row on example arrays: a function without arguments, for a clock to wait on.

    Args:
      row: the mechanism, of which there `has_peer`.
      arrays: the arguments, which stay where they are on the device.
      backward: whether a call also computes the gradients of all arguments.
    """

    def __init__(self, row: Mechanism, arrays: Mapping[str, jax.Array], backward: bool):
        import torch

        module, name, names = FUNCTIONS[row.name]
        self.torch, self.backward = torch, backward
        self.function = getattr(importlib.import_module(f"fla.ops.{module}"), name)
        self.tensors = {}
        for argument, x in arrays.items():
            tensor = torch.from_dlpack(x).detach()
            self.tensors[names.get(argument, argument)] = tensor.requires_grad_(backward)
        self.keywords = {}
        if row.name == "linear_attention":
            self.keywords = {"scale": 1.0, "normalize": True}

    def __call__(self) -> Call:
        """Starts the work; wait for the result by `block_until_ready`."""
        torch = self.torch
        tensors = dict(self.tensors)
        if "normalize" in self.keywords:
            tensors |= {n: torch.nn.functional.elu(tensors[n]) + 1 for n in "qk"}
        with torch.set_grad_enabled(self.backward):
            self.out = self.function(**tensors, **self.keywords)[0]
            if self.backward:
                torch.autograd.grad(self.out, list(self.tensors.values()), self.out)
        return self

    def block_until_ready(self) -> Call:
        self.torch.cuda.synchronize()
        return self

    def temporary_bytes(self) -> int:
        """The most that a call holds beyond its arguments."""
        self.torch.cuda.synchronize()
        self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated()
        self().block_until_ready()
        return self.torch.cuda.max_memory_allocated() - before

    def difference(self, ours: Callable[[], jax.Array]) -> float:
        """The largest difference of the outputs, over the largest entry of ours."""
        want = self.torch.from_dlpack(ours()).float()
        self().block_until_ready()
        return float((self.out.float() - want).abs().max() / want.abs().max())


def prepare(
    row: Mechanism, arrays: Mapping[str, jax.Array], backward: bool
) -> tuple[Call, dict[str, Any]]:
    """The peer's call, and what is to be recorded of it beside its time."""
    call = Call(row, arrays, backward)
    found = {"temporary_megabytes": call.temporary_bytes() / 1e6}
    if not backward:
        found["difference"] = call.difference(
            lambda: jax.jit(lambda a: row.call(a, causal=True))(arrays)
        )
    return call, found
