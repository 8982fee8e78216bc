"""What stages are made of: the run that they belong to, its methods and its trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcompress.core.decisions import listening
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.core.model import Model
from jaxcompress.layerwise.journal import Journal
from jaxcompress.methods import compress, method_named
from jaxcompress.models import ConvNetConfig
from jaxcompress.recipe.config import Recipe
from jaxcompress.recipe.heard import Heard
from jaxcompress.recipe.inputs import Inputs, on_one_device
from jaxcompress.training.batch_norm import recalibrate, training_apply
from jaxcompress.training.mesh import param_shardings, spread
from jaxcompress.training.objective import Objective, classification, next_token
from jaxcompress.training.settings import Training, train
from jaxcompress.training.transform import Transform

BatchNorm = Literal["running", "batch"]

CALIBRATION_SAMPLES = 32
STATISTICS_IMAGES = 1024  # from which running statistics of batch norms are measured


@dataclass(frozen=True)
class Context:
    """The run that a stage belongs to.

    Attributes:
      recipe: its config.
      inputs: its data.
      mesh: its devices.
      start: the model that it began with.
      folder: of this stage, for what it keeps while it is unfinished.
      root: the working directory.
      seed: of this stage.
    """

    recipe: Recipe
    inputs: Inputs
    mesh: Mesh
    start: Model
    folder: Path
    root: Path
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a stage gives: the model, None where it is the one before, and what to tell of it.

    Attributes:
      model: the new model.
      checks: `{"name", "passed", "text"}` of what was verified.
      measured: the model to measure instead, such as an export read again.
      bytes_disk: of what was written.
      told: figures by parameter path, such as `seconds`; see `layerwise.figures`.
      decisions: scores and what stayed of them, for heat maps.
    """

    model: Model | None = None
    checks: tuple[dict[str, Any], ...] = ()
    measured: Model | None = None
    bytes_disk: int | None = None
    told: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    decisions: Sequence[dict[str, Any]] = ()


def on_mesh(model: Model, mesh: Mesh) -> Model:
    """The model with its parameters where the mesh wants them."""
    return model.replace(params=spread(model.params, param_shardings(model, mesh)))


def calibration_for(method: Method, inputs: Inputs, samples: int | None) -> Any:
    """The data that a stage of this method is given: windows, (images, labels), or None.

    Data that only some of its options need are drawn as far as there are any.

    Args:
      method: of the stage.
      inputs: the data of the run.
      samples: how many; None: nobody said.

    Raises:
      InputError: so many are not there, or the method needs data and there are none.
    """
    if method.needs == "nothing":
        return None
    count = CALIBRATION_SAMPLES if samples is None else samples
    if method.needs != "calibration" and samples is None:
        if not {"train", "calibration"} & set(inputs.roles):
            return None
        count = min(count, len(inputs.dataset("calibration")))
    return inputs.calibration(count)


def compressed(model: Model, context: Context, method: str, options: dict[str, Any]) -> Outcome:
    """A method by its name, on the devices of each process: all processes compute the same."""
    samples = options.pop("calibration_samples", None)
    chosen = method_named(method)
    data = calibration_for(chosen, context.inputs, samples)
    if data is not None:
        options["calibration"] = data
    devices = jax.local_devices()
    count = len(devices)
    params = on_one_device(model.params)
    if chosen.walks and count > 1 and len(jax.tree.leaves(data)[0]) % count == 0:
        options["mesh"] = Mesh(np.asarray(devices), ("data",))
        everywhere = NamedSharding(options["mesh"], PartitionSpec())
        params = jax.tree.map(
            lambda leaf: jax.device_put(leaf, everywhere) if isinstance(leaf, jax.Array) else leaf,
            params,
        )
    local = model.replace(params=params)
    journal = Journal(context.folder / "partial")
    heard = Heard(context.folder / "decisions", local.params)
    with listening(heard, heard.wanted):
        small = compress(local, method, seed=context.seed, journal=journal, **options)
    made = on_mesh(small, context.mesh)
    return Outcome(made, told=journal.told, decisions=heard.records)


def finetuned(
    model: Model,
    context: Context,
    settings: Training,
    name: str,
    *,
    batch_norm: BatchNorm = "running",
    transform: Transform | None = None,
) -> Model:
    """The model trained on the data of the run: next tokens, or the labels of images.

    Args:
      model: on the mesh.
      context: the run.
      settings: of the training.
      name: in the progress shown.
      batch_norm: see `stages.finetune`.
      transform: what else is done to the training.
    """
    objective = objective_of(model, context, batch_norm)
    trained = trained_on(objective, model, context, settings, name, transform)
    return trained if batch_norm == "running" else with_statistics(trained, context)


def objective_of(model: Model, context: Context, batch_norm: BatchNorm = "running") -> Objective:
    """The loss of a model on the data of the run; see `finetuned`."""
    if batch_norm == "running":
        return next_token(model) if context.inputs.is_text else classification(model)
    if not isinstance(model.config, ConvNetConfig):
        raise InputError("batch_norm batch: the model has no batch norm; leave it out")
    return classification(model.replace(apply=training_apply(model)))


def trained_on(
    objective: Objective,
    model: Model,
    context: Context,
    settings: Training,
    name: str,
    transform: Transform | None = None,
) -> Model:
    """The model trained by an objective, on the batches and the mesh of the run."""
    return train(
        model,
        objective,
        context.inputs.batches(settings.batch_size, context.seed),
        settings,
        workdir=context.folder,
        mesh=context.mesh,
        parallel=context.recipe.mesh.parallel,
        seed=context.seed,
        name=name,
        transform=transform,
    )


def with_statistics(model: Model, context: Context) -> Model:
    """A convolutional network that trained by the statistics of its batches, with its own."""
    count = min(STATISTICS_IMAGES, len(context.inputs.dataset("train")))
    images = context.inputs.drawn("train", count)
    batches = [{"images": part} for part in np.array_split(images, -(-count // 128))]
    local = model.replace(params=on_one_device(model.params))
    return on_mesh(recalibrate(local, batches), context.mesh)
