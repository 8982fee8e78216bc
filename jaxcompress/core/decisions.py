"""What a method decided and by which score, told to whoever listens; nothing where nobody does.

    with listening(heard.append):
        small = compress(model, "wanda", ...)

Methods tell as they work, as they tell their progress; what they compute is the same with and
without a listener. Recipes and sweeps listen, and draw what they hear.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

SIDE = 64  # rows and columns of a map, at most
UNITS = 512  # columns of a map of what is cut whole
OUTLIERS = 0.01  # share of the scores at either end that get the colour of the rest


@dataclass(frozen=True)
class Decision:
    """Scores and what stayed, as a map of means over blocks.

    Attributes:
      what: "weights", or what was cut whole: "heads", "neurons", "layers", ...
      where: path of the matrix, or name of the group.
      by: name of the score.
      size: rows and columns before they were averaged.
      scores: `[rows, columns]` in [0, 1], from `low` to `high`.
      kept: share that stayed, `[rows, columns]` in [0, 1].
      low: the score shown as 0.
      high: the score shown as 1.
    """

    what: str
    where: str
    by: str
    size: tuple[int, int]
    scores: np.ndarray
    kept: np.ndarray
    low: float
    high: float

    @classmethod
    def of(cls, what: str, where: str, by: str, scores: Any, kept: Any) -> Decision:
        """Of scores `[rows, columns]` and what stayed, bool of the same shape."""
        scores = np.atleast_2d(np.asarray(scores, np.float64))
        kept = np.atleast_2d(np.asarray(kept, np.float64))
        columns = SIDE if what == "weights" else UNITS
        shown = averaged(scores, SIDE, columns)
        low, high = np.quantile(shown, [OUTLIERS, 1 - OUTLIERS]).tolist()
        if shown.size <= 1 / OUTLIERS:
            low, high = float(shown.min()), float(shown.max())
        scaled = np.clip((shown - low) / ((high - low) or 1.0), 0, 1)
        return cls(
            what=what,
            where=where,
            by=by,
            size=(scores.shape[0], scores.shape[1]),
            scores=scaled,
            kept=averaged(kept, SIDE, columns),
            low=low,
            high=high,
        )

    def record(self) -> dict[str, Any]:
        """As JSON holds it: maps in 256 steps."""
        return {
            "what": self.what,
            "where": self.where,
            "by": self.by,
            "size": list(self.size),
            "shape": list(self.scores.shape),
            "scores": _packed(self.scores),
            "kept": _packed(self.kept),
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def read(cls, record: dict[str, Any]) -> Decision:
        """Of `record`; `ValueError`, `TypeError`, `IndexError` or `KeyError` where it is none."""
        rows, columns = record["shape"]
        maps = [
            np.frombuffer(base64.b64decode(record[name]), np.uint8).reshape(rows, columns) / 255
            for name in ("scores", "kept")
        ]
        size = (int(record["size"][0]), int(record["size"][1]))
        about = str(record["what"]), str(record["where"]), str(record["by"])
        return cls(*about, size, maps[0], maps[1], float(record["low"]), float(record["high"]))


def averaged(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means over blocks of as equal a size as can be, `[rows, columns]` of at most so many."""
    for axis, side in enumerate((rows, columns)):
        count = values.shape[axis]
        if count > side:
            ends = np.arange(side + 1) * count // side
            sums = np.add.reduceat(values, ends[:-1], axis=axis)
            widths = np.diff(ends)
            values = sums / (widths[:, None] if axis == 0 else widths)
    return values


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.round(255 * values).astype(np.uint8).tobytes()).decode()


Hear = Callable[[Decision], Any]
Wanted = Callable[[str], bool]
_listener: ContextVar[tuple[Hear, Wanted] | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(hear: Hear, wanted: Wanted = lambda path: True) -> Iterator[None]:
    """`hear(decision)` is called for each decision made inside.

    Args:
      hear: takes a `Decision`.
      wanted: of a matrix's path, whether its scores are asked for: they are computed once more.
    """
    token = _listener.set((hear, wanted))
    try:
        yield
    finally:
        _listener.reset(token)


def is_wanted(path: str) -> bool:
    """Whether somebody wants to hear of this matrix."""
    listener = _listener.get()
    return listener is not None and listener[1](path)


def tell(what: str, where: str, by: str, scores: Any, kept: Any) -> None:
    """Tell a decision: scores `[n]` or `[rows, columns]`, and which stayed, bool alike."""
    listener = _listener.get()
    if listener is not None:
        listener[0](Decision.of(what, where, by, scores, kept))
