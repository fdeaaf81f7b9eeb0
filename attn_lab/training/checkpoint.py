"""Checkpoints of a train state, by orbax."""

from __future__ import annotations

from pathlib import Path

import jax
from absl import logging

from attn_lab.training.sharding import path_name
from attn_lab.training.step import TrainState


class Checkpoints:
    """The newest `keep` states of a run, one folder per step.

    A folder gets its name when everything in it is written, and older ones go after that, so a
    process that is killed at any time leaves a good checkpoint if there was one.

    Args:
      directory: made if it does not exist.
      keep: number of checkpoints kept.
    """

    def __init__(self, directory: Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                # A background save reads arrays that the next step overwrites in place.
                enable_async_checkpointing=False,
            ),
        )

    def restore(self, state: TrainState) -> TrainState | None:
        """The newest state that can be read, or None.

        Checkpoints that cannot be read are passed over with a warning, and deleted when a good
        one is found before them or none is left.

        Args:
          state: a state with the shapes, dtypes and shardings to restore.

        Raises:
          ValueError: a checkpoint which can be read holds other arrays than `state`.
        """
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        names = [path_name(path) for path, _ in leaves]
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, (_, leaf) in zip(names, leaves)
        }
        unreadable = []
        restored = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(step, args=self._args.StandardRestore(wanted))
                break
            except Exception as error:  # orbax and tensorstore raise bare Exceptions too
                unreadable.append(step)
                logging.warning(
                    "Checkpoint %d in %s cannot be read (%s); trying the one before it.",
                    step,
                    self._manager.directory,
                    str(error).splitlines()[0],
                )
        for step in unreadable:
            self._manager.delete(step)
        if restored is None:
            return None
        return jax.tree.unflatten(structure, [restored[name] for name in names])

    def save(self, state: TrainState) -> None:
        """Saves the state under its step, if that is not there yet; returns when it is on disk."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        named = {path_name(path): leaf for path, leaf in leaves}
        self._manager.save(step, args=self._args.StandardSave(named), force=True)

    def newest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def preempted(self, step: int) -> bool:
        """Whether the job scheduler has told any process of a multi-process job to stop."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Releases the threads of orbax."""
        self._manager.close()
