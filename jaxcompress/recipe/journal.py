"""Results of single matrices, kept while a stage goes on, so that a killed run does them once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from jaxcompress.checkpoints.native import read_native, write_native
from jaxcompress.checkpoints.tensors import write_json
from jaxcompress.core.paths import leaves_with_paths

MATRICES = 16  # in one group


class Journal:
    """Leaves by path, written in groups of `MATRICES`; complete groups survive a kill.

    Attributes:
      seconds: that each took, by path.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seconds: dict[str, float] = {}
        self._pending: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}
        for note in sorted(directory.glob("*.json")):
            seconds = json.loads(note.read_text())
            leaves = dict(leaves_with_paths(read_native(note.with_suffix(""))))
            self.seconds |= seconds
            self._kept |= {path: leaves[str(i)] for i, path in enumerate(seconds)}

    def get(self, path: str) -> Any:
        """The result kept for a path, None where there is none."""
        return self._kept.get(path)

    def put(self, path: str, leaf: Any, seconds: float) -> None:
        """Keep a result, and how long it took."""
        self.seconds[path] = seconds
        self._pending[path] = leaf
        if len(self._pending) == MATRICES:
            self._write()

    def _write(self) -> None:
        leaves = {str(i): leaf for i, leaf in enumerate(self._pending.values())}
        number = len(list(self.directory.glob("*.json")))
        group = self.directory / f"{number:05d}"
        if jax.process_index() == 0:  # all processes compute the same
            write_native(group, leaves, overwrite=True)
            # Last, so that a group without it counts as not there.
            write_json(group.with_suffix(".json"), {p: self.seconds[p] for p in self._pending})
        self._pending = {}
