"""Checkpoints of a training: written beside the steps, complete or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress.core.arrays.manifest import abstract, check_manifest, manifest
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
            # Named here, or a process that did not write them knows nothing of their content.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "about": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=True,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
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
          InputError: the parameters or the optimizer are not those of the checkpoint, or the
            number of processes changed for data whose order depends on it.
        """
        step = self.latest
        about = self._manager.restore(
            step, args=self._ocp.args.Composite(about=self._ocp.args.JsonRestore())
        )["about"]
        check_manifest(what, about["manifest"])
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        _check_state(_flat(target), self._manager.item_metadata(step)["state"])
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
    flat: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_str(path).replace("/", ".")
        while name in flat:  # keys that have dots in them
            name += "_"
        flat[name] = leaf
    return flat


def _check_state(here: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the arrays of a state are those that were saved."""
    for name in {**saved, **here}:
        if name not in here or name not in saved:
            where = "here" if name in here else "in the checkpoint"
            raise InputError(f"checkpoint: {name} is {where} only; was it another optimizer?")
        mine, theirs = ((tuple(x.shape), str(x.dtype)) for x in (here[name], saved[name]))
        if mine != theirs:
            raise InputError(f"checkpoint: {name} is {mine} here, {theirs} in the checkpoint")


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


def save_params(directory: Path, params: Any) -> None:
    """Write parameters, compressed leaves included, as they are sharded; replaces what was there.

    Args:
      directory: appears complete or not at all.
      params: any pytree of dicts and lists (others come back as those).
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            directory.absolute(),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(_flat(params)),
                manifest=ocp.args.JsonSave(manifest(params)),
            ),
            force=True,
        )


def load_params(directory: Path, shardings: Callable[[Any], Any]) -> Any:
    """Parameters that `save_params` wrote.

    Args:
      directory: that was written.
      shardings: gives, for the parameters as `jax.ShapeDtypeStruct`s, a tree of shardings of their
        buffers; each process then reads what it holds.
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(
            directory.absolute(), args=ocp.args.Composite(manifest=ocp.args.JsonRestore())
        )["manifest"]
        shapes = abstract(saved)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes,
            shardings(shapes),
        )
        found = checkpointer.restore(
            directory.absolute(),
            args=ocp.args.Composite(params=ocp.args.StandardRestore(_flat(target))),
        )["params"]
    leaves = [found[name] for name in _flat(target)]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)
