"""How the figures of reports and sweeps are drawn: SVG that takes its colours from the page."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress.evaluation.report_style import PALETTE

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
# Of many lines in one plot; as easy to see on light as on dark.
SEVERAL = (
    "#2186d1",
    "#d9730d",
    "#2a9d5c",
    "#c7407a",
    "#7d63d6",
    "#a08a14",
    "#12a0a0",
    "#8a8f98",
    "#b3452c",
    "#5b8c2a",
)
WIDTH = 5.0  # inches: a phone shows it a little smaller, a wide screen as it is
DOT = 5  # points around a dot that no name may cover
AROUND = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
Box = tuple[float, ...]  # left, bottom, right, top
FONT = "svg{background:var(--page);font-family:system-ui,sans-serif}"


def axes_of(figure: Any) -> Any:
    """The only axes of a figure."""
    return tidy(figure.subplots())


def tidy(axes: Any) -> Any:
    """Axes without a frame, in the page's colours."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(which="both", colors=MUTED, length=3, width=0.8)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.set_axisbelow(True)
    return axes


def wide_range(axes: Any, which: str, values: Sequence[float], measure: str) -> None:
    """A logarithmic axis, where a method that broke the model would flatten all others."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if measure == "perplexity" and max(values) > 8 * min(values) > 0:
        axes.set(**{f"{which}scale": "log"})
        axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axis.set_minor_formatter(NullFormatter())


def label_points(figure: Any, axes: Any, points: Any, names: Sequence[str]) -> None:
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


def svg(name: str, draw: Callable[[Any], None], height: float, width: float = WIDTH) -> str:
    """What `draw(figure)` draws, as an SVG element to stand in a page; sizes in inches."""
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
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
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


def standalone(plot: str, title: str, about: str, width: int = 540) -> str:
    """An element of `svg` as a file of its own, light or dark as the reader's screen is.

    Args:
      plot: the element.
      title: what it shows.
      about: what it was drawn from.
      width: in pixels, where nothing else says it.
    """
    head = (
        f"<title>{html.escape(title)}</title><desc>{html.escape(about)}</desc>"
        f"<style>{PALETTE}{FONT}</style>"
    )
    opened, inside = plot.split(">", 1)
    return f'{opened} width="{width}" xmlns="http://www.w3.org/2000/svg">{head}{inside}\n'
