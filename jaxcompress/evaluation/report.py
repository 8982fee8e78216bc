"""The report of a run: `report.json`, `layers.csv` and one self-contained `report.html`.

`write_report` may be called after each stage: the files are complete at any moment, and tell of
what is there so far. With several processes, one of them writes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcompress.checkpoints.tensors import atomic_file, file_errors
from jaxcompress.core.decisions import Decision
from jaxcompress.core.errors import InputError
from jaxcompress.evaluation.report_html import page

FORMAT = 1
KINDS: dict[str, Any] = {
    "a number": (int, float),
    "an integer": int,
    "text": str,
    "true or false": bool,
    "a table": dict,
    "a list": list,
}
NUMBER, COUNT, TEXT, FLAG, TABLE, LIST = KINDS
OR_NULL = " or null"
Fields = Mapping[str, str]

RUN: Fields = {
    "format": COUNT,
    "name": TEXT,
    "command": TEXT,
    "config": TABLE,
    "started": TEXT,
    "seconds": NUMBER,
    "seed": COUNT + OR_NULL,
    "versions": TABLE,
    "hardware": TABLE,
    "model": TABLE,
    "data": LIST,
    "stages": LIST,
    "checks": LIST,
}
RUN_LATER: Fields = {"planned": LIST}
MODEL: Fields = {
    "name": TEXT,
    "source": TEXT + OR_NULL,
    "sha256": TEXT + OR_NULL,
    "parameters": COUNT,
}
DATA: Fields = {"name": TEXT, "role": TEXT, "sha256": TEXT}
STAGE: Fields = {"index": COUNT, "name": TEXT, "method": TEXT}
STAGE_LATER: Fields = {
    "options": TABLE,
    "notes": LIST,
    "seconds": NUMBER,
    "quality": TABLE,
    "size": TABLE,
    "losses": LIST,
    "layers": LIST,
    "decisions": LIST,
}
QUALITY_LATER: Fields = {
    "slices": LIST,
    "spread": NUMBER + OR_NULL,
    "kl": NUMBER + OR_NULL,
    "agreement": NUMBER + OR_NULL,
    "tokens": COUNT,
    "images": COUNT,
    "ctx": COUNT,
}
SIZE: Fields = {"bytes_memory": COUNT, "bits_per_weight": NUMBER, "parameters": COUNT}
SIZE_LATER: Fields = {
    "bytes_disk": COUNT + OR_NULL,
    "nonzero": COUNT,
    "flops": NUMBER,
    "flops_nonzero": NUMBER,
    "per_second": NUMBER,
}
LOSS: Fields = {"step": COUNT, "loss": NUMBER + OR_NULL}
# Of single matrices, see `layerwise.figures`.
FIGURES = ("loss_nearest", "loss", "damp", "saturation", "dead_inputs", "fallback", "bad_scales")
LAYER: Fields = {"path": TEXT, "shape": LIST, "what": TEXT}
LAYER_LATER: Fields = {
    "bits": NUMBER + OR_NULL,
    "sparsity": NUMBER + OR_NULL,
    "sqnr_db": NUMBER + OR_NULL,
    "seconds": NUMBER + OR_NULL,
    "bytes": COUNT + OR_NULL,
    **dict.fromkeys(FIGURES, NUMBER + OR_NULL),
}
DECISION: Fields = {
    "what": TEXT,
    "where": TEXT,
    "by": TEXT,
    "size": LIST,
    "shape": LIST,
    "scores": TEXT,
    "kept": TEXT,
    "low": NUMBER,
    "high": NUMBER,
}
CHECK: Fields = {"name": TEXT, "passed": FLAG, "text": TEXT}
CSV = (
    *("stage", "path", "shape", "what", "bits", "sparsity", "sqnr_db", "bytes", "seconds"),
    *FIGURES,
)


def write_report(run: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
    """Write `report.json`, `layers.csv` and `report.html` into a directory, each atomically.

    Args:
      run: the record of a run; `docs/report.md` lists its fields. Numbers may be NumPy's; one that
        is not finite is written as null.
      directory: made where it is not there.

    Raises:
      InputError: a field is missing or of a wrong type (the message names it), or the directory
        cannot be written.
    """
    run = plain(run)
    check(run)
    out = Path(directory)
    with file_errors("make", out):
        out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.json", json.dumps(run, indent=1, allow_nan=False) + "\n")
    _write(out / "layers.csv", layers_csv(run))
    _write(out / "report.html", page(run))


def render(path: str | os.PathLike[str]) -> str:
    """The text of `report.html`, made anew from a `report.json`.

    Raises:
      InputError: the file cannot be read, or a field is missing.
    """
    try:
        with file_errors("read", Path(path)):
            run = plain(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:  # of the encoding too
        raise InputError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(run, dict):
        raise InputError(f"{path}: not the report of a run")
    check(run)
    return page(run)


def plain(value: Any) -> Any:
    """`value` with nothing in it but what JSON holds, in text that UTF-8 can write."""
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, bool) or value is None:
        return value
    if hasattr(value, "tolist"):  # NumPy's and JAX's, arrays and scalars
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return plain(str(value))


def layers_csv(run: Mapping[str, Any]) -> str:
    """A row for each parameter and stage that changed it."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for stage in run["stages"]:
        for row in stage.get("layers") or []:
            shape = "x".join(map(str, row["shape"]))
            writer.writerow({**row, "stage": stage["name"], "shape": shape})
    return file.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


# ------------------------------------------------------------------------------------ the schema


def check(run: Mapping[str, Any]) -> None:
    """Raise `InputError`, naming the field, unless `run` is the record of a run."""
    _fields(run, "", RUN, RUN_LATER)
    if run["format"] != FORMAT:
        raise InputError(f"report: format {run['format']}, this version reads format {FORMAT}")
    _fields(run["model"], "model", MODEL)
    for where, row in _rows(run, "data"):
        _fields(row, where, DATA)
    for where, row in _rows(run, "checks"):
        _fields(row, where, CHECK)
    for where, stage in _rows(run, "stages"):
        _fields(stage, where, STAGE, STAGE_LATER)
        for role, quality in stage.get("quality", {}).items():
            _quality(quality, f"{where}.quality.{role}")
        if stage.get("size"):
            _fields(stage["size"], f"{where}.size", SIZE, SIZE_LATER)
        for inner, row in _rows(stage, "losses", where):
            _fields(row, inner, LOSS)
        for inner, row in _rows(stage, "layers", where):
            _fields(row, inner, LAYER, LAYER_LATER)
        for inner, row in _rows(stage, "decisions", where):
            _fields(row, inner, DECISION)
            try:
                Decision.read(row)
            except (ValueError, TypeError, IndexError) as error:
                raise InputError(f"report: {inner} holds no maps ({error})") from None


def _quality(quality: Any, where: str) -> None:
    measure = "accuracy" if isinstance(quality, dict) and "accuracy" in quality else "perplexity"
    _fields(quality, where, {measure: NUMBER + OR_NULL}, QUALITY_LATER)
    for i, value in enumerate(quality.get("slices", [])):
        _check(value, NUMBER + OR_NULL, f"{where}.slices[{i}]")


def _rows(table: Mapping[str, Any], name: str, where: str = "") -> list[tuple[str, Any]]:
    prefix = f"{where}." if where else ""
    return [(f"{prefix}{name}[{i}]", row) for i, row in enumerate(table.get(name, []))]


def _fields(table: Any, where: str, needed: Fields, later: Fields | None = None) -> None:
    _check(table, TABLE, where)
    prefix = f"{where}." if where else ""
    for name, kind in needed.items():
        if name not in table:
            raise InputError(f"report: {prefix}{name} is missing")
        _check(table[name], kind, prefix + name)
    for name, kind in (later or {}).items():
        if name in table:
            _check(table[name], kind, prefix + name)


def _check(value: Any, kind: str, where: str) -> None:
    if value is None and kind.endswith(OR_NULL):
        return
    kind = kind.removesuffix(OR_NULL)
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != FLAG):
        raise InputError(f"report: {where or 'the record'} must be {kind}, is {str(value)[:40]!r}")
