"""Configs on the command line, in notebooks and in workdirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
      ValueError: it holds another config (the message names the keys that differ) or other
        files; nothing on disk has changed.
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
    workdir.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps(asked, indent=2) + "\n")
    partial.replace(path)
    return workdir
