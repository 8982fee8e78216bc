"""Heat maps of what was cut where, and by which score: SVG elements, as `drawing.svg` makes them.

Colours carry their strength in their opacity, so that they are right on a light and a dark page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcompress.core.decisions import Decision
from jaxcompress.evaluation.drawing import INK, MUTED, svg, tidy
from jaxcompress.evaluation.report_numbers import number

STAYS, GOES = (0.13, 0.53, 0.82), (0.85, 0.45, 0.05)
FAINTEST, FAINTEST_UNIT = 0.08, 0.3  # so that what goes is seen where its score is the lowest
WRITTEN = 200  # cells in which the number is written, at most
NAMES = 24  # rows that get a name


def sparsity_map(name: str, sparsity: Mapping[str, float]) -> str:
    """The share of zeros by layer and kind of matrix; "" where no layer has a number.

    Args:
      name: of the figure, for its ids.
      sparsity: by path of the matrix.
    """
    found: dict[tuple[int, str], float] = {}
    for path, share in sparsity.items():
        place = re.search(r"(?:^|/)(\d+)/", path)
        if place:
            found[int(place[1]), path[place.end() :].removesuffix("/kernel")] = share
    if not found:
        return ""
    layers = sorted({layer for layer, _ in found})
    kinds = list(dict.fromkeys(kind for _, kind in found))
    shares = np.array([[found.get((layer, k), np.nan) for k in kinds] for layer in layers])

    def draw(figure: Any) -> None:
        axes = tidy(figure.subplots())
        _image(axes, _coloured(np.nan_to_num(shares), STAYS))
        axes.set_xticks(range(len(kinds)), kinds, rotation=20, ha="right")
        shown = range(0, len(layers), -(-len(layers) // NAMES))
        axes.set_yticks(shown, [str(layers[i]) for i in shown])
        axes.set_ylabel("layer")
        if shares.size <= WRITTEN:
            for (row, column), share in np.ndenumerate(shares):
                if np.isfinite(share):
                    text = f"{100 * share:.0f}"
                    axes.text(column, row, text, ha="center", va="center", color=INK, fontsize=8)

    return svg(name, draw, 1.1 + min(0.22 * len(layers), 4.5))


def matrix_map(name: str, decision: Decision) -> str:
    """The scores of one matrix beside what stayed of it."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _image(left, _coloured(decision.scores, STAYS))
        _image(right, _coloured(decision.kept, STAYS))
        ends = f"{number(decision.low, 2)} to {number(decision.high, 2)}"
        left.set_title(f"score {decision.by}, {ends}", fontsize=8, color=MUTED)
        right.set_title(f"stays: {decision.kept.mean():.0%}", fontsize=8, color=MUTED)
        rows, columns = decision.size
        for axes in (left, right):
            tidy(axes)
            axes.set_xticks([-0.5, decision.scores.shape[1] - 0.5], ["0", f"{columns:,}"])
            axes.set_yticks([-0.5, decision.scores.shape[0] - 0.5], ["0", f"{rows:,}"])
            axes.set_xlabel("input", labelpad=-6)
        left.set_ylabel("output", labelpad=-6)

    return svg(name, draw, 2.6)


def group_map(name: str, decisions: Sequence[Decision]) -> str:
    """Scores of heads, neurons, ... by group: strong colours for high ones, orange for what went.

    Args:
      name: of the figure.
      decisions: of one kind; each row is scaled by itself.
    """
    rows = [(d, row) for d in decisions for row in range(len(d.scores))]
    widest = max(d.scores.shape[1] for d in decisions)
    image = np.zeros((len(rows), widest, 4))
    for place, (decision, row) in enumerate(rows):
        scores, kept = decision.scores[row], decision.kept[row]
        span = np.ptp(scores) or 1.0
        strength = (scores - scores.min()) / span
        image[place, : len(scores)] = _coloured(strength, STAYS, FAINTEST_UNIT)
        image[place, : len(scores), :3] = kept[:, None] * STAYS + (1 - kept[:, None]) * GOES
    what, by = decisions[0].what, decisions[0].by
    size = max(d.size[1] for d in decisions)

    def draw(figure: Any) -> None:
        axes = tidy(figure.subplots())
        _image(axes, image)
        several = len(decisions) > 1
        names = [d.where if several else str(row) for d, row in rows]
        shown = range(0, len(rows), -(-len(rows) // NAMES))
        axes.set_yticks(shown, [_short(names[i]) for i in shown])
        last = widest - 0.5
        axes.set_xticks([-0.5, last], ["0", f"{size:,}"])
        axes.set_xlabel(f"{what}; score: {by}", labelpad=-2)

    return svg(name, draw, 0.8 + min(0.2 * len(rows), 5.0))


def maps_of(name: str, decisions: Sequence[Decision]) -> dict[str, str]:
    """Every map of these decisions, by its title."""
    made = {}
    matrices = [d for d in decisions if d.what == "weights"]
    for i, decision in enumerate(matrices):
        made[decision.where] = matrix_map(f"{name}m{i}", decision)
    others: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.what != "weights":
            others.setdefault(decision.what, []).append(decision)
    for i, (what, group) in enumerate(others.items()):
        made[what] = group_map(f"{name}g{i}", group)
    return made


def _short(text: str) -> str:
    return text if len(text) <= 28 else "…" + text[-27:]


def _coloured(
    strength: np.ndarray, colour: tuple[float, float, float], faintest: float = FAINTEST
) -> np.ndarray:
    """`[..., 4]` of values in [0, 1]."""
    alpha = faintest + (1 - faintest) * strength[..., None]
    return np.concatenate([np.broadcast_to(colour, (*strength.shape, 3)), alpha], axis=-1)


def _image(axes: Any, image: np.ndarray) -> None:
    """Each cell as it is, whatever the figure's resolution."""
    axes.imshow((255 * image).astype(np.uint8), aspect="auto", interpolation="none")
