"""What a recipe keeps: the result of every stage, so that a killed run goes on behind it.

WORKDIR/config.json             the config that made the rest
WORKDIR/stages/00-NAME/         stage.json once the stage is done; params/, checkpoints/, ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcompress.checkpoints.tensors import file_errors, write_json
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import build_model, family_of
from jaxcompress.recipe.config import Recipe, differences
from jaxcompress.training.checkpoints import load_params, save_params

DONE = "stage.json"
STAGES = "stages"
# What a run writes into its directory besides exports.
OWN_NAMES = ("config.json", STAGES, "report.json", "report.html", "layers.csv")
# What only an unfinished stage needs: checkpoints of its training, results of single matrices and
# what was decided of them.
_UNFINISHED = ("checkpoints", "partial", "decisions")
_SWITCHES = ("scan_layers", "remat", "remat_policy", "dtype", "param_dtype")


class Store:
    """The working directory of a recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(self, recipe: Recipe, about: Mapping[str, Any]) -> str:
        """Take the directory for this config, or go on in it; returns when that was first done.

        Args:
          recipe: the config.
          about: what else must be the same for the kept stages to hold, such as hashes of the
            model and the data.

        Raises:
          InputError: the directory holds stages of another config (says what changed), or
            something else; it cannot be written, or not all processes see it.
        """
        path = self.root / "config.json"
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        now = {"config": recipe.plain(), "about": dict(about), "started": started}
        with file_errors("use", self.root):
            before = self._begun(path)
            # No process may see what the first one writes while it still looks at what was there.
            wait_for_all(f"begin {self.root}")
            if before is None and jax.process_index() == 0:
                write_json(path, now)
            wait_for_all(f"begun {self.root}")
        if not path.is_file():
            raise InputError(
                f"{self.root}: is not there on every machine of the run; give a directory that all "
                "of them share"
            )
        if before is None:
            return started
        changed = differences(before["config"], now["config"])
        changed += differences(before["about"], now["about"], "input")
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise InputError(
                f"{self.root}: holds a run of another config: {'; '.join(changed[:3])}{more}; "
                "give another --workdir, or remove this one"
            )
        return str(before["started"])

    def _begun(self, path: Path) -> dict[str, Any] | None:
        """The `config.json` of a run that began here before; None in a fresh directory."""
        if path.is_file():
            with contextlib.suppress(ValueError):  # a file of that name may be anything
                found = json.loads(path.read_text())
                if isinstance(found, dict) and {"config", "about", "started"} <= found.keys():
                    return found
        partial = path.with_name(path.name + ".partial")  # of a run killed as it began
        if self.root.exists() and any(other != partial for other in self.root.iterdir()):
            raise InputError(f"{self.root}: is not empty, and no run of a recipe; give another one")
        return None

    def stage(self, name: str) -> Path:
        """Directory of a stage."""
        return self.root / STAGES / name

    def record(self, name: str) -> dict[str, Any] | None:
        """The record of a stage that is done, else None."""
        path = self.stage(name) / DONE
        return json.loads(path.read_text()) if path.is_file() else None

    def clean(self, name: str) -> None:
        """Remove what a stage that is done needs no more; a kill may have come before."""
        if jax.process_index() == 0:
            for leftover in _UNFINISHED:
                shutil.rmtree(self.stage(name) / leftover, ignore_errors=True)

    def finish(self, name: str, record: Mapping[str, Any], model: Model | None) -> None:
        """Keep a stage: its model where it made one, and at last the record: it is done."""
        folder = self.stage(name)
        if model is not None:
            save_params(folder / "params", model.params)
        if jax.process_index() == 0:
            if model is not None:
                write_json(folder / "model.json", _form_of(model))
            write_json(folder / DONE, record)
        self.clean(name)

    def load(self, name: str, start: Model, shardings: Callable[[Model], Any]) -> Model:
        """The model that a stage made.

        Args:
          name: of the stage.
          start: the model that the recipe began with.
          shardings: gives where the parameters of a model (of shapes) are to lie.
        """
        folder = self.stage(name)
        form = json.loads((folder / "model.json").read_text())
        shell = _shell(start, form)
        params = load_params(
            folder / "params", lambda params: shardings(shell.replace(params=params))
        )
        return shell.replace(params=_as_in(start.params, params))


def wait_for_all(what: str) -> None:
    """Return once every process of the run has come to this point."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def _form_of(model: Model) -> dict[str, Any]:
    """What besides the parameters makes the model."""
    form: dict[str, Any] = {"notes": list(model.notes), "source": model.source}
    if model.config is not None:
        form["config"] = model.config.to_hf()
        form["switches"] = {name: getattr(model.config, name) for name in _SWITCHES}
    else:
        # `take_layers` on a model without config leaves it to its blocks.
        form["walk"] = model.blocks is not None and model.apply == model.blocks.run
    return form


def _shell(start: Model, form: Mapping[str, Any]) -> Model:
    """The model of a form, its parameters still those of `start`."""
    if "config" not in form:
        apply = start.blocks.run if form["walk"] and start.blocks is not None else start.apply
        return start.replace(apply=apply, notes=tuple(form["notes"]))
    config = family_of(form["config"]).config.from_hf(form["config"])
    config = dataclasses.replace(config, **form["switches"])
    made = build_model(config, start.params)
    return made.replace(
        tokenizer=start.tokenizer, source=form["source"], notes=tuple(form["notes"])
    )


def _as_in(like: Any, params: Any) -> Any:
    """Restored parameters (dicts and lists) in the containers of the original ones."""
    from jaxcompress.core.arrays.base import is_compressed
    from jaxcompress.core.paths import leaves_with_paths

    found = dict(leaves_with_paths(params))
    paths = [path for path, _ in leaves_with_paths(like)]
    if set(found) != set(paths):
        return params
    tree = jax.tree.structure(like, is_leaf=is_compressed)
    return jax.tree.unflatten(tree, [found[path] for path in paths])
