"""Many methods at many strengths over one model: a row for each run, kept as soon as it is there.

DIR/sweep.jsonl     what was swept, then a row for each run; a killed sweep goes on behind the last
DIR/NAME.svg        sparsity against quality of a method; NAME-map.svg what went, and by which score
DIR/overview.svg    all of them
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.checkpoints.tensors import file_errors
from jaxcompress.core.decisions import Decision, listening
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.data.text import calibration_batch, token_ids
from jaxcompress.evaluation.footprint import bytes_of, footprint, nonzero_of
from jaxcompress.evaluation.measure import Data, measure
from jaxcompress.evaluation.report import plain
from jaxcompress.evaluation.sweep_plots import draw
from jaxcompress.methods import METHODS, compress
from jaxcompress.models import linear_paths, load
from jaxcompress.recipe.inputs import params_digest
from jaxcompress.recipe.sweep_plan import Options, Swept, family_of, mapped_of

ROWS = "sweep.jsonl"
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is swept, and on what.

    Attributes:
      model: dense.
      heldout: token ids `[tokens]`, or (images, labels), that no method sees.
      calibration: token ids `[samples, ctx]`, or (images, labels), that the methods are given.
      ctx: tokens in a window.
      seed: of the methods' draws.
      about: what else tells one sweep from another, such as names of files.
    """

    model: Model
    heldout: Data
    calibration: Any
    ctx: int = 256
    seed: int = 0
    about: Mapping[str, Any] | None = None

    @property
    def train(self) -> Data:
        """The calibration data as quality is measured on them."""
        given = self.calibration
        return given if isinstance(given, tuple) else np.asarray(given).reshape(-1)

    @property
    def header(self) -> Row:
        """The first row: rows of another one do not belong to this sweep."""
        digests = {
            "model": params_digest(self.model.params),
            "heldout": _digest(self.heldout),
            "calibration": _digest(self.calibration),
        }
        sizes = {"parameters": footprint(self.model.params)["parameters"], "ctx": self.ctx}
        return {"format": 1, **digests, **sizes, "seed": self.seed, **(self.about or {})}


def sweep(
    task: Task,
    out: str | os.PathLike[str],
    methods: Sequence[str],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    patterns: Sequence[str] = ("unstructured", "2:4"),
) -> list[Row]:
    """Run every method at every strength, and draw what came out.

    Args:
      task: the model and the data.
      out: directory; the same one goes on.
      methods: names, with options of their own where wanted: `wanda`, `magnitude:scope=global`.
      sparsities: shares that are to go. Of low rank 1 - ratio, of `shrink` 1 - budget, of
        `threshold` that of normally distributed weights, of `depth` and `share` of the layers;
        methods of `bits` are run at 8 to 2 bits.
      patterns: of the methods that take one; n:m and blocks besides the sparsities.

    Returns:
      The rows: `method`, `options`, and `quality`, `size`, `removed` (a share of what `of` says),
      `seconds`, `notes`, or `refused` with the reason; the first is of the dense model. One row of
      each method has `decisions` and `layers` (sparsity by path).

    Raises:
      InputError: an unknown method or option, or a directory of another sweep.
    """
    swept = [Swept.read(text) for text in methods]
    rows = _Rows(Path(out), task.header)
    if not rows.found("dense", {}):
        rows.add({"method": "dense", "options": {}, **_measured(task, task.model)})
    for one in swept:
        runs = one.runs(task.model, sparsities, patterns)
        mapped = mapped_of(runs)
        for options in runs:
            if not rows.found(one.label, options):
                rows.add(_row(task, one, options, options is mapped))
        rows.draw(one.label)
    rows.draw()
    return rows.rows


def sweep_text(
    model: str,
    out: str,
    *,
    methods: str,
    sparsity: str,
    patterns: str,
    text: str,
    calibration: str,
    calibration_samples: int,
    ctx: int,
    tokens: int,
    seed: int,
) -> list[str]:
    """`sweep` of a language model, as the command line says it; tells what was refused.

    Raises:
      InputError: see `sweep`; also a sparsity out of range, or too short a text.
    """
    names = list(METHODS) if methods == "all" else _listed(methods)
    try:
        sparsities = [float(s) for s in _listed(sparsity)]
    except ValueError:
        raise InputError(f"sparsity {sparsity!r}: numbers, such as 0.3,0.5,0.7") from None
    if not all(0 < s < 1 for s in sparsities):
        raise InputError(f"sparsity {sparsity!r}: must lie between 0 and 1")
    loaded = load(model)
    task = Task(
        loaded,
        token_ids(text, loaded.tokenizer)[:tokens],
        calibration_batch(
            calibration, loaded.tokenizer, samples=calibration_samples, ctx=ctx, seed=seed
        ),
        ctx=ctx,
        seed=seed,
        about={"name": Path(model).name, "text": Path(text).name, "from": Path(calibration).name},
    )
    rows = sweep(task, out, names, sparsities=sparsities, patterns=_listed(patterns))
    refused = {row["method"]: row["refused"] for row in rows if "refused" in row}
    told = [f"{label}: {why}" for label, why in refused.items()]
    return [*told, f"{len(rows) - 1} runs: {Path(out) / 'overview.svg'}"]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class _Rows:
    """The file of a sweep."""

    def __init__(self, out: Path, header: Row) -> None:
        with file_errors("make", out):
            out.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = out / ROWS, []
        header = plain(header)
        with file_errors("read", self.path):
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole, _, torn = text.rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0] != header:
            raise InputError(f"{self.path}: of another model, data or seed; give another --out")
        self.rows = lines[1:]
        with file_errors("write", self.path):
            if torn:  # killed while it wrote
                self.path.write_text(whole + "\n" if whole else "", encoding="utf-8")
            if not lines:
                self._append(header)

    def found(self, label: str, options: Options) -> bool:
        """Whether this run was done before."""
        key = label, plain(options)
        return any((row["method"], row["options"]) == key for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(plain(row))
        with file_errors("write", self.path):
            self._append(self.rows[-1])
        print(_told(row), file=sys.stderr, flush=True)

    def _append(self, row: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def draw(self, label: str | None = None) -> None:
        """The figures of a method, or of all of them together."""
        for name, text in draw(self.rows, label).items():
            with file_errors("write", self.path.parent / name):
                (self.path.parent / name).write_text(text, encoding="utf-8")


def _row(task: Task, one: Swept, options: Options, mapped: bool) -> Row:
    """One run."""
    row: Row = {"method": one.label, "options": options, "family": family_of(one)}
    heard: list[Decision] = []
    matrix = middle_matrix(task.model) if mapped else None
    needs = one.method.needs != "nothing" or options.get("allocation") == "measured"
    started = time.perf_counter()
    try:
        with listening(heard.append if mapped else _ignore, lambda p: p.split("[")[0] == matrix):
            small = compress(
                task.model,
                one.name,
                calibration=task.calibration if needs else None,
                seed=task.seed,
                **options,
            )
    except InputError as error:
        return row | {"refused": str(error)}
    row["seconds"] = round(time.perf_counter() - started, 3)
    row |= _measured(task, small) | _removed(one.method, task.model, small)
    row["notes"] = [note for note in small.notes if note not in task.model.notes]
    if mapped:
        row["decisions"] = [decision.record() for decision in heard]
        row["layers"] = _sparsities(task.model, small)
    return row


def _ignore(decision: Decision) -> None:
    pass


def _measured(task: Task, model: Model) -> Row:
    return measure(model, heldout=task.heldout, train=task.train, ctx=task.ctx)


def middle_matrix(model: Model) -> str | None:
    """The matrix of the middle block that has the most columns, and of those the fewest rows."""
    leaves = dict(leaves_with_paths(model.params))
    paths = linear_paths(model) or tuple(path for path in leaves if path.endswith("kernel"))
    blocks: dict[str, list[str]] = {}
    for path in paths:
        number = next((part for part in path.split("/") if part.isdigit()), "")
        blocks.setdefault(number, []).append(path)
    if not blocks:
        return None
    middle = list(blocks.values())[len(blocks) // 2]

    return max(middle, key=lambda path: (leaves[path].shape[-2], -leaves[path].shape[-1]))


def _removed(method: Method, before: Model, after: Model) -> Row:
    """How much went, as a share, and of what."""
    if method.produces == "model":
        was, now = (footprint(model.params)["parameters"] for model in (before, after))
        return {"removed": 1 - now / was, "of": "the model's parameters"}
    pairs = _changed(before, after)
    if method.produces == "sparse":
        kept = sum(nonzero_of(new) for _, new in pairs.values())
        share = 1 - kept / max(sum(int(new.size) for _, new in pairs.values()), 1)
        return {"removed": share, "of": "the weights of the matrices"}
    was, now = (sum(bytes_of(pair[i]) for pair in pairs.values()) for i in (0, 1))
    return {"removed": 1 - now / max(was, 1), "of": "the bytes of the matrices"}


def _changed(before: Model, after: Model) -> dict[str, tuple[Any, Any]]:
    old = dict(leaves_with_paths(before.params))
    pairs = {path: (old.get(path), new) for path, new in leaves_with_paths(after.params)}
    return {path: (a, b) for path, (a, b) in pairs.items() if a is not b and a is not None}


def _sparsities(before: Model, after: Model) -> dict[str, float]:
    return {
        path: 1 - nonzero_of(new) / max(int(new.size), 1)
        for path, (old, new) in _changed(before, after).items()
        if old.shape == new.shape
    }


def _digest(data: Any) -> str:
    found = hashlib.sha256()
    for array in data if isinstance(data, tuple) else (data,):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _told(row: Row) -> str:
    options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
    said = f"{row['method']}({options})"
    if "refused" in row:
        return f"{said}: refused: {row['refused']}"
    heldout = row["quality"]["heldout"]
    name = "perplexity" if "perplexity" in heldout else "accuracy"
    share = f"{row['removed']:.1%} gone, " if "removed" in row else ""
    return f"{said}: {share}{name} {heldout[name]:.4f}, {row.get('seconds', 0):.1f} s"
