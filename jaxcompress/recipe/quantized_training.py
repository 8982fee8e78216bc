"""Training a model as it will be quantized: the option `quantize` of `finetune` and `distill`.

It is the stage that would quantize the model afterwards, `{"method": "rtn", "bits": 3}`, or several
of them in order. They are run on the model first; their result trains in the form of
`quantization.qat`, and is converted at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.methods import method_named
from jaxcompress.quantization.qat import convert, prepare_qat
from jaxcompress.recipe.stepwise_stages import candidate_options
from jaxcompress.recipe.work import Context, compressed, on_mesh
from jaxcompress.training.objective import Objective
from jaxcompress.training.settings import Training, train
from jaxcompress.training.transform import Transform

Stage = Mapping[str, Any]  # a method and its options, as a recipe gives them
Quantize = Stage | tuple[Stage, ...] | None


def train_quantized(
    objective: Objective,
    model: Model,
    context: Context,
    settings: Training,
    name: str,
    quantize: Quantize,
    quantize_after: int,
) -> Model:
    """The model trained as it will be quantized, and quantized.

    Args:
      objective: a function of the model's parameters.
      model: on the mesh.
      context: the run.
      settings: of the training.
      name: in the progress shown.
      quantize: see the module's text.
      quantize_after: steps that train the model as it is; what is rounded, and its ranges, are
        those of the weights then. The optimizer's moments begin anew there, its rate goes on.
    """
    batches = context.inputs.batches(settings.batch_size, context.seed)

    def trained(model: Model, folder: str, transform: Transform) -> Model:
        return train(
            model, objective, batches, settings, workdir=context.folder / folder,
            mesh=context.mesh, parallel=context.recipe.mesh.parallel, seed=context.seed, name=name,
            transform=transform,
        )  # fmt: skip

    if quantize_after:
        model = trained(model, "partial/before", Transform(steps=quantize_after))
    ready = prepare_qat(_quantized(model, context, quantize), model, keep_zeros=settings.keep_zeros)
    rest = settings.steps - quantize_after
    change = Transform(optimizer=lambda inner: later(inner, quantize_after), steps=rest)
    made = trained(on_mesh(ready, context.mesh), "", change)
    return on_mesh(convert(made), context.mesh)


def quantized_shapes(
    model: Model,
    quantize: Quantize,
    quantize_after: int,
    settings: Training,
    by_method: Callable[[str, dict[str, Any], Model], Model | None],
) -> tuple[Model, Model] | None:
    """Shapes of the model as it trains and as it is at the end; None where data decide them.

    Args:
      model: of shapes.
      quantize: the option of the stage.
      quantize_after: likewise.
      settings: of the training.
      by_method: shapes after a method with options.

    Raises:
      InputError: the options do not fit each other or the model; names one.
    """
    if not 0 <= quantize_after < settings.steps:
        raise InputError(
            f"quantize_after {quantize_after}: of {settings.steps} steps, some must be left"
        )
    small: Model | None = model
    for stage in _stages(quantize):
        method, options = candidate_options(stage)
        if method_named(method).produces != "quantized":
            raise InputError(f"quantize: {method} does not quantize; make it a stage before this")
        small = None if small is None else by_method(method, options, small)
    if small is None:
        return None
    made = small

    def ready(params: Any, start: Any) -> Any:
        begun = model.replace(params=start)
        return prepare_qat(made.replace(params=params), begun, keep_zeros=False).params

    return made.replace(params=jax.eval_shape(ready, made.params, model.params)), made


def later(inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """An optimizer whose schedules begin as if so many steps had been taken."""

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    def init(params: Any) -> Any:
        return jax.tree.map(
            lambda s: s._replace(count=s.count + steps) if is_schedule(s) else s,
            inner.init(params),
            is_leaf=is_schedule,
        )

    return optax.GradientTransformation(init, inner.update)


def _quantized(model: Model, context: Context, quantize: Quantize) -> Model:
    for number, stage in enumerate(_stages(quantize)):
        folder = context.folder / "partial" / f"quantize-{number}"
        method, options = candidate_options(stage)
        made = compressed(model, dataclasses.replace(context, folder=folder), method, options).model
        assert made is not None
        model = made
    return model


def _stages(quantize: Quantize) -> Sequence[Stage]:
    if not quantize:
        raise InputError("quantize: give dict(method=NAME, ...), or several of them")
    return (quantize,) if isinstance(quantize, Mapping) else quantize
