"""Checkpoints of a train state, by orbax."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import jax
from absl import logging

from attn_lab.training.sharding import path_name
from attn_lab.training.step import TrainState

CHECKSUMS = "checksums.json"


class Checkpoints:
    """The newest `keep` states of a run, one folder per step.

    A folder gets its name when everything in it is written, its checksums after that, and older
    ones go last, so a process that is killed at any time leaves a good checkpoint if there was one.

    Args:
      directory: made if it does not exist.
      keep: number of checkpoints kept, at least 2: the one before the newest is the reserve.

    Raises:
      ValueError: `keep` is too small.
    """

    def __init__(self, directory: Path, keep: int = 2):
        import orbax.checkpoint as ocp

        if keep < 2:
            raise ValueError(f"keep must be at least 2; got {keep}")
        self._args = ocp.args
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers=ocp.StandardCheckpointHandler(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                # A background save reads arrays that the next step overwrites in place.
                enable_async_checkpointing=False,
            ),
        )

    def restore(self, state: TrainState) -> TrainState | None:
        """The newest state whose files are as they were written, or None.

        Damaged checkpoints are deleted, with a warning.

        Args:
          state: a state with the shapes, dtypes and shardings to restore.

        Raises:
          ValueError: the checkpoint holds other arrays than `state`.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = self._directory / str(step)
            if not _intact(folder):
                logging.warning("Checkpoint %s is damaged: trying the one before it.", folder)
                self._manager.delete(step)
                continue
            leaves, structure = jax.tree_util.tree_flatten_with_path(state)
            wanted = {
                path_name(path): jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=leaf.sharding
                )
                for path, leaf in leaves
            }
            found = self._manager.item_metadata(step).tree
            shapes = [
                {(name, _stored_shape(array)) for name, array in arrays.items()}
                for arrays in (found, wanted)
            ]
            if shapes[0] != shapes[1]:
                names = ", ".join(sorted({name for name, _ in shapes[0] ^ shapes[1]}))
                raise ValueError(f"checkpoint {folder} has not the arrays of this run: {names}")
            restored = self._manager.restore(step, args=self._args.StandardRestore(wanted))
            return jax.tree.unflatten(structure, [restored[name] for name in wanted])
        return None

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, if that is not there yet; returns when it is on disk."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        named = {path_name(path): leaf for path, leaf in leaves}
        self._manager.save(step, args=self._args.StandardSave(named), force=True)
        if jax.process_index() == 0:
            folder = self._directory / str(step)
            partial = folder / (CHECKSUMS + ".partial")
            partial.write_text(json.dumps(_checksums(folder)))
            partial.replace(folder / CHECKSUMS)

    def newest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def preempted(self, step: int) -> bool:
        """Whether the scheduler has told any process of a multi-process job to stop."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Releases the threads of orbax."""
        self._manager.close()


def _stored_shape(array) -> tuple[int, ...]:
    if array.dtype is not None and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    return tuple(array.shape)


def _checksums(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): zlib.crc32(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(CHECKSUMS)
    }


def _intact(folder: Path) -> bool:
    try:
        return json.loads((folder / CHECKSUMS).read_text()) == _checksums(folder)
    except (OSError, ValueError):
        return False
