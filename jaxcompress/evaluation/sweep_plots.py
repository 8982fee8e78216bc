"""The figures of a sweep: a method's sparsity against its quality, its maps, and all together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxcompress.core.decisions import Decision
from jaxcompress.evaluation.drawing import (
    FIRST,
    LINE,
    MUTED,
    PAGE,
    RULE,
    SECOND,
    SEVERAL,
    axes_of,
    standalone,
    svg,
    tidy,
    wide_range,
)
from jaxcompress.evaluation.heat_maps import maps_of, sparsity_map
from jaxcompress.evaluation.report_numbers import change, measure_of, quality

Row = Mapping[str, Any]
REFERENCE = "magnitude"  # the grey line in the figures of methods that zero weights
WORST = 30.0  # times the dense perplexity: the overview shows no more
MARKS = "osD^vP*X"


def draw(rows: Sequence[Row], label: str | None = None) -> dict[str, str]:
    """SVG files by name: those of one method, or the overview; none where nothing was measured.

    Args:
      rows: of `recipe.sweep`; the first is of the dense model.
      label: as in `row["method"]`; None: the overview.
    """
    dense = rows[0]
    if label is None:
        return {"overview.svg": standalone(overview(rows), "All methods", "sweep.jsonl", 900)}
    mine = [row for row in rows if row["method"] == label and _finite(row)]
    if not mine:
        return {}
    name = file_name(label)
    reference = [row for row in rows if row["method"] == REFERENCE and _finite(row)]
    if label == REFERENCE or mine[0]["of"] != (reference or mine)[0]["of"]:
        reference = []
    made = {f"{name}.svg": (curve(name, mine, dense, reference), f"{label}: quality")}
    for row in mine:
        decisions = [Decision.read(record) for record in row.get("decisions", ())]
        maps = list(maps_of(f"{name}-map", decisions).items())
        shares = row.get("layers") or {}
        if max(shares.values(), default=0) - min(shares.values(), default=0) > 0.01:
            maps.append(("share of zeros", sparsity_map(f"{name}-zeros", shares)))
        for i, (title, plot) in enumerate(maps):
            if plot:
                told = f"{label} {_options(row)}: {title}"
                made[f"{name}-map{i or ''}.svg"] = (plot, told)
    return {file: standalone(plot, told, "sweep.jsonl") for file, (plot, told) in made.items()}


def file_name(label: str) -> str:
    """`wanda-allocation-owl` of `wanda:allocation=owl`."""
    return re.sub(r"[^\w.-]+", "-", label)


def _options(row: Row) -> str:
    return ", ".join(f"{key}={value}" for key, value in row["options"].items())


def _finite(row: Row) -> bool:
    return "quality" in row and quality(row) is not None


def _pattern(row: Row) -> str:
    found = row["options"].get("pattern", "unstructured")
    return "" if found == "unstructured" else str(found)


def _line(rows: Sequence[Row]) -> list[Row]:
    """The rows without a pattern, or all of one that is fixed, by how much went."""
    free = [row for row in rows if not _pattern(row)]
    chosen = free or list(rows)
    return sorted(chosen, key=lambda row: row.get("removed", 0.0))


def curve(name: str, rows: Sequence[Row], dense: Row, reference: Sequence[Row]) -> str:
    """How much went against quality: held-out with its spread, and on the calibration data."""
    measure = measure_of({"stages": [dense]})
    scale = 100.0 if measure == "accuracy" else 1.0
    line = [dense, *_line(rows)]
    points = [row for row in rows if row not in line]

    def at(row: Row, role: str = "heldout") -> tuple[float, float]:
        return 100 * row.get("removed", 0.0), scale * (quality(row, role) or math.nan)

    def spread(row: Row) -> float:
        found = change(row, dense)
        unit = scale if measure == "accuracy" else quality(dense) or 0.0
        return unit * ((found and found.spread) or 0.0)

    def panel(figure: Any) -> None:
        axes = axes_of(figure)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        if reference:
            xy = [at(row) for row in [dense, *_line(reference)]]
            axes.plot(*zip(*xy), color=LINE, linewidth=1.2, label=REFERENCE)
        axes.plot(*zip(*(at(row, "train") for row in line)), "--o", color=FIRST, linewidth=1,
                  markersize=4.5, markerfacecolor=PAGE, label="calibration")  # fmt: skip
        axes.errorbar(*zip(*map(at, line)), [spread(row) for row in line], color=FIRST, fmt="-o",
                      markersize=5, linewidth=1.6, elinewidth=1, label="held out")  # fmt: skip
        for row in points:
            x, y = at(row)
            axes.errorbar(x, y, spread(row), fmt="s", color=SECOND, markersize=5, elinewidth=1)
            axes.annotate(_pattern(row), (x, y), xytext=(6, 3), textcoords="offset points",
                          color=SECOND)  # fmt: skip
        values = [at(row, role)[1] for row in [*line, *points] for role in ("heldout", "train")]
        wide_range(axes, "y", [v for v in values if v == v], measure)
        axes.set_xlabel(f"gone, % of {rows[0]['of']}")
        axes.set_ylabel(f"{measure}{', %' if measure == 'accuracy' else ''}")
        axes.legend(frameon=False, labelcolor=MUTED, fontsize=8)

    return svg(name, panel, 3.2)


def overview(rows: Sequence[Row]) -> str:
    """A panel for each family of methods, all on the same axis of quality."""
    dense = rows[0]
    measure = measure_of({"stages": [dense]})
    scale = 100.0 if measure == "accuracy" else 1.0
    best = scale * (quality(dense) or 1.0)
    worst = max([scale * (quality(r) or 0.0) for r in rows if _finite(r)])
    worst = min(1.1 * worst, WORST * best)
    families: dict[str, dict[str, list[Row]]] = {}
    for row in rows[1:]:
        if _finite(row):
            families.setdefault(row["family"], {}).setdefault(row["method"], []).append(row)
    columns = 3
    height = max(-(-len(families) // columns), 1)

    def panels(figure: Any) -> None:
        every = figure.subplots(height, columns, sharey=True, squeeze=False).ravel()
        for axes, (family, methods) in zip(every, families.items()):
            tidy(axes)
            axes.grid(axis="y", color=RULE, linewidth=0.8)
            axes.axhline(best, color=LINE, linewidth=1)
            for i, (label, mine) in enumerate(methods.items()):
                xy = [(100 * r["removed"], scale * (quality(r) or 0.0)) for r in _line(mine)]
                axes.plot(*zip(*xy), marker=MARKS[i % len(MARKS)], markersize=3.5, linewidth=1.2,
                          color=SEVERAL[i % len(SEVERAL)], label=label)  # fmt: skip
            axes.set_title(family, fontsize=9, color=MUTED)
            axes.set_xlabel("gone, %")
            axes.legend(frameon=False, fontsize=7, labelcolor=MUTED, handlelength=1.4)
            if measure == "perplexity":
                wide_range(axes, "y", (best, worst), measure)
                axes.set_ylim(0.93 * best, worst)
        for axes in every[len(families) :]:
            axes.set_visible(False)
        for row in range(height):
            every[row * columns].set_ylabel(f"{measure}, held out")

    return svg("overview", panels, 3.2 * height, 11.0)
