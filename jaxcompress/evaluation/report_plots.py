"""The plots of a report, as SVG that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.evaluation.report_numbers import (
    Run,
    Stage,
    change,
    measure_of,
    quality,
    size_key,
    unit,
)

# Stand-ins that the page's style takes the place of, so that a plot is right on light and on dark.
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "rule": "#030303",
    "line": "#070707",
    "first": "#040404",
    "second": "#050505",
    "page": "#060606",
}
INK, MUTED, RULE, LINE, FIRST, SECOND, PAGE = COLOURS.values()
WIDTH = 5.0  # inches: a phone shows it a little smaller, a wide screen as it is
LOSS_POINTS = 400
DOT = 5  # points around a dot that no name may cover
AROUND = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
LARGEST = 1e100  # a perplexity that an axis can hold
Box = tuple[float, ...]  # left, bottom, right, top


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
        axes = _axes(figure)
        axes.plot(x, y, color=LINE, linewidth=1.2, zorder=1)
        axes.errorbar(x, y, spread, fmt="none", ecolor=MUTED, elinewidth=1, zorder=2)
        axes.plot(x, y, "o", color=FIRST, markersize=6, zorder=3)
        axes.set_xlim(0, max(x) * 1.12)
        axes.margins(y=0.12)
        _wide_range(axes, "y", y, measure)
        axes.set_xlabel(f"{'on disk' if key == 'bytes_disk' else 'in memory'}, {name}")
        axes.set_ylabel(f"{measure}{', %' if measure == 'accuracy' else ''}")
        _label_points(figure, axes, list(zip(x, y, strict=True)), _short_names(stages))

    return _svg("size", draw, 3.4)


def train_against_heldout(run: Run) -> str:
    """Quality on training and on held-out data, stage by stage."""
    stages = [s for s in run["stages"] if _drawable(s) and _drawable(s, "train")]
    if not stages:
        return ""
    measure = measure_of(run)
    scale = 100.0 if measure == "accuracy" else 1.0

    def draw(figure: Any) -> None:
        axes = _axes(figure)
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
        _wide_range(axes, "x", values, measure)
        axes.set_xlabel(f"{measure}{', %' if measure == 'accuracy' else ''}")

    return _svg("gap", draw, 0.9 + 0.28 * len(stages))


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
            _tidy(axes)
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

    return _svg(name, draw, 3.3 if has_zeros else 2.5)


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
        axes = _axes(figure)
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

    return _svg(name, draw, 2.5)


# --------------------------------------------------------------------------------------- drawing


def _drawable(stage: Stage, role: str = "heldout") -> bool:
    value = quality(stage, role)
    return value is not None and value < LARGEST


def _axes(figure: Any) -> Any:
    return _tidy(figure.subplots())


def _tidy(axes: Any) -> Any:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(which="both", colors=MUTED, length=3, width=0.8)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.set_axisbelow(True)
    return axes


def _short_names(stages: Sequence[Stage]) -> list[str]:
    return [s["name"] if len(s["name"]) <= 24 else s["name"][:23] + "…" for s in stages]


def _wide_range(axes: Any, which: str, values: Sequence[float], measure: str) -> None:
    """A logarithmic axis, where a method that broke the model would flatten all others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if measure == "perplexity" and max(values) > 8 * min(values) > 0:
        axes.set(**{f"{which}scale": "log"})
        axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.set_minor_formatter(NullFormatter())


def _label_points(figure: Any, axes: Any, points: Any, names: Sequence[str]) -> None:
    """A name beside each point, where it covers neither a point nor another name."""
    figure.draw_without_rendering()  # fixes the layout, which names must not change
    figure.set_layout_engine("none")
    at = axes.transData.transform(points)
    along = [a + t * (b - a) for a, b in itertools.pairwise(at) for t in np.linspace(0, 1, 40)]
    taken: list[Box] = [
        (x - r, y - r, x + r, y + r) for r, c in ((DOT, at), (1, along)) for x, y in c
    ]
    for i, (point, name) in enumerate(zip(points, names, strict=True)):
        best = None
        for distance, way in itertools.product((9, 17, 27, 40), AROUND):
            text, box = _named(axes, point, name, distance, way)
            cost = sum(_overlap(box, other) for other in taken) + _outside(box, figure.bbox.extents)
            cost += _ambiguous(box, i, at)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
            if cost == 0:
                break
        assert best is not None
        taken.append(best[2])


def _named(
    axes: Any, point: Sequence[float], name: str, distance: float, way: tuple[int, int]
) -> tuple[Any, Box]:
    far = {"arrowstyle": "-", "color": LINE, "shrinkB": 4, "linewidth": 0.8}
    text = axes.annotate(
        name,
        point,
        xytext=(way[0] * distance, way[1] * distance * 0.9),
        textcoords="offset points",
        ha={1: "left", 0: "center", -1: "right"}[way[0]],
        va={1: "bottom", 0: "center", -1: "top"}[way[1]],
        color=INK,
        arrowprops=far if distance > 9 else None,
    )
    return text, tuple(text.get_window_extent().extents)


def _outside(box: Box, frame: Box) -> float:
    return _area(box) - _overlap(box, frame)


def _ambiguous(box: Box, own: int, points: Any) -> float:
    """A cost for each other point that is as near to a name as its own."""
    away = [
        math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))
        for x, y in points
    ]
    return 300.0 * sum(d < away[own] + 3 for i, d in enumerate(away) if i != own)


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def _overlap(a: Box, b: Box) -> float:
    corners = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return _area(corners) if corners[2] > corners[0] and corners[3] > corners[1] else 0.0


def _svg(name: str, draw: Callable[[Any], None], height: float) -> str:
    """What `draw(figure)` draws, as an SVG element to stand in a page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9,
        "axes.labelsize": 9,
        "text.parse_math": False,  # names come from outside
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "path.simplify": False,
        "axes.unicode_minus": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name)


def _inline(text: str, name: str) -> str:
    """An SVG file as an element of HTML: no prolog, no metadata, ids of its own."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    # The page's font: older versions of matplotlib write size and family in one.
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" ?', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*" ?', r"\1", text, count=1)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r">\s+<", "><", text).strip()
