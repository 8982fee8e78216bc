"""Bytes against predicted cost, and why each parameter got what it got: records, text, a figure."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.evaluation.drawing import FIRST, MUTED, RULE, axes_of, standalone, svg
from jaxcompress.quantization.allocation import Allocation, uniform
from jaxcompress.quantization.sensitivity import Sensitivities

SOURCE = "frontier.json"


def uniforms(table: Sensitivities) -> list[Allocation]:
    """One candidate for all parameters, each that fits them all."""
    whole = np.isfinite(table.costs).all(0)
    return [uniform(table, c.name) for c, fits in zip(table.candidates, whole, strict=True) if fits]


def record(allocation: Allocation) -> dict[str, Any]:
    """Bytes, bits, predicted cost, the prices and the format of each parameter, as JSON holds."""
    made = {
        "bytes": allocation.bytes,
        "bits": allocation.bits,
        "cost": allocation.cost,
        "prices": dict(allocation.prices),
        "formats": {path: c.name for path, c in allocation.candidates().items()},
    }
    return made if allocation.latency is None else made | {"seconds": allocation.latency}


def table_record(table: Sensitivities) -> dict[str, Any]:
    """All costs and bytes, as JSON holds; None where a format does not fit."""
    names = [c.name for c in table.candidates]
    rows = {}
    for path, costs, sizes in zip(table.paths, table.costs, table.bytes, strict=True):
        rows[path] = {
            name: {"cost": float(cost), "bytes": int(size)} if np.isfinite(cost) else None
            for name, cost, size in zip(names, costs, sizes, strict=True)
        }
    groups = [list(group) for group in table.groups]
    return {"by": table.by, "unit": table.unit, "groups": groups, "parameters": rows}


def reasons(allocation: Allocation) -> str:
    """A Markdown table: of each parameter the format, and what every alternative would have cost.

    In brackets, the cost with the price of the bytes (and of the seconds) added: what the
    parameters compete with. The format that a parameter got is in bold.
    """
    table = allocation.table
    names = [c.name for c in table.candidates]
    full = with_prices(allocation)
    lines = [
        f"Cost by {table.by}, {table.unit}; in brackets with the price of "
        f"{_prices(allocation)} added.",
        "",
        f"| parameter | {' | '.join(names)} | why |",
        f"|{' --- |' * (len(names) + 2)}",
    ]
    for row, (path, chosen) in enumerate(zip(table.paths, allocation.choice, strict=True)):
        cells = []
        for column in range(len(names)):
            cell = f"{table.costs[row, column]:.2e} ({full[row, column]:.2e})"
            if not np.isfinite(table.costs[row, column]):
                cell = "does not fit"
            cells.append(f"**{cell}**" if column == chosen else cell)
        lines.append(f"| {path} | {' | '.join(cells)} | {_why(allocation, full, path)} |")
    return "\n".join(lines) + "\n"


def with_prices(allocation: Allocation) -> np.ndarray:
    """Costs with the prices of bytes and seconds added, `[P, C]`."""
    full = allocation.table.costs + allocation.prices.get("bytes", 0.0) * allocation.table.bytes
    if allocation.seconds is not None:
        times = np.nan_to_num(allocation.seconds)  # NaN where a format does not fit
        full = full + allocation.prices.get("seconds", 0.0) * times
    return full


def _why(allocation: Allocation, full: np.ndarray, path: str) -> str:
    """Why a parameter got its format, by those that it shares it with."""
    table = allocation.table
    together = next(group for group in table.groups if path in group)
    members = [table.paths.index(one) for one in together]
    if len({int(allocation.choice[i]) for i in members}) > 1:  # they were free
        together, members = (path,), [table.paths.index(path)]
    summed = full[members].sum(0)
    best, chosen = int(np.argmin(summed)), int(allocation.choice[members[0]])
    tied = "" if len(together) == 1 else ", with what shares its input"
    if summed[chosen] <= summed[best] * (1 + 1e-9):
        return f"least with price{tied}"
    gap = f"{summed[chosen] - summed[best]:.1e} above {table.candidates[best].name}"
    larger = table.bytes[members, chosen].sum() > table.bytes[members, best].sum()
    return f"{gap}, {'to use' if larger else 'to keep'} the budget{tied}"


def _prices(allocation: Allocation) -> str:
    units = {"bytes": ("KiB", 1024.0), "seconds": ("us", 1e-6)}
    told = [
        f"{value * units[name][1]:.2e} a {units[name][0]}"
        for name, value in allocation.prices.items()
    ]
    return " and ".join(told) or "nothing"


def figure(allocations: Sequence[Allocation], title: str = "Mixed precision") -> str:
    """An SVG: predicted cost against bits per weight, the frontier and each format for all."""
    table = allocations[0].table
    alone = [a for a in uniforms(table) if a.cost > 0]
    shown = [a for a in allocations if a.cost > 0]

    def draw(figure: Any) -> None:
        from matplotlib.ticker import FuncFormatter, NullFormatter

        axes = axes_of(figure)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(color=RULE, linewidth=0.8)
        axes.plot(
            [a.bits for a in shown], [a.cost for a in shown], "o-", color=FIRST, markersize=4,
            linewidth=1.6, zorder=3,
        )  # fmt: skip
        axes.plot([a.bits for a in alone], [a.cost for a in alone], "s", color=MUTED, markersize=5)
        for one in alone:
            name = next(iter(one.candidates().values())).name
            axes.annotate(
                name, (one.bits, one.cost), xytext=(6, 4), textcoords="offset points", color=MUTED
            )
        axes.set_xlabel("bits per weight, scales counted")
        axes.set_ylabel(f"predicted {'KL' if table.by == 'kl' else table.by}, {table.unit}")

    return standalone(svg("frontier", draw, 3.4), title, SOURCE)


def write(folder: str | Path, allocations: Sequence[Allocation]) -> list[Path]:
    """`frontier.json`, `frontier.csv` and `frontier.svg` of a sweep of one table.

    The JSON holds the table of costs, too; the CSV one row for each assignment, uniform ones among
    them.

    Args:
      folder: made where it is not there.
      allocations: of `frontier`.

    Returns:
      The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = allocations[0].table
    both = {
        "frontier": [record(a) for a in allocations],
        "uniform": [record(a) for a in uniforms(table)],
    }
    files = [folder / f"frontier.{end}" for end in ("json", "csv", "svg")]
    files[0].write_text(json.dumps({**both, "table": table_record(table)}, indent=1) + "\n")
    with files[1].open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["kind", "bytes", "bits", "cost", *table.paths])
        for kind, records in both.items():
            for one in records:
                numbers = one["bytes"], f"{one['bits']:.6g}", f"{one['cost']:.6g}"
                rows.writerow([kind, *numbers, *one["formats"].values()])
    files[2].write_text(figure(allocations))
    return files
