"""Programs that an experiment compiles before it times the first of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
from jax.experimental import serialize_executable


@dataclasses.dataclass(frozen=True)
class Ready:
    """A compiled program.

    Attributes:
      program: takes the arguments that it was lowered for.
      temporary: bytes that it takes while it runs.
      total: those of arguments and results, too.
    """

    program: Callable
    temporary: int
    total: int


def failure(error: Exception) -> dict[str, Any]:
    """What is recorded of a case that has no time."""
    text = str(error)
    full = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    reason = text.strip().split("\n")[0][:300]
    return {"error": "out of memory" if full else "refused", "reason": reason}


def compile_all(
    lower: Callable[[Any], jax.stages.Lowered], items: Iterable[Any], processes: int = 1
) -> list[Ready | dict[str, Any]]:
    """Compiles a program of one device for every item.

    Python lowers one program at a time, and a kernel takes seconds: other processes do it beside
    each other, and this one loads what they compiled. They share a GPU; a TPU has a single process.

    Args:
      lower: the program of an item, a function of a module if there are several processes.
      items: what they are made of.
      processes: how many compile; if it is 1, this one does.

    Returns:
      For every item its program, or `failure` of why there is none.
    """
    if processes == 1:
        return [compiled(lower, item) for item in items]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _leave_memory_to_others) as pool:
        found = list(pool.map(functools.partial(_serialized, lower), items))
    return [given if isinstance(given, dict) else _loaded(*given) for given in found]


def compiled(lower: Callable[[Any], jax.stages.Lowered], item: Any) -> Ready | dict[str, Any]:
    """The program of an item, compiled here."""
    try:
        program = lower(item).compile()
    except Exception as error:  # of compilers of kernels, whose errors have no base in common
        return failure(error)
    memory = program.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Ready(program, memory.temp_size_in_bytes, total)


def _leave_memory_to_others():
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def _serialized(lower, item):
    found = compiled(lower, item)
    if isinstance(found, dict):
        return found
    return *serialize_executable.serialize(found.program), found.temporary, found.total


def _loaded(program, in_tree, out_tree, *memory):
    if jax.default_backend() == "gpu":
        importlib.import_module("jax.experimental.mosaic.gpu")  # finds what its kernels call
    load = serialize_executable.deserialize_and_load
    return Ready(load(program, in_tree, out_tree, execution_devices=jax.devices()[:1]), *memory)
