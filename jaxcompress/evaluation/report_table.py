"""The table of a report: a row for each stage, exact numbers behind the shown ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcompress.evaluation.report_markup import Markup, joined, tag
from jaxcompress.evaluation.report_numbers import (
    NONE,
    Run,
    Stage,
    change,
    changed,
    duration,
    measure_of,
    number,
    percent,
    quality,
    quality_text,
    spread_text,
    unit,
    with_quality,
)

Cell = Callable[[Stage], Any]


def cell(value: float | None, text: str, note: str | None = None) -> Markup:
    """A number as a person reads it, with the exact one behind it."""
    if value is None:
        return tag("span", NONE, klass="muted")
    return joined(
        Markup(tag("data", text, value=repr(value))),
        tag("span", note, klass="muted") if note else None,
    )


def stage_table(run: Run) -> Markup | None:
    """A row for each stage; columns that no stage has are left out."""
    stages = run["stages"]
    if not stages:
        return tag("p", "No stage is done yet.", klass="muted")
    columns: list[tuple[str, Cell]] = [("Stage", _stage_cell)]
    columns += [*_quality_columns(run), *_size_columns(run)]
    columns += [("Time", lambda s: cell(s.get("seconds"), duration(s.get("seconds"))))]
    empty = tag("span", NONE, klass="muted")
    shown = [(title, [content(s) for s in stages]) for title, content in columns]
    shown = [(title, cells) for title, cells in shown if any(c != empty for c in cells)]
    head = tag("tr", *(tag("th", title, scope="col") for title, _ in shown))
    rows = [tag("tr", *(tag("td", cells[i]) for _, cells in shown)) for i in range(len(stages))]
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    note = (
        "± is the standard deviation over slices of the held-out data; that of the change, in "
        "percent (points, of an accuracy), compares each slice with itself. KL (nats) and "
        "agreement are against the dense model."
    )
    return joined(
        tag("div", table, klass="scroll stages", tabindex="0"), tag("p", note, klass="small muted")
    )


def _stage_cell(stage: Stage) -> Markup:
    options = ", ".join(f"{key}={value}" for key, value in (stage.get("options") or {}).items())
    notes = [tag("small", note) for note in stage.get("notes") or []]
    return joined(tag("span", stage["name"], klass="whole"), tag("small", options), *notes)


def _quality_columns(run: Run) -> list[tuple[str, Cell]]:
    measure, first = measure_of(run), next(iter(with_quality(run)), None)

    def heldout(stage: Stage, name: str) -> float | None:
        return stage.get("quality", {}).get("heldout", {}).get(name)

    def main(stage: Stage) -> Markup:
        value, spread = quality(stage), heldout(stage, "spread")
        if value is None and "heldout" in stage.get("quality", {}):
            return tag("span", "not finite", klass="bad")
        note = None
        if spread is not None:
            note = f"± {percent(spread, 2) if measure == 'accuracy' else number(spread, 2)}"
        return cell(value, quality_text(value, measure), note)

    def moved(stage: Stage) -> Markup:
        found = change(stage, first) if first is not None and stage is not first else None
        if found is None:
            return cell(None, "")
        note = spread_text(found.spread) if found.spread is not None else None
        return cell(found.mean, changed(found, measure), note)

    def train(stage: Stage) -> Markup:
        value = quality(stage, "train")
        return cell(value, quality_text(value, measure))

    def plain(name: str, text: Callable[[Any], str]) -> Cell:
        return lambda stage: cell(heldout(stage, name), text(heldout(stage, name)))

    return [
        (measure.capitalize(), main),
        ("Change", moved),
        ("On train", train),
        ("KL", plain("kl", lambda v: number(v, 3))),
        ("Agree", plain("agreement", percent)),
    ]


def _size_columns(run: Run) -> list[tuple[str, Cell]]:
    def size(stage: Stage, name: str) -> float | None:
        return (stage.get("size") or {}).get(name)

    def column(title: str, name: str, suffix: str = "", of: str | None = None) -> tuple[str, Cell]:
        every = [size(s, name) for s in run["stages"]]
        factor, shown = unit([v for v in every if v is not None], suffix)

        def content(stage: Stage) -> Markup:
            value, whole = size(stage, name), size(stage, of) if of else None
            text = number(None if value is None else value / factor, 3)
            note = percent(value / whole, 0) if value is not None and whole else None
            return cell(value, text, note)

        return f"{title}, {shown}" if shown else title, content

    one = "image" if measure_of(run) == "accuracy" else "token"
    timed = any(size(s, "per_second") is not None for s in run["stages"])
    return [
        column("Disk", "bytes_disk", "B"),
        column("Memory", "bytes_memory", "B"),
        column("Bits / weight", "bits_per_weight"),
        column("Non-zero weights", "nonzero", of="parameters"),
        column(f"FLOPs / {one}", "flops"),
        column("Non-zero FLOPs", "flops_nonzero"),
        *([column(f"{one.capitalize()}s / s", "per_second")] if timed else []),
    ]
