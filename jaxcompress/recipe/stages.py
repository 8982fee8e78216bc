"""What may stand in `config.stages`: every method, and the stages of `STAGES`.

A stage is a function of a model and the run it belongs to. Its keyword-only parameters are its
options; stages that train take those of `training.settings.Training` besides.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxcompress import api
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.core.model import Model
from jaxcompress.core.selection import nearest
from jaxcompress.data.bpe import write_tokenizer
from jaxcompress.distillation import distill as distillation
from jaxcompress.distillation import student_from
from jaxcompress.export import save
from jaxcompress.layerwise.walk import Sequential
from jaxcompress.methods import METHODS, best_method, compress, is_method, method_named
from jaxcompress.models import ConvNetConfig, Tokenizer
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.recipe import pytorch
from jaxcompress.recipe.config import Recipe, checked
from jaxcompress.recipe.inputs import deployed, on_one_device, stored_dtype
from jaxcompress.recipe.quantized_training import Quantize, train_quantized
from jaxcompress.recipe.schedule_stages import SCHEDULE_STAGES
from jaxcompress.recipe.stepwise_stages import greedy, iterative
from jaxcompress.recipe.store import wait_for_all
from jaxcompress.recipe.work import (
    BatchNorm,
    Context,
    Outcome,
    compressed,
    finetuned,
    objective_of,
    on_mesh,
    trained_on,
    with_statistics,
)
from jaxcompress.training.settings import Training

# Options of every method that sees one matrix at a time, and of every one that needs data.
PER_MATRIX = {
    "include": str | tuple[str, ...] | None,
    "exclude": str | tuple[str, ...] | None,
    "overrides": Mapping[str, Mapping[str, Any]],
}
CALIBRATED = {"calibration_samples": int}
WALK = {"sequential": Sequential, "dense_target": float}


@dataclass(frozen=True)
class Stage:
    """A stage whose options were checked.

    Attributes:
      index: place in the recipe.
      method: its name in `STAGES`, or of a method: see `methods.method_named`.
      options: of the stage's own function.
      training: settings, where it trains.
      wins_back: of a stage that trains: the share of the log-perplexity (or accuracy) lost since
        the last stage that trained, or the start, that it must win back for the run to pass.
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
        return self.method not in ("evaluate", "export")

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
        if self.method not in STAGES:
            return compressed(model, context, self.method, dict(self.options))
        function = STAGES[self.method]
        arguments = (model, context) if self.training is None else (model, context, self.training)
        return function(*arguments, **self.options)


def finetune(
    model: Model,
    context: Context,
    settings: Training,
    *,
    batch_norm: BatchNorm = "running",
    quantize: Quantize = None,
    quantize_after: int = 0,
) -> Outcome:
    """Train on the data: next tokens, or the labels of images. Pruned entries stay 0.

    Args:
      batch_norm: of a convolutional network: by its running statistics, which stay, or by those of
        each batch, and running ones are measured afterwards; a fresh network needs the latter.
      quantize: dict(method=NAME, ...): train the model as that stage would quantize it, and end
        with the quantized one; several are done in order.
      quantize_after: steps before that.
    """
    if quantize is None:
        return Outcome(finetuned(model, context, settings, "finetune", batch_norm=batch_norm))
    trained = train_quantized(
        objective_of(model, context, batch_norm), model, context, settings, "finetune",
        quantize, quantize_after,
    )  # fmt: skip
    return Outcome(with_statistics(trained, context) if batch_norm == "batch" else trained)


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
    quantize: Quantize = None,
    quantize_after: int = 0,
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
      quantize: as of `finetune`.
      quantize_after: likewise.
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
    if quantize is None:
        trained = trained_on(objective, model, context, settings, "distill")
    else:
        trained = train_quantized(
            objective, model, context, settings, "distill", quantize, quantize_after
        )
    if isinstance(trained.config, ConvNetConfig):
        trained = with_statistics(trained, context)
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
    **SCHEDULE_STAGES,
    "iterative": iterative,
    "greedy": greedy,
    "evaluate": evaluate,
    "export": export,
}


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
    if method == "auto":
        method = best_method({**given, "method": None}, calibration="that of the recipe")
    if not is_stage(method):
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


def is_stage(name: Any) -> bool:
    """Whether it names a stage: of `STAGES`, or a method, or several joined by "+"."""
    if not isinstance(name, str):
        return False
    return name in STAGES or is_method(name)


def type_of_option(method: str, name: str, where: str) -> Any:
    """The type of a stage's option; raises `InputError` where it has none of this name."""
    known = options_of(method)
    if name not in known:
        raise InputError(f"{where}.{name}: {method} has no such option; {nearest(name, known)}")
    return known[name]


def options_of(method: str) -> dict[str, Any]:
    """Names and types of the options that a stage takes."""
    if method not in STAGES:
        return _options_of_method(method_named(method))
    own = _hints(STAGES[method])
    return own | typing.get_type_hints(Training) | {"wins_back": float} if _trains(method) else own


def _trains(method: str) -> bool:
    return method in STAGES and "settings" in inspect.signature(STAGES[method]).parameters


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}


def _options_of_method(method: Method) -> dict[str, Any]:
    known = method.hints | (PER_MATRIX if method.selects else {})
    known |= CALIBRATED if method.needs != "nothing" else {}
    return known | (WALK if method.walks else {})


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
