"""Many methods at many strengths over one model: a row for each run, kept as soon as it is there.

DIR/sweep.jsonl     what was swept, then a row for each run; a killed sweep goes on behind the last
DIR/NAME.svg        sparsity against quality of a method; NAME-map.svg what went, and by which score
DIR/overview.svg    all of them
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.checkpoints.tensors import file_errors
from jaxcompress.core.decisions import Decision, listening
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method, Option
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.selection import nearest
from jaxcompress.data.text import calibration_batch, token_ids
from jaxcompress.evaluation.footprint import bytes_of, footprint, nonzero_of
from jaxcompress.evaluation.measure import Data, measure
from jaxcompress.evaluation.report import plain
from jaxcompress.evaluation.sweep_plots import draw
from jaxcompress.layerwise.observe import activation_names
from jaxcompress.methods import METHODS, compress, method_named
from jaxcompress.models import linear_paths, load
from jaxcompress.pruning.patterns import removed_count
from jaxcompress.pruning.scores import SCORES
from jaxcompress.recipe.inputs import params_digest

ROWS = "sweep.jsonl"
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
BITS = (8, 6, 5, 4, 3, 2)  # of methods that take bits and no sparsity
MAPPED = 0.5  # the share removed at which maps are drawn

Options = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Swept:
    """A method with fixed options, such as `wanda:allocation=owl`."""

    label: str
    name: str
    fixed: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The method."""
        return method_named(self.name)

    @classmethod
    def read(cls, text: str) -> Swept:
        """Of `NAME` or `NAME:option=value:...`; `InputError` where there is no such thing."""
        name, *given = text.strip().split(":")
        options = method_named(name).options
        fixed = {}
        for part in given:
            key, _, value = part.partition("=")
            key = key.replace("-", "_")
            if key not in options:
                raise InputError(f"{text}: {name} has no option {key!r}; {nearest(key, options)}")
            fixed[key] = _value(text, options[key], value)
        method_named(name).accepted(fixed)
        return cls(text.strip(), name, fixed)

    def runs(
        self, model: Model, sparsities: Sequence[float], patterns: Sequence[str]
    ) -> list[Options]:
        """The options of each run: every strength, and every n:m or block pattern."""
        known = self.method.options
        strengths = _strengths(known, model, sparsities)
        if any(own.keys() & self.fixed.keys() for own in strengths):
            strengths = [{}]
        asked = [dict(self.fixed) | own for own in strengths]
        if "pattern" not in known or "pattern" in self.fixed:
            return asked
        others = [pattern for pattern in patterns if pattern != "unstructured"]
        return asked + [dict(self.fixed) | {"pattern": pattern} for pattern in others]


def _value(text: str, option: Option, value: str) -> Any:
    try:
        if option.type is bool:
            return {"true": True, "false": False}[value.lower()]
        return option.type(value)
    except (KeyError, ValueError):
        raise InputError(
            f"{text}: {option.name} {value!r}: must be of type {option.type.__name__}"
        ) from None


def _strengths(
    known: Mapping[str, Option], model: Model, sparsities: Sequence[float]
) -> list[Options]:
    """The option by which a method is told how much goes, at each sparsity."""
    if "drop" in known or "layers" in known:
        count = 0 if model.blocks is None else len(model.blocks.of(model.params))
        drops = sorted({removed_count(count, s) for s in sparsities} - {0})
        return [{"drop": n} if "drop" in known else {"layers": count - n} for n in drops]
    if "sparsity" in known:
        return [{"sparsity": s} for s in sparsities]
    for name in ("ratio", "budget"):
        if name in known:
            return [{name: round(1 - s, 9)} for s in sparsities]
    if "deviations" in known:  # of weights that are normally distributed, the share goes
        inverse = statistics.NormalDist().inv_cdf
        return [{"deviations": round(inverse((1 + s) / 2), 6)} for s in sparsities]
    return [{"bits": bits} for bits in BITS]


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
        mapped = _mapped(runs)
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
    row: Row = {"method": one.label, "options": options, "family": _family(one)}
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


def _family(one: Swept) -> str:
    """Which panel of the overview a method is in."""
    if one.method.produces == "model":
        return "a smaller network"
    if one.method.produces != "sparse":
        return "factors, integers, shared values"
    if not one.method.statistics:
        return "scores of the weights"
    if one.name not in SCORES:
        return "the weights that stay are fitted"
    activations = activation_names(one.method.statistics)
    return "scores of the inputs" if activations else "scores of gradients"


def _ignore(decision: Decision) -> None:
    pass


def _measured(task: Task, model: Model) -> Row:
    return measure(model, heldout=task.heldout, train=task.train, ctx=task.ctx)


def _mapped(runs: Iterable[Options]) -> Options | None:
    """The run whose maps are drawn: the one nearest to half, without a pattern."""
    free = [run for run in runs if run.get("pattern", "unstructured") == "unstructured"]

    def away(run: Options) -> float:
        share = run.get("sparsity", run.get("ratio", run.get("budget")))
        if share is None and "deviations" in run:
            share = 2 * statistics.NormalDist().cdf(run["deviations"]) - 1
        return abs((MAPPED if share is None else share) - MAPPED)

    return min(free, key=away, default=None)


def middle_matrix(model: Model) -> str | None:
    """The matrix of the middle block that has the most columns for its rows."""
    leaves = dict(leaves_with_paths(model.params))
    paths = linear_paths(model) or tuple(path for path in leaves if path.endswith("kernel"))
    blocks: dict[str, list[str]] = {}
    for path in paths:
        number = next((part for part in path.split("/") if part.isdigit()), "")
        blocks.setdefault(number, []).append(path)
    if not blocks:
        return None
    middle = list(blocks.values())[len(blocks) // 2]

    def columns(path: str) -> float:
        shape = leaves[path].shape
        return float(shape[-2] / shape[-1])

    return max(middle, key=columns)


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
