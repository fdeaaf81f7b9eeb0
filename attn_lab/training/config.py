"""Configs on the command line, in notebooks and in workdirs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging


def as_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """A (nested) config as JSON gives it back: plain dictionaries, lists, numbers and strings.

    Raises:
      TypeError: a value that JSON cannot hold.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return json.loads(json.dumps(config))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def claim_workdir(workdir: str | Path, config: Mapping[str, Any]) -> Path:
    """Makes the workdir of a run, with `config.json`, or returns to it with the same config.

    Raises:
      ValueError: it holds another config; the message names the keys that differ, and nothing on
        disk has changed.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    asked = as_dict(config)
    if path.exists():
        found, wanted = flatten(json.loads(path.read_text())), flatten(asked)
        missing = object()
        different = [
            key
            for key in sorted(found | wanted)
            if found.get(key, missing) != wanted.get(key, missing)
        ]
        if different:
            keys = ", ".join(
                f"{key} ({found.get(key, 'absent')!r} there, {wanted.get(key, 'absent')!r} asked)"
                for key in different
            )
            raise ValueError(f"workdir {workdir} holds another config, which differs in: {keys}")
        return workdir
    if jax.process_index() > 0:
        return workdir
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, asked)
    return workdir


def write_json(path: Path, value: Any) -> None:
    """Writes a whole file, or, if the process is killed, none."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def run_main(train: Callable[[Any, str], Any], config_file: str | Path, workdir: str) -> None:
    """The main program of an experiment: `train(config, workdir)` with both from flags.

    If `train` returns a mapping, that is written to `result.json` in the workdir at the very end: a
    run with this file is finished.

    `--config=FILE[:PRESET]` takes the config from `get_config(PRESET)` of a Python file,
    `--config.KEY=VALUE` changes one key of it and `--workdir=DIR` says where results go. Bad input
    ends the program with one line on stderr and status 1; `--verbosity=1` adds the traceback.

    Several hosts run one program if all are started with `--distributed`, which finds the others on
    TPU pods, under SLURM and Open MPI, or with `--coordinator=HOST:PORT --processes=N
    --process_id=I`. They share the workdir.

    Args:
      train: the experiment.
      config_file: the default of `--config`.
      workdir: the default of `--workdir`.
    """
    from ml_collections import config_flags

    with _flag_errors():
        config = config_flags.DEFINE_config_file(
            "config", str(config_file), "Config file, with :PRESET if it has presets."
        )
    directory = flags.DEFINE_string("workdir", workdir, "Where the results go.")
    hosts = flags.DEFINE_bool("distributed", False, "One of several hosts, found by themselves.")
    coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
    processes = flags.DEFINE_integer("processes", None, "How many processes there are.")
    process_id = flags.DEFINE_integer("process_id", None, "The number of this process.")

    def parse(argv: list[str]) -> list[str]:
        with _flag_errors():
            rest = flags.FLAGS(argv)
            if flags.FLAGS["verbosity"].using_default_value:
                flags.FLAGS.verbosity = logging.WARNING  # orbax tells a story at every checkpoint
            config.value.keys()  # raises what went wrong in reading the file
            return rest

    def main(argv: list[str]) -> None:
        if argv[1:]:
            raise SystemExit(f"error: unexpected argument {argv[1]!r}")
        try:
            named = coordinator.value, processes.value, process_id.value
            if any(x is not None for x in named):
                if None in named:
                    raise ValueError("coordinator, processes and process_id go together")
                jax.distributed.initialize(*named)
            elif hosts.value:
                jax.distributed.initialize()
            result = train(config.value, directory.value)
            if isinstance(result, Mapping) and jax.process_index() == 0:
                write_json(Path(directory.value) / "result.json", result)
        except (ValueError, TypeError, OSError, FloatingPointError, NotImplementedError) as error:
            logging.debug("Traceback of the error", exc_info=True)
            raise SystemExit(f"error: {error}") from error

    app.run(main, flags_parser=parse)


@contextlib.contextmanager
def _flag_errors() -> Iterator[None]:
    """Turns the errors of flags into one line and status 1."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        message = str(error).replace("\\", "")
        key, guess = (re.search(p, message) for p in (r"'(\w+)'", r'Did you mean "\w+"'))
        if key is None:
            raise
        flag = next((a for a in sys.argv if a.partition("=")[0].endswith(f".{key[1]}")), key[1])
        hint = f"; {guess[0].lower()}?" if guess else ""
        raise SystemExit(f"error: unknown config key in {flag}{hint}") from error
    except (flags.Error, OSError) as error:
        raise SystemExit(f"error: {str(error).strip().splitlines()[-1].strip()}") from error
