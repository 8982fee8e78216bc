"""What may stand in `config.stages`: every method, and `distill`, `finetune`, `evaluate`, `export`.

A stage is a function of a model and the run it belongs to. Its keyword-only parameters are its
options; stages that train take those of `training.settings.Training` besides.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcompress import api
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.core.model import Model
from jaxcompress.core.selection import nearest
from jaxcompress.data.bpe import write_tokenizer
from jaxcompress.distillation import distill as distillation
from jaxcompress.distillation import student_from
from jaxcompress.export import save
from jaxcompress.layerwise.journal import Journal
from jaxcompress.layerwise.walk import Sequential
from jaxcompress.methods import METHODS, compress
from jaxcompress.models import ConvNetConfig, Tokenizer
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.recipe import pytorch
from jaxcompress.recipe.config import Recipe, checked
from jaxcompress.recipe.inputs import Inputs, deployed, on_one_device, stored_dtype
from jaxcompress.recipe.store import wait_for_all
from jaxcompress.training.batch_norm import recalibrate, training_apply
from jaxcompress.training.mesh import param_shardings, spread
from jaxcompress.training.objective import classification, next_token
from jaxcompress.training.settings import Training, train

# Options of every method that sees one matrix at a time, and of every one that needs data.
PER_MATRIX = {
    "include": str | tuple[str, ...] | None,
    "exclude": str | tuple[str, ...] | None,
    "overrides": Mapping[str, Mapping[str, Any]],
}
CALIBRATED = {"calibration_samples": int}
WALK = {"sequential": Sequential, "dense_target": float}
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
      seconds: by parameter path, where each took its own.
    """

    model: Model | None = None
    checks: tuple[dict[str, Any], ...] = ()
    measured: Model | None = None
    bytes_disk: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage whose options were checked.

    Attributes:
      index: place in the recipe.
      method: its name in `STAGES` or `METHODS`.
      options: of the stage's own function.
      training: settings, where it trains.
      wins_back: of a stage that trains: the share of the log-perplexity (or accuracy) lost in the
        stage before that it must win back for the run to pass.
    """

    index: int
    method: str
    options: Mapping[str, Any]
    training: Training | None = None
    wins_back: float | None = None

    @property
    def name(self) -> str:
        """Of its folder and in the report: `02-finetune`."""
        return f"{self.index + 1:02d}-{self.method}"

    @property
    def makes_model(self) -> bool:
        """Whether the model behind it is another one than the model before."""
        return self.method in METHODS or self.training is not None

    @property
    def told(self) -> dict[str, Any]:
        """Its options, for the report: those that are not what they are without saying."""
        if self.training is None:
            return dict(self.options)
        usual = Training(steps=0)
        settings = {
            name: value
            for name, value in dataclasses.asdict(self.training).items()
            if value != getattr(usual, name)
        }
        return {**settings, **self.options}

    def run(self, model: Model, context: Context) -> Outcome:
        """The stage done on a model that lies on the mesh."""
        if self.method in METHODS:
            return _compress(model, context, self.method, dict(self.options))
        function = STAGES[self.method]
        arguments = (model, context) if self.training is None else (model, context, self.training)
        return function(*arguments, **self.options)


def finetune(
    model: Model,
    context: Context,
    settings: Training,
    *,
    batch_norm: Literal["running", "batch"] = "running",
) -> Outcome:
    """Train on the data: next tokens, or the labels of images. Pruned entries stay 0.

    Args:
      batch_norm: of a convolutional network: by its running statistics, which stay, or by those of
        each batch, and running ones are measured afterwards; a fresh network needs the latter.
    """
    if batch_norm == "running":
        objective = next_token(model) if context.inputs.is_text else classification(model)
        return Outcome(_trained(model, context, settings, objective, "finetune"))
    if not isinstance(model.config, ConvNetConfig):
        raise InputError("finetune.batch_norm batch: the model has no batch norm; leave it out")
    objective = classification(model.replace(apply=training_apply(model)))
    trained = _trained(model, context, settings, objective, "finetune")
    return Outcome(_with_statistics(trained, context))


def distill(
    model: Model,
    context: Context,
    settings: Training,
    *,
    teacher: str | None = None,
    layers: int | tuple[int, ...] | None = None,
    loss: str = "kl",
    temperature: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    teacher_bits: int | None = None,
) -> Outcome:
    """Train against a teacher: by default the model that the recipe began with.

    Args:
      teacher: another model's path or name.
      layers: begin with a student of so many, or these, layers of the teacher.
      loss: a name of `distillation.LOSSES`.
      temperature: of "kl".
      alpha: weight of the soft loss.
      beta: weight of the hard loss; None: 1 - alpha.
      teacher_bits: round the teacher's weights to so many bits, to save its memory.
    """
    guide = context.start if teacher is None else _loaded(teacher, context)
    if layers is not None:
        model = on_mesh(student_from(guide, layers), context.mesh)
    if teacher_bits is not None:
        guide = compress(guide.replace(params=on_one_device(guide.params)), "rtn",
                         bits=teacher_bits, granularity="channel")  # fmt: skip
    objective = distillation(
        model,
        on_mesh(guide, context.mesh),
        loss=loss,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
    )
    trained = _trained(model, context, settings, objective, "distill")
    if isinstance(trained.config, ConvNetConfig):
        trained = _with_statistics(trained, context)
    return Outcome(trained)


def evaluate(model: Model, context: Context) -> Outcome:
    """Measure the model as it is; every other stage is measured too."""
    return Outcome()


def export(
    model: Model,
    context: Context,
    *,
    path: str = "export",
    format: str = "auto",  # noqa: A002 (the user's word)
    dtype: str | None = None,
    compare: bool = False,
) -> Outcome:
    """Write the model as a directory that other libraries open.

    Args:
      path: of the directory, under the working directory.
      format: see `jaxcompress.save`.
      dtype: of what is not compressed; None: as the model came.
      compare: open it with transformers in PyTorch and compare logits and perplexity.
    """
    out = context.root / path
    final = deployed(
        model.replace(params=on_one_device(model.params)), dtype or stored_dtype(context.start)
    )
    if jax.process_index() == 0:
        if final.source is None and isinstance(final.tokenizer, Tokenizer):
            folder = context.folder / "tokenizer"
            limit = getattr(model.config, "max_length", None)
            write_tokenizer(folder, final.tokenizer.inner, limit)
            final = final.replace(source=str(folder))
        save(final, out, format, overwrite=True)
    wait_for_all(f"export {out}")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if model.config is None:
        return Outcome(bytes_disk=size)
    checks = []
    if compare:
        found = pytorch.compare(out, context.inputs.measured("heldout"), context.recipe.data.ctx)
        checks.append(_agreement(found))
    again = _loaded(str(out), context)
    return Outcome(checks=tuple(checks), measured=on_mesh(again, context.mesh), bytes_disk=size)


STAGES: dict[str, Callable[..., Outcome]] = {
    "distill": distill,
    "finetune": finetune,
    "evaluate": evaluate,
    "export": export,
}


def on_mesh(model: Model, mesh: Mesh) -> Model:
    """The model with its parameters where the mesh wants them."""
    return model.replace(params=spread(model.params, param_shardings(model, mesh)))


def read_stages(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, every option checked.

    Raises:
      InputError: an unknown stage or option (names the nearest), a value out of its type, or one
        that is missing.
    """
    if not recipe.stages:
        raise InputError("config.stages: is empty; list at least one stage")
    return [_read(index, given) for index, given in enumerate(recipe.stages)]


def _read(index: int, given: Any) -> Stage:
    where = f"config.stages[{index}]"
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        raise InputError(f"{where}: must be dict(method=NAME, ...)")
    method = given["method"]
    if method not in STAGES and method not in METHODS:
        raise InputError(
            f"{where}.method {method!r}: unknown; {nearest(method, [*STAGES, *METHODS])}"
        )
    options = {
        name: checked(value, type_of_option(method, name, where), f"{where}.{name}")
        for name, value in given.items()
        if name != "method"
    }
    if not _trains(method):
        return Stage(index, method, options)
    wins_back = options.pop("wins_back", None)
    fields = {field.name for field in dataclasses.fields(Training)}
    given_settings = {name: options.pop(name) for name in fields & options.keys()}
    if "steps" not in given_settings:
        raise InputError(f"{where}.steps: is needed; say how many steps to train")
    return Stage(index, method, options, Training(**given_settings), wins_back)


def type_of_option(method: str, name: str, where: str) -> Any:
    """The type of a stage's option; raises `InputError` where it has none of this name."""
    known = options_of(method)
    if name not in known:
        raise InputError(f"{where}.{name}: {method} has no such option; {nearest(name, known)}")
    return known[name]


def options_of(method: str) -> dict[str, Any]:
    """Names and types of the options that a stage takes."""
    if method not in STAGES:
        return _options_of_method(METHODS[method])
    own = _hints(STAGES[method])
    return own | typing.get_type_hints(Training) | {"wins_back": float} if _trains(method) else own


def _trains(method: str) -> bool:
    return method in STAGES and "settings" in inspect.signature(STAGES[method]).parameters


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}


def _options_of_method(method: Method) -> dict[str, Any]:
    known = {n: h for n, h in _hints(method.function).items() if n != "calibration"}
    known |= PER_MATRIX if method.per_matrix else {}
    known |= CALIBRATED if method.needs != "nothing" else {}
    return known | (WALK if method.statistics else {})


def draws_calibration(method: Method, inputs: Inputs) -> bool:
    """Whether a stage of this method draws data: those that it needs, or could use and are there."""
    has_data = {"train", "calibration"} & set(inputs.roles)
    return method.needs == "calibration" or (method.needs != "nothing" and bool(has_data))


def _compress(model: Model, context: Context, method: str, options: dict[str, Any]) -> Outcome:
    """A method on the devices of each process: all processes compute the same."""
    samples = options.pop("calibration_samples", CALIBRATION_SAMPLES)
    if draws_calibration(METHODS[method], context.inputs):
        options["calibration"] = context.inputs.calibration(samples)
    devices = jax.local_devices()
    if METHODS[method].statistics and len(devices) > 1 and samples % len(devices) == 0:
        options["mesh"] = Mesh(np.asarray(devices), ("data",))
    local = model.replace(params=on_one_device(model.params))
    journal = Journal(context.folder / "partial")
    small = compress(local, method, seed=context.seed, journal=journal, **options)
    return Outcome(on_mesh(small, context.mesh), seconds=journal.seconds)


def _trained(
    model: Model, context: Context, settings: Training, objective: Any, name: str
) -> Model:
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
    )


def _agreement(found: Mapping[str, Any]) -> dict[str, Any]:
    ours, theirs = found["perplexity"], found["perplexity_pytorch"]
    apart = abs(ours / theirs - 1)
    return {
        "name": "PyTorch computes the same from the export",
        "passed": apart < 1e-4 and found["logits_difference"] < 1e-4,
        "text": f"perplexity {ours:.6g} here, {theirs:.6g} in PyTorch over {found['tokens']} "
        f"tokens; logits differ by at most {found['logits_difference']:.1e} of their spread",
    }


def _loaded(name: str, context: Context) -> Model:
    """Another model, made to compute as the one that the recipe began with does."""
    fields = context.recipe.model
    model = api.load(name, dtype="float32", scan_layers=fields.scan_layers)
    return with_compute_dtype(model, fields.compute_dtype)


def _with_statistics(model: Model, context: Context) -> Model:
    """A convolutional network that trained by the statistics of its batches, with its own."""
    count = min(STATISTICS_IMAGES, len(context.inputs.dataset("train")))
    images = context.inputs.drawn("train", count)
    batches = [{"images": part} for part in np.array_split(images, -(-count // 128))]
    local = model.replace(params=on_one_device(model.params))
    return on_mesh(recalibrate(local, batches), context.mesh)
