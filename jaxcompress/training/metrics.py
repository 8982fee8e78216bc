"""Metrics of a training: to the console, to JSON lines and to TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events in a directory, written by the first process only.

    A resumed training goes on behind its checkpoint: later lines of the killed run are dropped.
    """

    def __init__(self, directory: Path, *, resumed_at: int = 0) -> None:
        self.path = directory / "metrics.jsonl"
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        directory.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.path) if row["step"] <= resumed_at]
        whole = self.path.with_suffix(".part")
        whole.write_text("".join(json.dumps(row) + "\n" for row in kept))
        whole.replace(self.path)
        self._file = self.path.open("a")
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(directory), purge_step=resumed_at + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, and one point of every curve."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Everything to disk."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


class RunningMeans:
    """Means of the steps' metrics; the sums stay on the devices, so that no step waits."""

    def __init__(self) -> None:
        self._totals: dict[str, Any] = {}
        self._steps = 0

    def add(self, metrics: dict[str, Any]) -> None:
        """One more step."""
        self._totals = (
            {k: self._totals[k] + x for k, x in metrics.items()} if self._steps else metrics
        )
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Means of the steps since they were last taken."""
        found = {name: float(total) / self._steps for name, total in self._totals.items()}
        self._totals, self._steps = {}, 0
        return found

    def state(self) -> dict[str, Any]:
        """What was added and not yet taken, JSON-able."""
        return {"totals": {k: float(x) for k, x in self._totals.items()}, "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._totals, self._steps = state["totals"], state["steps"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last one that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
