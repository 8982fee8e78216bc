"""What a report says of a run: the numbers behind its headline, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = Mapping[str, Any]
Stage = Mapping[str, Any]

NONE = "–"


@dataclass(frozen=True)
class Change:
    """How far quality moved from the first stage.

    Attributes:
      mean: relative, of a perplexity; a difference, of an accuracy.
      spread: standard deviation of the same over the slices, each compared with itself; or None.
    """

    mean: float
    spread: float | None


def measure_of(run: Run) -> str:
    """ "perplexity" or "accuracy"."""
    for stage in measured(run):
        return "accuracy" if "accuracy" in stage["quality"]["heldout"] else "perplexity"
    return "perplexity"


def with_quality(run: Run) -> list[Stage]:
    """Stages whose quality was measured and is finite."""
    return [s for s in run["stages"] if quality(s) is not None]


def quality(stage: Stage, role: str = "heldout") -> float | None:
    """Perplexity or accuracy of a stage."""
    found = stage.get("quality", {}).get(role, {})
    value = found.get("accuracy", found.get("perplexity"))
    return None if value is None else float(value)


def measured(run: Run) -> list[Stage]:
    """Stages whose quality was measured, whatever it is."""
    return [s for s in run["stages"] if s.get("quality", {}).get("heldout")]


def with_size(run: Run) -> list[Stage]:
    """Stages whose size was measured."""
    return [s for s in run["stages"] if s.get("size")]


def size_key(stages: Sequence[Stage]) -> str:
    """Bytes on disk where all of the stages have them, else in memory."""
    on_disk = all(s["size"].get("bytes_disk") for s in stages)
    return "bytes_disk" if on_disk else "bytes_memory"


def change(stage: Stage, first: Stage) -> Change | None:
    """How far the held-out quality of a stage is from that of the first."""
    now, then = quality(stage), quality(first)
    if now is None or then is None:
        return None
    accurate = "accuracy" in stage["quality"]["heldout"]

    def compare(a: Any, b: Any) -> Any:
        return a - b if accurate else a / b - 1

    parts = [s["quality"]["heldout"].get("slices") or [] for s in (stage, first)]
    spread = None
    if len(parts[0]) == len(parts[1]) > 1 and None not in [*parts[0], *parts[1]]:
        spread = float(np.std(compare(*map(np.asarray, parts)), ddof=1))
    return Change(compare(now, then), spread)


# ------------------------------------------------------------------------------ how it is written


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits, thousands apart: `35.31`, `12,400`, `0.0124`, `3.000e−9`."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        digit, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{digit}e{int(power)}".replace("-", "−")
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(value: float | None, decimals: int = 1, *, sign: bool = False) -> str:
    """`12.3 %` of 0.123."""
    if value is None:
        return NONE
    if abs(value) >= 1e7:
        return f"{'+' if sign and value > 0 else ''}{number(100 * value, 3)} %"
    decimals = decimals if abs(value) < 10 else 0
    return f"{100 * value:{'+' if sign else ''},.{decimals}f} %".replace("-", "−")


def quality_text(value: float | None, measure: str) -> str:
    """A perplexity or an accuracy."""
    return percent(value, 2) if measure == "accuracy" else number(value)


def spread_text(spread: float) -> str:
    """`± 0.57` percent or points of 0.0057."""
    return f"±\u00a0{number(100 * spread, 2)}"


def changed(found: Change | None, measure: str) -> str:
    """`+8.4 %` of a perplexity, `−1.2 points` of an accuracy."""
    if found is None:
        return NONE
    if measure == "perplexity":
        return percent(found.mean, sign=True)
    return f"{100 * found.mean:+.1f} points".replace("-", "−")


def unit(values: Sequence[float], suffix: str = "") -> tuple[float, str]:
    """One divisor and prefix for a column: (1e6, "MB")."""
    largest = max(map(abs, values), default=0)
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= factor:
            return factor, prefix + suffix
    return 1.0, suffix


def amount(value: float, suffix: str = "", digits: int = 3) -> str:
    """`2.07 MB`."""
    factor, name = unit([value], suffix)
    return f"{number(value / factor, digits)} {name}".strip()


def duration(seconds: float | None) -> str:
    """`5 min 12 s`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
