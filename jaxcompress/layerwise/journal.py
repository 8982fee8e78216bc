"""Results of single matrices, kept while a run goes on, so that a killed one does them once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxcompress.checkpoints.huggingface_writer import discard
from jaxcompress.checkpoints.leaves import open_leaves
from jaxcompress.checkpoints.native import write_native
from jaxcompress.checkpoints.tensors import atomic_file, write_json
from jaxcompress.core.errors import InputError

MATRICES = 16  # in one group
OWNER = "fingerprint"


class Journal:
    """Leaves by path, written in groups of at most `MATRICES`; complete groups survive a kill.

    Args:
      directory: where they are kept.
      fingerprint: digest of everything that decides the results; None: the directory belongs to
        one run alone.
      overwrite: begin afresh over another run's results.

    Attributes:
      told: figures of each, by path; `seconds`, how long it took, among them.

    Used as a context, it removes the directory at an end without error.

    Raises:
      InputError: the directory holds the results of another fingerprint.
    """

    def __init__(
        self, directory: Path, *, fingerprint: str | None = None, overwrite: bool = False
    ) -> None:
        self.directory = directory
        self.told: dict[str, dict[str, float]] = {}
        self._pending: dict[str, Any] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._fingerprint = fingerprint
        if fingerprint is not None and directory.exists():
            owner = directory / OWNER
            if not owner.exists() or owner.read_text() != fingerprint:
                if not overwrite:
                    raise InputError(
                        f"{directory}: left unfinished by another command; run that one again to "
                        "finish it, or begin afresh with --overwrite"
                    )
                discard(directory)
        for note in sorted(directory.glob("*.json")):
            told = json.loads(note.read_text())
            self.told |= told
            self._note(note.with_suffix(""), told)

    def __enter__(self) -> Journal:
        """The journal."""
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Remove what was kept, where all went well or nothing was kept."""
        if kind is None:
            discard(self.directory)

    def get(self, path: str) -> Any:
        """The result kept for a path, read from the disk; None where there is none."""
        if path in self._pending or path not in self._where:
            return self._pending.get(path)
        group, name = self._where[path]
        return open_leaves(group).read(name)

    def put(self, path: str, leaf: Any, seconds: float, **figures: float) -> None:
        """Keep a result, how long it took, and other figures of it."""
        self.told[path] = {"seconds": seconds, **figures}
        self._pending[path] = leaf
        if len(self._pending) == MATRICES:
            self._write()

    def flush(self) -> None:
        """Write what is not yet a full group."""
        if self._pending:
            self._write()

    def _write(self) -> None:
        leaves = {str(i): leaf for i, leaf in enumerate(self._pending.values())}
        number = len(list(self.directory.glob("*.json")))
        group = self.directory / f"{number:05d}"
        if jax.process_index() == 0:  # all processes compute the same
            if self._fingerprint is not None and not self.directory.exists():
                self.directory.mkdir(parents=True)
                with atomic_file(self.directory / OWNER) as file:
                    file.write(self._fingerprint.encode())
            write_native(group, leaves, overwrite=True)
            # Last, so that a group without it counts as not there.
            write_json(group.with_suffix(".json"), {p: self.told[p] for p in self._pending})
        self._note(group, self._pending)
        self._pending = {}

    def _note(self, group: Path, paths: Iterable[str]) -> None:
        self._where |= {path: (group, str(i)) for i, path in enumerate(paths)}
