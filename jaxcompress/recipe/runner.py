"""A recipe run from where it stands to its end, and its report."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcompress.checkpoints.native import native_bytes
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.evaluation.footprint import footprint
from jaxcompress.evaluation.layers import layer_errors
from jaxcompress.evaluation.measure import measure
from jaxcompress.evaluation.report import write_report
from jaxcompress.recipe.checks import Scene, check_parallel, check_stages, shapes_of
from jaxcompress.recipe.config import Recipe, read_config
from jaxcompress.recipe.inputs import (
    Inputs,
    checkpoint_digest,
    deployed,
    load_model,
    naming,
    params_digest,
    stored_dtype,
)
from jaxcompress.recipe.stages import Context, Stage, on_mesh, read_stages
from jaxcompress.recipe.store import Store
from jaxcompress.training.mesh import make_mesh, param_shardings
from jaxcompress.training.metrics import read_metrics

START = "00-start"


def run(
    config: Any, workdir: str | os.PathLike[str], *, model: Model | None = None
) -> dict[str, Any]:
    """Run a recipe; called again after a kill it goes on at the stage, matrix or step it reached.

    Args:
      config: an `ml_collections.ConfigDict` or nested dicts, see `recipe.config`.
      workdir: holds everything: kept stages, `report.json`, `report.html`, `layers.csv`, exports.
      model: begin with this model instead of `config.model`.

    Returns:
      The report, as `report.json` holds it.

    Raises:
      InputError: a wrong field, before any work; or a `workdir` of another config.
      Preempted: a signal asked to stop; a checkpoint was written.
    """
    recipe = read_config(config)
    prepared = prepare(recipe, model)
    store = Store(Path(workdir))
    started = store.begin(recipe, prepared.about())
    return _Running(prepared, store, started).run()


def prepare(recipe: Recipe, model: Model | None = None) -> Prepared:
    """Everything that can be wrong is looked at here, before any work.

    Raises:
      InputError: a stage, an option, the mesh, the model or the data are wrong.
    """
    stages = read_stages(recipe)
    fields = recipe.mesh
    with naming("config.mesh"):
        mesh = make_mesh(fields.data, fields.fsdp, fields.tensor)
    check_parallel(fields, mesh)
    start = load_model(recipe) if model is None else model
    inputs = Inputs(recipe.data, start, recipe.seed)
    shapes = start.replace(params=shapes_of(start.params))
    check_stages(stages, Scene(recipe, mesh, shapes, inputs))
    return Prepared(recipe, stages, mesh, start, inputs, given=model is not None)


class Prepared:
    """A recipe with its model and data at hand, checked."""

    def __init__(
        self,
        recipe: Recipe,
        stages: list[Stage],
        mesh: jax.sharding.Mesh,
        start: Model,
        inputs: Inputs,
        given: bool,
    ) -> None:
        self.recipe, self.stages, self.mesh = recipe, stages, mesh
        self.start, self.inputs, self.given = start, inputs, given

    @functools.cached_property
    def sha256(self) -> str | None:
        """Of the model that it begins with; a fresh one follows from the config."""
        if self.given:
            return params_digest(self.start.params)
        path = self.recipe.model.path
        return None if path is None else checkpoint_digest(path, self.recipe.model.revision)

    def about(self) -> dict[str, Any]:
        """What must be the same for kept stages to hold: hashes of models and data."""
        teachers = [stage.options.get("teacher") for stage in self.stages]
        return {
            "model": self.sha256,
            "teachers": {name: checkpoint_digest(name) for name in teachers if name is not None},
            "data": self.inputs.digests(),
        }

    @property
    def dense(self) -> Model | None:
        """The model that quality is compared with; a fresh one is no measure of anything."""
        return None if self.recipe.model.architecture and not self.given else self.start


class _Running:
    """One run of a recipe."""

    def __init__(self, prepared: Prepared, store: Store, started: str) -> None:
        self.prepared, self.store, self.started = prepared, store, started
        self.recipe, self.inputs, self.mesh = prepared.recipe, prepared.inputs, prepared.mesh
        # Not kept where it was loaded: that device has no room for it besides.
        prepared.start = self.start = on_mesh(prepared.start, self.mesh)
        self.dtype = stored_dtype(prepared.start)
        self.records: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """All stages that are not done yet."""
        self._begin()
        found = self._finished()
        if found is None:
            found = self._rest()
        self._say(f"report: {self.store.root / 'report.html'}")
        return found

    def _rest(self) -> dict[str, Any]:
        """The stages that are not done yet, and the report."""
        model = self.start
        made_by: str | None = None  # the last stage that made a model, not loaded yet
        found = None
        for stage in self.prepared.stages:
            record = self.store.record(stage.name)
            if record is not None:
                self._say(f"{stage.name}: done before")
                self.store.clean(stage.name)
                self.records.append(record)
                made_by = stage.name if record["model"] else made_by
                continue
            if made_by is not None:
                model = self.store.load(
                    made_by, self.start, lambda shell: param_shardings(shell, self.mesh)
                )
                made_by = None
            model = self._do(stage, model)
            found = self._report()
        return self._report() if found is None else found

    def _finished(self) -> dict[str, Any] | None:
        """The report of a run to which nothing is left to do."""
        records = [self.store.record(stage.name) for stage in self.prepared.stages]
        text, page = (self.store.root / name for name in ("report.json", "report.html"))
        if None in records or not text.is_file() or not page.is_file():
            return None
        found: dict[str, Any] = json.loads(text.read_text())
        # The page is written last: an older one is that of the stage before.
        if len(found["stages"]) <= len(records) or page.stat().st_mtime < text.stat().st_mtime:
            return None
        self._say(f"{self.store.root}: all {len(records)} stages were done before; nothing to do")
        return found

    def _begin(self) -> None:
        record = self.store.record(START)
        if record is None:
            self._say(f"{START}: measure")
            started = time.perf_counter()
            record = {
                "index": 0,
                "name": START,
                "method": "start",
                "options": {},
                "seconds": 0.0,
                **self._measured(self.start, None),
                "losses": [],
                "layers": [],
                "model": False,
                "checks": [],
            }
            record["seconds"] = time.perf_counter() - started
            self.store.finish(START, record, None)
            self._tell(record)
        else:
            self._say(f"{START}: done before")
        self.records.append(record)

    def _do(self, stage: Stage, model: Model) -> Model:
        """One stage: done, measured, kept and told."""
        self._say(f"{stage.name}: begin")
        started = time.perf_counter()
        context = Context(
            recipe=self.recipe,
            inputs=self.inputs,
            mesh=self.mesh,
            start=self.start,
            folder=self.store.stage(stage.name),
            root=self.store.root,
            seed=self.recipe.seed + stage.index,
        )
        outcome = stage.run(model, context)
        after = model if outcome.model is None else outcome.model
        measured = self._measured(outcome.measured or after, outcome.bytes_disk)
        layers = []
        if outcome.model is not None:
            layers = layer_errors(
                model.params,
                after.params,
                what=_words(stage),
                told=outcome.told,
                stored=jax.eval_shape(lambda: deployed(after, self.dtype).params),
            )
        record = {
            "index": stage.index + 1,
            "name": stage.name,
            "method": stage.method,
            "options": stage.told,
            **measured,
            "losses": read_metrics(context.folder / "metrics.jsonl"),
            "layers": layers,
            "decisions": outcome.decisions,
            "notes": [n for n in after.notes if n not in model.notes],
            "model": outcome.model is not None,
            "checks": [*outcome.checks, *self._won_back(stage, measured)],
            "seconds": time.perf_counter() - started,
        }
        self.store.finish(stage.name, record, outcome.model)
        self.records.append(record)
        self._tell(record)
        return after

    def _measured(self, model: Model, bytes_disk: int | None) -> dict[str, Any]:
        found = measure(
            model,
            heldout=self.inputs.measured("heldout"),
            train=self.inputs.measured("train") if "train" in self.inputs.roles else None,
            against=None if self.prepared.dense is None else self.start,
            ctx=self.recipe.data.ctx,
            slices=self.recipe.data.slices,
            speed=self.recipe.data.speed,
        )
        # Sizes are those of the model as it would be stored, not of its float32 master weights.
        shapes = jax.eval_shape(lambda: deployed(model, self.dtype).params)
        size = found["size"] | _sizes(shapes)
        if bytes_disk is not None:
            size["bytes_disk"] = bytes_disk
        return found | {"size": size}

    def _won_back(self, stage: Stage, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
        if stage.wins_back is None:
            return []
        made = [i for i, record in enumerate(self.records) if record["model"] or not i]
        last = made[-1]
        first = max(i for i in made[:-1] if not i or self.prepared.stages[i - 1].training)
        before, cut = (_loss(self.records[i]["quality"]["heldout"]) for i in (first, last))
        now = _loss(measured["quality"]["heldout"])
        lost, won = cut - before, cut - now
        share = math.inf if lost <= 0 else won / lost
        return [
            {
                "name": f"{stage.name} wins back {stage.wins_back:.0%} of what was lost",
                "passed": share >= stage.wins_back,
                "text": f"loss {before:.4f} before the cut, {cut:.4f} after it, {now:.4f} now: "
                + ("nothing had been lost" if lost <= 0 else f"{share:.0%} won back"),
            }
        ]

    def _report(self) -> dict[str, Any]:
        found = {
            "format": 1,
            "name": self.recipe.name,
            "command": shlex.join(sys.argv),
            "config": self.recipe.plain(),
            "started": self.started,
            "seconds": sum(record["seconds"] for record in self.records),
            "seed": self.recipe.seed,
            "versions": _versions(),
            "hardware": _hardware(self.mesh),
            "model": {
                "name": self.recipe.model.path or "a fresh model",
                "source": self.prepared.start.source,
                "sha256": self.prepared.sha256,
                "parameters": self.records[0]["size"]["parameters"],
            },
            "data": self.inputs.summaries,
            "planned": [START, *(stage.name for stage in self.prepared.stages)],
            "stages": self.records,
            "checks": [check for record in self.records for check in record["checks"]],
        }
        if jax.process_index() == 0:
            write_report(found, self.store.root)
        return found

    def _tell(self, record: Mapping[str, Any]) -> None:
        heldout, size = record["quality"]["heldout"], record["size"]
        name = "perplexity" if "perplexity" in heldout else "accuracy"
        kl = f", KL {heldout['kl']:.4f}" if "kl" in heldout else ""
        self._say(
            f"{record['name']}: {name} {heldout[name]:.4f}{kl}, {size['bytes_memory']:,} bytes, "
            f"{size['bits_per_weight']:.2f} bits per weight, {record['seconds']:.1f} s"
        )
        for check in record["checks"]:
            told = "passed" if check["passed"] else "FAILED"
            self._say(f"  {told}: {check['name']} ({check['text']})")

    def _say(self, line: str) -> None:
        if jax.process_index() == 0:
            print(line, flush=True)


def _words(stage: Stage) -> str:
    """`magnitude 2:4`: the method and what was said of it."""
    if stage.training is not None:
        return stage.method
    told = [str(v) if isinstance(v, str) else f"{k}={v}" for k, v in stage.options.items()]
    return " ".join([stage.method, *told])


def _loss(quality: Mapping[str, Any]) -> float:
    """What a cut raises: log-perplexity, or the share of errors."""
    if "perplexity" in quality:
        return math.log(quality["perplexity"])
    return 1 - quality["accuracy"]


def _sizes(shapes: Any) -> dict[str, Any]:
    found = footprint(shapes)
    size = {"bytes_memory": found["bytes"], "bits_per_weight": found["bits_per_weight"]}
    with contextlib.suppress(InputError):  # a container that has no native form
        size["bytes_disk"] = native_bytes(shapes)
    return size


def _versions() -> dict[str, str]:
    packages = ("jaxcompress", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def _hardware(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "devices": jax.device_count(),
        "kind": device.device_kind,
        "platform": device.platform,
        "processes": jax.process_count(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
