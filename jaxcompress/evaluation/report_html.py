"""`report.html`: one page without any outside resource, made of a run's record alone."""

from __future__ import annotations

import datetime
import html
import json
from typing import Any

import numpy as np

from jaxcompress.core.decisions import Decision
from jaxcompress.evaluation import heat_maps
from jaxcompress.evaluation import report_plots as plots
from jaxcompress.evaluation.report_markup import Markup, definitions, joined, tag
from jaxcompress.evaluation.report_numbers import (
    NONE,
    Run,
    amount,
    change,
    changed,
    duration,
    measure_of,
    measured,
    number,
    quality,
    quality_text,
    size_key,
    spread_text,
    with_quality,
    with_size,
)
from jaxcompress.evaluation.report_style import PALETTE, STYLE
from jaxcompress.evaluation.report_table import stage_table

# Images: heat maps that stand in the page itself.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(run: Run) -> str:
    """The whole page of a checked record."""
    body = joined(
        headline(run),
        section("Stages", stage_table(run)),
        section("Size and quality", size_and_quality(run)),
        section("What the stages changed", layer_figures(run)),
        section("What went, and by which score", decision_figures(run)),
        section("Training", loss_figures(run)),
        section("Checks", check_list(run)),
        section("Model and data", model_and_data(run)),
        section("Run", run_details(run)),
    )
    head = joined(
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'),
        tag("title", f"{run['name']}: report"),
        tag("style", Markup(PALETTE + STYLE)),
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def section(title: str, content: Markup | None) -> Markup | None:
    """A heading and what stands under it; nothing where there is nothing."""
    if not content:
        return None
    return tag("section", tag("h2", title), content)


# ------------------------------------------------------------------------------- the ten seconds


def headline(run: Run) -> Markup:
    """What model, how much smaller, what quality was lost, whether all checks passed."""
    model = run["model"]
    said = joined(tag("b", model["name"]), f", {amount(model['parameters'])} parameters")
    for i, stage in enumerate(run["stages"]):
        said = joined(said, " → " if i else ": ", tag("span", stage["name"], klass="whole"))
    when = f"{_when(run['started'])}, {duration(run['seconds'])}"
    return tag(
        "header",
        tag("p", f"jaxcompress report · {when}", klass="small muted"),
        tag("h1", run["name"]),
        tag("p", said),
        tag("div", size_tile(run), quality_tile(run), check_tile(run), klass="tiles"),
    )


def _when(started: str) -> str:
    """`2026-12-02 14:03 UTC` of a time in ISO 8601; any other text as it is."""
    try:
        time = datetime.datetime.fromisoformat(started)
    except ValueError:
        return started
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def tile(figure: str, text: str, klass: str | None = None) -> Markup:
    """A large figure and what it is."""
    return tag("div", tag("b", figure, klass=klass), tag("span", text, klass="muted"), klass="tile")


def size_tile(run: Run) -> Markup:
    """How many times smaller."""
    stages = with_size(run)
    if not stages:
        return tile(NONE, "size not measured yet")
    key = size_key(stages)
    where = "on disk" if key == "bytes_disk" else "in memory"
    first, last = (stages[i]["size"][key] for i in (0, -1))
    if len(stages) == 1:
        return tile(amount(last, "B"), where)
    sizes = f"{amount(first, 'B')} → {amount(last, 'B')} {where}"
    if last == first:
        return tile("As large", sizes)
    if last > first:
        return tile(f"{number(last / first, 3)}× larger", sizes)
    return tile(f"{number(first / max(last, 1), 3)}× smaller", sizes)


def quality_tile(run: Run) -> Markup:
    """What quality was lost."""
    every, stages, measure = measured(run), with_quality(run), measure_of(run)
    if not every:
        return tile(NONE, "quality not measured yet")
    if quality(every[-1]) is None:
        return tile("Not finite", f"{measure} on held-out data", "bad")
    if len(every) == 1:
        return tile(quality_text(quality(every[0]), measure), f"{measure} on held-out data")
    found = change(stages[-1], stages[0])
    ends = [quality_text(quality(s), measure) for s in (stages[0], stages[-1])]
    spread = ""
    if found is not None and found.spread:
        unit_name = "points" if measure == "accuracy" else "%"
        spread = f"; change {spread_text(found.spread)} {unit_name} over slices"
    what = "" if measure == "perplexity" and "points" in changed(found, measure) else measure
    return tile(
        f"{changed(found, measure)} {what}".strip(),
        f"{ends[0]} → {ends[1]} on held-out data{spread}",
    )


def check_tile(run: Run) -> Markup:
    """Whether all checks passed, and whether the run is over."""
    checks, stages = run["checks"], run["stages"]
    planned = run.get("planned") or []
    failed = [c["name"] for c in checks if not c["passed"]]
    left = max(len(planned) - len(stages), 0)
    progress = f"{len(stages)} of {len(planned)} stages done" if left else ""
    if failed:
        names = ", ".join(failed)
        return tile(f"{len(failed)} of {len(checks)} checks failed", names, "bad")
    if left:
        return tile("Unfinished", progress)
    if not checks:
        return tile("No checks", "none was made")
    return tile(
        "The check passed" if len(checks) == 1 else f"All {len(checks)} checks passed",
        ", ".join(c["name"] for c in checks),
        "good",
    )


# ---------------------------------------------------------------------------------------- plots


def figure(title: Any, plot: str, caption: Any) -> Markup | None:
    """A plot with its title and caption, or nothing."""
    if not plot:
        return None
    return tag("figure", tag("b", title), Markup(plot), tag("figcaption", caption))


def size_and_quality(run: Run) -> Markup | None:
    """The trade, and the gap between training and held-out data."""
    measure = measure_of(run)
    better = "lower" if measure == "perplexity" else "higher"
    legend = joined(tag("span", klass="dot hollow"), "train ", tag("span", klass="dot"), "held-out")
    made = joined(
        figure(
            "Size against quality",
            plots.size_against_quality(run),
            f"Held-out {measure} ({better} is better), stages joined in order. Bars: spread over "
            "slices of the change from the first stage.",
        ),
        figure("Train against held-out", plots.train_against_heldout(run), legend),
    )
    return tag("div", made, klass="plots") if made else None


def layer_figures(run: Run) -> Markup | None:
    """Error and zeros of each parameter, stage by stage."""
    stages = [stage for stage in run["stages"] if plots.measured_rows(stage)]
    made = []
    for stage, panel in zip(stages, plots.layer_panels(stages), strict=True):
        rows = plots.measured_rows(stage)
        worst = min(rows, key=lambda r: r["sqnr_db"])
        middle = float(np.median([r["sqnr_db"] for r in rows]))
        caption = (
            f"{len(rows)} parameters, median {number(middle, 3)} dB; lowest "
            f"{number(worst['sqnr_db'], 3)} dB: {worst['path']}"
        )
        made.append(figure(stage["name"], panel, caption))
    if not made:
        return None
    text = (
        "Signal to error of each parameter against the stage before, 10 log10(Σw² / Σ(w − w′)²): "
        "higher is closer. Every row is in layers.csv."
    )
    return joined(
        tag("p", text, klass="small muted"),
        tag("div", *made, klass="plots"),
    )


def decision_figures(run: Run) -> Markup | None:
    """Heat maps of the stages that prune: zeros by layer, scores beside what stayed."""
    made = []
    for stage in run["stages"]:
        name, title = f"maps{stage['index']}", stage["name"]
        decisions = [Decision.read(row) for row in stage.get("decisions") or []]
        if not decisions:
            continue
        shares = {r["path"]: r["sparsity"] for r in stage.get("layers") or [] if r.get("sparsity")}
        zeros = heat_maps.sparsity_map(f"{name}z", shares)
        made.append(figure(title, zeros, "Zeros by layer and matrix, %."))
        for what, plot in heat_maps.maps_of(name, decisions).items():
            made.append(figure(title, plot, what))
    if not made:
        return None
    text = (
        "Of a matrix: scores (means over blocks, stronger is higher) beside the share that stays, "
        "for the middle one of each kind. Of what is cut whole: blue stays, orange goes; the "
        "stronger the colour, the higher the score, from the lowest to the highest of each row."
    )
    return joined(tag("p", text, klass="small muted"), tag("div", *made, klass="plots"))


def loss_figures(run: Run) -> Markup | None:
    """Loss curves of the stages that train."""
    made = []
    for stage in run["stages"]:
        losses = [row for row in stage.get("losses") or [] if row["loss"] is not None]
        if len(losses) < 2:
            continue
        ends = f"{number(losses[0]['loss'])} → {number(losses[-1]['loss'])}"
        caption = f"{losses[-1]['step']:,} steps, loss {ends}"
        plot = plots.loss_curve(f"loss{stage['index']}", losses)
        made.append(figure(stage["name"], plot, caption))
    return tag("div", *made, klass="plots") if made else None


# -------------------------------------------------------------------------------------- details


def check_list(run: Run) -> Markup | None:
    """Each check and what was found."""
    items = [
        tag(
            "li",
            tag("b", "✓" if c["passed"] else "✗", klass="good" if c["passed"] else "bad"),
            tag("b", c["name"]),
            f": {c['text']}",
        )
        for c in run["checks"]
    ]
    return tag("ul", *items) if items else None


def model_and_data(run: Run) -> Markup:
    """What it was made from, with digests."""
    model = run["model"]
    table = {
        "Model": model["name"],
        "Source": model["source"] or NONE,
        "SHA-256": tag("code", model["sha256"] or NONE),
        "Parameters": f"{model['parameters']:,}",
    }
    known = ("name", "role", "sha256", "tokens", "images")
    rows = []
    for data in run["data"]:
        amounts = [f"{data[key]:,} {key}" for key in ("tokens", "images") if data.get(key)]
        more = [f"{k}: {_text(v)}" for k, v in data.items() if k not in known]
        rows.append(
            tag(
                "tr",
                tag("td", data["name"], tag("small", ", ".join(more)) if more else None),
                tag("td", data["role"], klass="text"),
                tag("td", ", ".join(amounts) or NONE),
                tag("td", tag("code", data["sha256"]), klass="text wrap"),
            )
        )
    titles = [("Data", "text"), ("Role", "text"), ("Amount", None), ("SHA-256", "text")]
    head = tag("tr", *(tag("th", title, klass=klass, scope="col") for title, klass in titles))
    listed = tag("table", tag("thead", head), tag("tbody", *rows)) if rows else None
    return joined(definitions(table), tag("div", listed, klass="scroll") if listed else None)


def run_details(run: Run) -> Markup:
    """How to repeat it."""
    table = {
        "Command": tag("code", run["command"]),
        "Started": run["started"],
        "Took": duration(run["seconds"]),
        "Seed": NONE if run["seed"] is None else run["seed"],
        "Versions": ", ".join(f"{k} {_text(v)}" for k, v in run["versions"].items()),
        "Hardware": ", ".join(f"{k}: {_text(v)}" for k, v in run["hardware"].items()),
    }
    config = tag("pre", json.dumps(run["config"], indent=2, ensure_ascii=False))
    return joined(definitions(table), tag("p", "Config", klass="muted"), config)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
