"""What the methods of a stage decided: kept for the report, of one matrix of each kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax

from jaxcompress.checkpoints.tensors import write_json
from jaxcompress.core.decisions import Decision
from jaxcompress.core.paths import leaves_with_paths

MATRICES = 8  # in a report, at most


class Heard:
    """Decisions as they are made; a killed stage finds those of before.

    Args:
      folder: where they are kept meanwhile.
      params: of the model. Of matrices that differ by the number of their block alone, the middle
        one is wanted, of a stack of them the middle layer.
    """

    def __init__(self, folder: Path, params: Any) -> None:
        self.path = folder / "decisions.json"
        found = json.loads(self.path.read_text()) if self.path.is_file() else []
        self._records = {(row["what"], row["where"]): row for row in found}
        self._middle = _middles(params)

    def wanted(self, path: str) -> bool:
        """Whether a matrix is one of those that are shown."""
        base, _, index = path.partition("[")
        if base not in self._middle:
            return False
        full = sum(what == "weights" for what, _ in self._records) >= MATRICES
        again = ("weights", path) in self._records
        here = not index or int(index[:-1]) == self._middle[base]
        return here and (again or not full)

    def __call__(self, decision: Decision) -> None:
        """Keep a decision."""
        self._records[decision.what, decision.where] = decision.record()
        if jax.process_index() == 0:
            write_json(self.path, self.records)

    @property
    def records(self) -> list[dict[str, Any]]:
        """For the report."""
        return list(self._records.values())


def _middles(params: Any) -> dict[str, int]:
    """Paths of the middle matrix of each kind, and the middle of what may be stacked in it."""
    kinds: dict[str, list[tuple[str, int]]] = {}
    for path, leaf in leaves_with_paths(params):
        if getattr(leaf, "ndim", 0) > 1:
            kind = re.sub(r"(^|/)\d+(?=/)", r"\1*", path)
            kinds.setdefault(kind, []).append((path, leaf.shape[0] // 2))
    return dict(alike[len(alike) // 2] for alike in kinds.values())
