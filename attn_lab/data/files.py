"""Errors for files that are not there."""

from pathlib import Path


def existing(path: str | Path, remedy: str) -> Path:
    """The path, if there is something at it.

    Raises:
      FileNotFoundError: names the path and what to do about it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    return path
