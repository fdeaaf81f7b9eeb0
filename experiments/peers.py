"""Mechanisms as other libraries have them, to be timed beside ours.

Flash-linear-attention and FlexAttention need a GPU, PyTorch and `fla-core` beside JAX; none is
imported before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_lab.catalogue import Mechanism, Sizes, find
from experiments.programs import ATTENTIONS, BUCKETS, RECURRENCES, Program, program

FLA, FLEX = "fla", "flex"
BLOCK = 128  # of FlexAttention's block map
# of a row: the module of fla.ops, its function, and its names for our arguments
FUNCTIONS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "linear_attention": ("linear_attn", "chunk_linear_attn", {}),
    "retention": ("retention", "chunk_retention", {}),
    "gated_linear_attention": ("gla", "chunk_gla", {"log_decay": "g"}),
    "delta_rule": ("delta_rule", "chunk_delta_rule", {}),
    "gated_delta_rule": ("gated_delta_rule", "chunk_gated_delta_rule", {"log_decay": "g"}),
    "simple_gla": ("simple_gla", "chunk_simple_gla", {"log_decay": "g"}),
}
FUNCTIONS |= {
    kind: FUNCTIONS[row] for kind, (row, _) in RECURRENCES.items() if kind not in FUNCTIONS
}
NORMALIZED_BY_SOFTMAX = set(ATTENTIONS) - {"sigmoid"}
SHORT = 256  # steps, of which kernels are compiled as for any number


def peer_of(row: Mechanism) -> str | None:
    """The library that has the mechanism, if both it and a GPU are there."""
    if jax.default_backend() != "gpu":
        return None
    if isinstance(row, Program) and row.kind in ATTENTIONS:
        there = row.kind in NORMALIZED_BY_SOFTMAX and importlib.util.find_spec("torch")
        return FLEX if there else None
    return FLA if row.name in FUNCTIONS and importlib.util.find_spec("fla") else None


def linear(row: Mechanism, tensors: Mapping[str, Any]) -> Callable[[], Any]:
    """A row by flash-linear-attention, as a function that gives `[B, T, H, D]`."""
    module, name, names = FUNCTIONS[row.name]
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)

    def call():
        given = {names.get(name, name): x for name, x in tensors.items()}
        if row.name == "linear":
            given["normalize"] = False
        if row.name == "linear_attention":
            from torch.nn.functional import elu

            given |= {"q": elu(given["q"]) + 1, "k": elu(given["k"]) + 1}
            given |= {"scale": 1.0, "normalize": True}
        return function(**given)[0]

    return call


def flex(row: Program, tensors: Mapping[str, Any]) -> Callable[[], Any]:
    """A program by FlexAttention, as a function that gives `[B, T, H, D]`, not yet compiled."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    length, device = tensors["q"].shape[1], tensors["q"].device
    given = {}
    if row.kind in FLEX_SCORES:
        given["score_mod"] = FLEX_SCORES[row.kind](torch, tensors, row)
    if mask := row.settings["mask"]:
        kinds = np.asarray(mask.block_map(length, length, BLOCK, BLOCK))
        lists = []
        for kind in 1, 2:  # of partial tiles and of full ones
            own = kinds.reshape(1, 1, *kinds.shape[-2:]) == kind
            order = np.argsort(~own, -1, kind="stable")
            lists += [
                torch.tensor(x, dtype=torch.int32, device=device) for x in (own.sum(-1), order)
            ]
        allowed = FLEX_MASKS.get(row.kind, _causal)(torch, row, length)
        given["block_mask"] = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length)
        )
    sinks = tensors.get("sinks")

    def call():
        q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
        if sinks is None:
            return flex_attention(q, k, v, **given).transpose(1, 2)
        out, lse = flex_attention(q, k, v, **given, return_lse=True)
        out = out * torch.sigmoid(lse - sinks[:, None])[..., None].to(out.dtype)
        return out.transpose(1, 2)

    return call


def _causal(torch, row, length):
    return lambda b, h, q, k: q >= k


def _window(torch, row, length):
    ((width,),) = row.numbers
    return lambda b, h, q, k: (q >= k) & (q - k < width)


def _segments(torch, row, length):
    size = -(-length // row.numbers[0][0])
    return lambda b, h, q, k: (q >= k) & (q // size == k // size)


def _neighborhood(torch, row, length):
    shape, kernel, tile = row.numbers
    counts = [n // size for n, size in zip(shape, tile)]
    axes = [
        (
            n,
            w,
            math.prod(tile) * math.prod(counts[x + 1 :]),
            counts[x],
            size,
            math.prod(tile[x + 1 :]),
        )
        for x, (n, w, size) in enumerate(zip(shape, kernel, tile))
    ]

    def allowed(b, h, q, k):
        near = q >= 0
        for n, w, outer, count, size, inner in axes:
            i, j = (x // outer % count * size + x // inner % size for x in (q, k))
            start = torch.clamp(i - w // 2, 0, n - w)
            near = near & (j >= start) & (j < start + w)
        return near

    return allowed


def _soft_cap(torch, tensors, row):
    ((limit,),) = row.numbers
    return lambda score, b, h, q, k: limit * torch.tanh(score / limit)


def _alibi(torch, tensors, row):
    slopes = tensors["slopes"]
    return lambda score, b, h, q, k: score + slopes[h] * (q - k)


def _bias(torch, tensors, row):
    bias = tensors["bias"]
    return lambda score, b, h, q, k: score + bias[h, q, k]


def _t5_table(torch, tensors, row):
    table, near = tensors["table"], BUCKETS // 2
    step = near / math.log(128 / near)

    def shifted(score, b, h, q, k):
        distance = torch.clamp(q - k, min=0)
        grown = torch.log(torch.clamp(distance, min=1) / near) * step
        far = torch.clamp(near + grown.to(torch.int32), max=BUCKETS - 1)
        return score + table[torch.where(distance < near, distance, far), h]

    return shifted


FLEX_MASKS = {"window": _window, "segments": _segments, "neighborhood": _neighborhood}
FLEX_SCORES = {"soft_cap": _soft_cap, "alibi": _alibi, "bias": _bias, "t5_table": _t5_table}


class Call:
    """The peer of a row on example arrays: a function without arguments, for a clock to wait on.

    Args:
      row: the mechanism, which has a `peer_of`.
      arrays: the arguments, which stay where they are if that is the GPU.
      backward: whether a call also computes the gradients of the arguments.
      constants: arguments of which it does not.
    """

    def __init__(
        self,
        row: Mechanism,
        arrays: Mapping[str, jax.Array],
        backward: bool,
        constants: tuple[str, ...] = (),
    ):
        import torch

        self.torch, self.backward = torch, backward
        tensors = {name: torch.from_dlpack(x).detach().cuda() for name, x in arrays.items()}
        self.moving = [x for name, x in tensors.items() if name not in constants]
        for x in self.moving:
            x.requires_grad_(backward)
        if row.name not in FUNCTIONS:
            # Another program's code would count as compiled again, of which there is a limit.
            torch._dynamo.reset()
            self.function = torch.compile(flex(row, tensors), dynamic=False)
        else:
            self.function = linear(row, tensors)

    def __call__(self) -> Call:
        """Starts the work; wait for the result by `block_until_ready`."""
        grad = self.torch.autograd
        # In a thread of its own a backward pass would not hear of a time limit.
        with grad.set_grad_enabled(self.backward), grad.set_multithreading_enabled(False):
            self.out = self.function()
            if self.backward:
                grad.grad(self.out, self.moving, self.out)
        return self

    def block_until_ready(self) -> Call:
        self.torch.cuda.synchronize()
        return self

    def temporary_bytes(self) -> int:
        """The most that a call holds beyond its arguments."""
        self.out = None
        self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated()
        self().block_until_ready()
        return self.torch.cuda.max_memory_allocated() - before

    def difference(self, ours: jax.Array) -> float:
        """The largest difference of the outputs, over the largest entry of ours."""
        want = self.torch.from_dlpack(ours).float()
        self().block_until_ready()
        return float((self.out.float() - want).abs().max() / want.abs().max())


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside after so many seconds of the main thread, between bytecodes."""

    def stop(*_):
        raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prepare(
    row: Mechanism,
    arrays: Mapping[str, jax.Array],
    backward: bool,
    constants: tuple[str, ...] = (),
    ours: Callable[[Mapping[str, jax.Array]], jax.Array] | None = None,
    seconds: float = math.inf,
) -> tuple[Call, dict[str, Any]]:
    """The peer's call, compiled and tuned, and what is to be recorded of it beside its time.

    Args:
      row, arrays, backward, constants: as of `Call`.
      ours: a forward pass to compare it with.
      seconds: that the first call may take.

    Raises:
      RuntimeError: the library refuses the call.
      TimeoutError: the first call takes longer.
    """
    try:
        call = Call(row, arrays, backward, constants)
        call.torch.cuda.empty_cache()
        with time_limit(seconds) if seconds < math.inf else contextlib.nullcontext():
            call().block_until_ready()
        found = {"temporary_megabytes": call.temporary_bytes() / 1e6}
        if ours is not None and not backward:
            found["difference"] = call.difference(ours(arrays))
    except (RuntimeError, TimeoutError):
        raise
    except Exception as error:  # of compilers, too, whose errors have no base in common
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    return call, found


def compile_apart(
    row: Mechanism, sizes: Sizes, dtype: str, backward: bool, seconds: float
) -> subprocess.CompletedProcess | None:
    """Compiles a recurrence's kernels by flash-linear-attention into the cache of Triton.

    It is done in another process, so that many are at the same time. Which of the kernels are the
    fastest is left to the process that has the GPU for itself.

    Args:
      row: the recurrence.
      sizes: of its arguments; their length does not count.
      dtype: of the arguments.
      backward: whether the backward pass, too.
      seconds: after which it ends.

    Returns:
      The process, None if the time was not enough.
    """
    sizes = dataclasses.replace(sizes, T=SHORT, S=SHORT)
    given = json.dumps([row.name, dataclasses.asdict(sizes), dtype, backward])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "FLA_CACHE_RESULTS": "0"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "experiments.peers", given]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(
            command, env=environment, cwd=root, timeout=seconds, capture_output=True, text=True
        )


if __name__ == "__main__":
    name, sizes, dtype, backward = json.loads(sys.argv[1])
    row = program(name, SHORT) if name in RECURRENCES else find(name)
    arrays = row.example(Sizes(**sizes), jax.random.key(0), jnp.dtype(dtype))
    Call(row, arrays, backward)().block_until_ready()
