"""The plots of a report, as SVG that takes its colours and fonts from the page around it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.evaluation.drawing import (
    FIRST,
    LINE,
    MUTED,
    PAGE,
    RULE,
    SECOND,
    axes_of,
    label_points,
    svg,
    tidy,
    wide_range,
)
from jaxcompress.evaluation.report_numbers import (
    Run,
    Stage,
    change,
    measure_of,
    quality,
    size_key,
    unit,
)

LOSS_POINTS = 400
LARGEST = 1e100  # a perplexity that an axis can hold


def size_against_quality(run: Run) -> str:
    """Each stage that has both, joined in order; bars: spread of the change over the slices."""
    stages = [s for s in run["stages"] if _drawable(s) and s.get("size")]
    if not stages:
        return ""
    measure, key = measure_of(run), size_key(stages)
    sizes = [s["size"][key] for s in stages]
    factor, name = unit(sizes, "B")
    percents = 100.0 if measure == "accuracy" else 1.0
    x = [size / factor for size in sizes]
    y = [percents * (quality(s) or 0.0) for s in stages]
    found = [change(s, stages[0]) for s in stages]
    scale = percents if measure == "accuracy" else y[0]
    spread = [scale * ((c and c.spread) or 0.0) for c in found]

    def draw(figure: Any) -> None:
        axes = axes_of(figure)
        axes.plot(x, y, color=LINE, linewidth=1.2, zorder=1)
        axes.errorbar(x, y, spread, fmt="none", ecolor=MUTED, elinewidth=1, zorder=2)
        axes.plot(x, y, "o", color=FIRST, markersize=6, zorder=3)
        axes.set_xlim(0, max(x) * 1.12)
        axes.margins(y=0.12)
        wide_range(axes, "y", y, measure)
        axes.set_xlabel(f"{'on disk' if key == 'bytes_disk' else 'in memory'}, {name}")
        axes.set_ylabel(f"{measure}{', %' if measure == 'accuracy' else ''}")
        label_points(figure, axes, list(zip(x, y, strict=True)), _short_names(stages))

    return svg("size", draw, 3.4)


def train_against_heldout(run: Run) -> str:
    """Quality on training and on held-out data, stage by stage."""
    stages = [s for s in run["stages"] if _drawable(s) and _drawable(s, "train")]
    if not stages:
        return ""
    measure = measure_of(run)
    scale = 100.0 if measure == "accuracy" else 1.0

    def draw(figure: Any) -> None:
        axes = axes_of(figure)
        for row, stage in enumerate(stages):
            ends = [scale * (quality(stage, role) or 0.0) for role in ("train", "heldout")]
            axes.plot(ends, [row, row], color=LINE, linewidth=2, zorder=1)
            axes.plot(ends[0], row, "o", color=PAGE, markeredgecolor=FIRST, zorder=2)
            axes.plot(ends[1], row, "o", color=FIRST, markeredgecolor=FIRST, zorder=3)
        axes.set_yticks(range(len(stages)), _short_names(stages))
        axes.set_ylim(len(stages) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        values = [quality(s, role) or 1.0 for s in stages for role in ("train", "heldout")]
        wide_range(axes, "x", values, measure)
        axes.set_xlabel(f"{measure}{', %' if measure == 'accuracy' else ''}")

    return svg("gap", draw, 0.9 + 0.28 * len(stages))


def layer_panels(stages: Sequence[Stage]) -> list[str]:
    """Error and zeros by parameter, a plot for each stage; all on the same axes."""
    staged = [measured_rows(stage) for stage in stages]
    order = {path: 0 for rows in staged for path in (row["path"] for row in rows)}
    order = {path: i for i, path in enumerate(sorted(order, key=_natural))}
    errors = [row["sqnr_db"] for rows in staged for row in rows]
    limits = (min(errors, default=0.0), max(errors, default=0.0))
    missing = max(10 - (limits[1] - limits[0]), 0) / 2  # small differences are to look small
    limits = (limits[0] - missing, limits[1] + missing)
    return [_layer_panel(f"layers{i}", rows, order, limits) for i, rows in enumerate(staged)]


def measured_rows(stage: Stage) -> list[Mapping[str, Any]]:
    """Rows of the parameters whose error is known."""
    return [r for r in stage.get("layers") or [] if r.get("sqnr_db") is not None]


def _layer_panel(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    order: Mapping[str, int],
    limits: tuple[float, float],
) -> str:
    place = [order[row["path"]] for row in rows]
    errors = [row["sqnr_db"] for row in rows]
    zeros = [100 * (row.get("sparsity") or 0.0) for row in rows]
    has_zeros = max(zeros) > 1

    def draw(figure: Any) -> None:
        starts = _thinned(_layer_starts(order), 12)
        heights = [2.2, 1] if has_zeros else [1]
        panels = np.ravel(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
        for axes in panels:
            tidy(axes)
            axes.grid(axis="y", color=RULE, linewidth=0.8)
            for edge, _ in starts:
                axes.axvline(edge - 0.5, color=RULE, linewidth=0.6, zorder=0)
        _dots(panels[0], place, errors, FIRST)
        margin = 0.08 * (limits[1] - limits[0])
        panels[0].set_ylim(limits[0] - margin, limits[1] + margin)
        panels[0].set_ylabel("SQNR, dB")
        if has_zeros:
            _dots(panels[1], place, zeros, SECOND)
            panels[1].set_ylim(0, 100 if max(zeros) > 75 else 1.25 * max(zeros))
            panels[1].set_ylabel("zeros, %")
        if has_zeros:
            panels[0].tick_params(axis="x", length=0)
        panels[-1].set_xlim(-0.7, len(order) - 0.3)
        panels[-1].set_xticks([at for at, _ in starts], [text for _, text in starts])
        panels[-1].set_xlabel("parameters, by layer")

    return svg(name, draw, 3.3 if has_zeros else 2.5)


def _dots(axes: Any, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    """Dots as one path (lines of no length with round ends): thousands take little room."""
    gaps = [np.nan] * len(x)
    xs = np.ravel(np.stack([x, np.add(x, 1e-3), gaps], axis=1))
    ys = np.ravel(np.stack([y, y, gaps], axis=1))
    width = 5 if len(x) <= 60 else 3.5 if len(x) <= 300 else 2
    axes.plot(xs, ys, color=colour, linewidth=width, solid_capstyle="round")


def _layer_starts(order: Mapping[str, int]) -> list[tuple[int, str]]:
    """Where each layer begins on the axis, and its number."""
    starts, last = [], None
    for path, place in order.items():
        match = re.search(r"(?:^|/)(\d+)(?:/|$)", path)
        layer = match[0] and match.string[: match.end(1)] if match else None
        if match and layer != last:
            starts.append((place, match[1]))
        last = layer
    return starts


def _natural(path: str) -> list[Any]:
    """Numbers in a path by their value; embeddings before layers, what follows them after."""
    parts = [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split("/")]
    return [not re.match(r"(embed|wte|wpe|conv1|bn1)", path), "layer" not in path, *parts]


def _thinned(items: list[Any], most: int) -> list[Any]:
    return items[:: math.ceil(len(items) / most)] if items else items


def loss_curve(name: str, losses: Sequence[Mapping[str, Any]]) -> str:
    """Loss by step; of a long training means over equal parts, with their range behind."""
    steps, values = np.array([(row["step"], row["loss"]) for row in losses], np.float64).T

    def draw(figure: Any) -> None:
        axes = axes_of(figure)
        x, y = steps, values
        if len(values) > LOSS_POINTS:
            parts = np.array_split(values, LOSS_POINTS)
            x = np.array([part.mean() for part in np.array_split(steps, LOSS_POINTS)])
            y = np.array([part.mean() for part in parts])
            low, high = ([f(part) for part in parts] for f in (np.min, np.max))
            axes.fill_between(x, low, high, color=RULE, linewidth=0)
        axes.plot(x, y, color=FIRST, linewidth=1.6)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.margins(x=0.02)

    return svg(name, draw, 2.5)


def _drawable(stage: Stage, role: str = "heldout") -> bool:
    value = quality(stage, role)
    return value is not None and value < LARGEST


def _short_names(stages: Sequence[Stage]) -> list[str]:
    return [s["name"] if len(s["name"]) <= 24 else s["name"][:23] + "…" for s in stages]
