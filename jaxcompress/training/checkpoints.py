"""Checkpoints of a training: written beside the steps, complete or not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.core.arrays.manifest import check_manifest, manifest
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import path_str


class TrainCheckpoints:
    """The last checkpoints of one training, by orbax, asynchronously.

    Arrays are written as they are sharded and can be read under any other sharding, by any number
    of processes. Beside them go the position in the data and what the parameters are made of.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict[str, Any], what: Any) -> None:
        """Begin to write a checkpoint; training may go on at once.

        Args:
          step: its name.
          state: pytree of arrays.
          data: position in the data, JSON-able; of this process.
          what: the parameters, compressed leaves and all, whose formats are noted.
        """
        if self.latest == step:
            return
        about = {"data": _of_all_processes(data), "manifest": manifest(what)}
        self._manager.save(
            step,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardSave(_flat(state)),
                about=self._ocp.args.JsonSave(about),
            ),
        )

    def restore(self, state: Any, shardings: Any, what: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint: its state under `shardings`, and this process's data position.

        Args:
          state: a pytree like the saved one, of arrays or shapes.
          shardings: a tree like it.
          what: the parameters that training began with.

        Raises:
          InputError: the parameters are not those of the checkpoint, or the number of processes
            changed for data whose order depends on it.
        """
        step = self.latest
        about = self._manager.restore(
            step, args=self._ocp.args.Composite(about=self._ocp.args.JsonRestore())
        )["about"]
        check_manifest(what, about["manifest"])
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        found = self._manager.restore(
            step,
            args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(_flat(target))),
        )["state"]
        leaves = [found[name] for name in _flat(target)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), _own(about["data"])

    def wait(self) -> None:
        """Return once everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _flat(tree: Any) -> dict[str, Any]:
    """Arrays by their paths: orbax need not know the classes of an optimizer's state."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_str(path).replace("/", "."): leaf for path, leaf in leaves}


def _of_all_processes(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The positions of all processes; one, where all are the same."""
    if jax.process_count() == 1:
        return [data]
    from jax.experimental import multihost_utils

    text = json.dumps(data, sort_keys=True).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    texts = [bytes(row) for row in multihost_utils.process_allgather(padded)]
    distinct = texts if len(set(texts)) > 1 else texts[:1]
    return [json.loads(text) for text in distinct]


def _own(positions: list[dict[str, Any]]) -> dict[str, Any]:
    if len(positions) == 1:
        return positions[0]
    if len(positions) != jax.process_count():
        raise InputError(
            f"checkpoint: data read by {len(positions)} processes whose order depends on their "
            f"number, {jax.process_count()} now; go on with as many"
        )
    return positions[jax.process_index()]
