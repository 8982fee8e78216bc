"""What is wrong with a recipe, found before any work: its stages run on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.affine import check_bits
from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.data.batches import share_of_process
from jaxcompress.distillation import distill as distillation
from jaxcompress.distillation import student_from
from jaxcompress.export import CONTAINERS, Piece, container_for
from jaxcompress.methods import compressed_shapes, method_named, on_shapes
from jaxcompress.models import ConvNetConfig, name_map_of
from jaxcompress.models.loading import checked_dtype, load_shapes
from jaxcompress.models.precision import with_compute_dtype
from jaxcompress.pruning.schedules import progression
from jaxcompress.recipe import pytorch
from jaxcompress.recipe.config import MeshFields, Recipe
from jaxcompress.recipe.inputs import Inputs, naming
from jaxcompress.recipe.quantized_training import quantized_shapes
from jaxcompress.recipe.schedule_stages import SCHEDULES, job
from jaxcompress.recipe.stages import Stage, options_of
from jaxcompress.recipe.stepwise_stages import candidate_options, named, validation_batches
from jaxcompress.recipe.store import OWN_NAMES
from jaxcompress.recipe.work import calibration_for
from jaxcompress.training.mesh import AnyMesh
from jaxcompress.training.prepare import parts_of


@dataclass(frozen=True)
class Scene:
    """What the stages of a recipe have in common.

    Attributes:
      recipe: its config.
      mesh: its devices, or an abstract one.
      start: the model that it begins with, with shapes for parameters.
      inputs: its data.
    """

    recipe: Recipe
    mesh: AnyMesh
    start: Model
    inputs: Inputs


def check_parallel(fields: MeshFields, mesh: AnyMesh) -> None:
    """Raise `InputError` where the mesh is none for `config.mesh.parallel`."""
    if fields.parallel not in ("jit", "pmap"):
        raise InputError(f"config.mesh.parallel {fields.parallel!r}: use jit or pmap")
    if fields.parallel == "pmap" and (
        jax.process_count() > 1 or mesh.shape["data"] != jax.local_device_count()
    ):
        raise InputError(
            "config.mesh.parallel 'pmap': plain data parallelism over the devices of one process; "
            "leave config.mesh.fsdp and tensor at 1, or use jit"
        )


def check_stages(stages: list[Stage], scene: Scene) -> list[Model | None]:
    """The model of shapes that each stage begins with; None where only the data can tell.

    Raises:
      InputError: a stage does not fit the mesh, the data or the model before it.
    """
    _check_data(stages, scene)
    model: Model | None = scene.start
    before: list[Model | None] = []
    exported: set[PurePath] = set()
    for stage in stages:
        before.append(model)
        model = check_stage(stage, model, scene)
        try:
            if stage.wins_back is not None and not any(
                s.makes_model for s in stages[: stage.index]
            ):
                raise InputError("wins_back: no stage before it changes the model")
            if stage.method == "export":
                _check_path(PurePath(stage.options.get("path", "export")), exported)
        except InputError as error:
            raise InputError(_placed(stage, str(error))) from None
    return before


def check_stage(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    """The model of shapes that a stage makes of one; None where only the data can tell.

    Raises:
      InputError: it cannot; names the option.
    """
    try:
        if stage.training is not None:
            stage.training.check(scene.mesh)
            share_of_process(stage.training.batch_size)
        return CHECKS.get(stage.method, _compressed)(stage, model, scene)
    except InputError as error:
        raise InputError(_placed(stage, str(error))) from None


def shapes_of(params: Any) -> Any:
    """`params` with shapes for arrays."""
    return jax.tree.map(_shape, params)


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _placed(stage: Stage, text: str) -> str:
    """What is wrong, behind the name of the field where it names an option of the stage."""
    text = text.removeprefix(f"{stage.method}: ")
    first = text.split(" ", 1)[0].rstrip(":")
    where = f"config.stages[{stage.index}]"
    return f"{where}.{text}" if first in options_of(stage.method) else f"{where}: {text}"


def _check_data(stages: list[Stage], scene: Scene) -> None:
    """Raise `InputError` unless the model takes what it is trained and measured on."""
    inputs, ctx = scene.inputs, scene.inputs.fields.ctx
    roles = ["heldout"]
    if "train" in inputs.roles or any(stage.training is not None for stage in stages):
        roles.append("train")
    found = {role: inputs.measured(role) for role in roles}
    if inputs.is_text:
        if ctx < 2:
            raise InputError(f"config.data.ctx {ctx}: 2 tokens or more, of which one is predicted")
        given, word, where = jax.ShapeDtypeStruct((1, ctx), jnp.int32), "token id", f"ctx {ctx}"
        targets = found
    else:
        size = found["heldout"][0].shape[1:]
        given, word, where = jax.ShapeDtypeStruct((1, *size), jnp.float32), "label", "heldout"
        targets = {role: labels for role, (_, labels) in found.items()}
    with naming(f"config.data.{where}"):
        outputs = jax.eval_shape(lift(scene.start.apply), scene.start.params, given).shape[-1]
    for role, of_role in targets.items():
        if (largest := int(np.max(of_role))) >= outputs:
            raise InputError(
                f"config.data.{role}: has {word} {largest}, and the model {outputs} outputs"
            )


def _check_path(path: PurePath, exported: set[PurePath]) -> None:
    inside = path.parts and not path.is_absolute() and ".." not in path.parts
    if path.suffix == ".partial":  # may be what another export grows in
        raise InputError(f"path {str(path)!r}: must not end in .partial")
    if not inside or path.parts[0] in OWN_NAMES:
        raise InputError(
            f"path {str(path)!r}: must be a name under the working directory that the run does not "
            f"use itself ({', '.join(OWN_NAMES)})"
        )
    if any(path == other or path in other.parents or other in path.parents for other in exported):
        raise InputError(f"path {str(path)!r}: another stage exports there; give each its own")
    exported.add(path)


def _compressed(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    return _by_method(stage.method, dict(stage.options), model, scene)


def _by_method(
    method: str, options: dict[str, Any], model: Model | None, scene: Scene
) -> Model | None:
    with naming("calibration_samples"):
        calibration_for(
            method_named(method), scene.inputs, options.pop("calibration_samples", None)
        )
    return None if model is None else compressed_shapes(model, method, **options)


def _finetuned(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    settings = stage.training
    by_batches = stage.options.get("batch_norm") == "batch"
    if by_batches and not isinstance(scene.start.config, ConvNetConfig):
        raise InputError("batch_norm batch: the model has no batch norm; leave it out")
    if model is None or settings is None:
        return None
    trains, left = model, model
    if stage.options.get("quantize") is not None:
        after = stage.options.get("quantize_after", 0)
        shapes = quantized_shapes(
            model, stage.options["quantize"], after, settings,
            lambda method, options, small: _by_method(method, options, small, scene),
        )  # fmt: skip
        if shapes is None:
            return None
        trains, left = shapes
    elif "quantize_after" in stage.options:
        raise InputError("quantize_after: of a stage with quantize; say what, or leave it out")
    parts_of(
        trains,
        settings.make_optimizer(),
        scene.mesh,
        train=settings.train,
        include=settings.include,
        exclude=settings.exclude,
    )
    return left


def _scheduled(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    options, settings = dict(stage.options), stage.training
    assert settings is not None
    which = {name: options.pop(name) for name in ("matrices", "spared") & options.keys()}
    if model is None:
        return None
    made = job(model, scene.inputs, settings, scene.recipe.seed, **which)
    change = SCHEDULES[stage.method](made, **options)
    optimizer = change.optimizer(settings.make_optimizer())
    begun = model.replace(params=jax.eval_shape(change.begin, model.params))
    parts = parts_of(
        begun, optimizer, scene.mesh,
        train=settings.train, include=settings.include, exclude=settings.exclude,
    )  # fmt: skip
    jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), parts.trainable)
    jax.eval_shape(change.end, begun.params)
    return model


def _iterated(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    options = stage.options
    totals = progression(
        options.get("progression", "geometric"),
        options.get("sparsity", 0.8),
        options.get("rounds", 4),
    )
    candidates = named(options.get("prune", {"method": "magnitude"}))
    if len(candidates) > 1:
        validation_batches(scene.inputs, options.get("validation_samples", 32))
    for before, after in pairwise([0.0, *totals]):
        made = [
            _by_method(*candidate_options(candidate, before, after), model, scene)
            for candidate in candidates.values()
        ]
        model = made[0] if len(made) == 1 else None
    return _finetuned(stage, model, scene)


def _greedy(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    validation_batches(scene.inputs, stage.options.get("validation_samples", 32))
    for candidate in named(stage.options.get("candidates", ())).values():
        _by_method(*candidate_options(candidate), model, scene)
    return None


def _distilled(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    others = ("teacher", "teacher_bits", "quantize", "quantize_after")
    given = {n: v for n, v in stage.options.items() if n not in others}
    guide, layers = guide_of(stage, scene), given.pop("layers", None)
    if layers is not None:
        whole = _teacher(stage, scene)
        model = on_shapes(lambda teacher: student_from(teacher, layers), whole)
    student = _teacher(stage, scene) if model is None else model
    objective = distillation(student, guide, **given)
    if model is not None and not scene.inputs.is_text:
        found = scene.inputs.drawn("train", 1)
        batch = {"images": _shape(found), "labels": jax.ShapeDtypeStruct((1,), jnp.int32)}
        key = jax.eval_shape(lambda: jax.random.key(0))
        jax.eval_shape(objective.function, model.params, batch, key, objective.constants)
    return _finetuned(stage, model, scene)


def guide_of(stage: Stage, scene: Scene) -> Model:
    """The teacher of a stage that distils, of shapes, rounded where the stage asks for it."""
    bits = stage.options.get("teacher_bits")
    guide = _teacher(stage, scene)
    if bits is None:
        return guide
    with naming("teacher_bits"):
        check_bits(bits)
        rounded = compressed_shapes(guide, "rtn", bits=bits, granularity="channel")
    assert rounded is not None  # the shapes of a method for matrices are known
    return rounded


def _teacher(stage: Stage, scene: Scene) -> Model:
    name = stage.options.get("teacher")
    if name is None:
        return scene.start
    with naming("teacher"):
        fields = scene.recipe.model
        guide = load_shapes(name, dtype="float32", scan_layers=fields.scan_layers)
        return with_compute_dtype(guide, fields.compute_dtype)


def _exported(stage: Stage, model: Model | None, scene: Scene) -> Model | None:
    container, compare = stage.options.get("format", "auto"), stage.options.get("compare", False)
    if container not in CONTAINERS:
        raise InputError(f"format {container!r}: use one of {', '.join(CONTAINERS)}")
    if stage.options.get("dtype") is not None:
        checked_dtype(stage.options["dtype"])
    if model is not None and model.config is not None:
        container = _container(container, model)
    elif model is not None:
        if container not in ("auto", "native"):
            raise InputError(f"format {container}: the model has no config; only native holds it")
        container = "native"
    if compare:
        pytorch.require()
        if not scene.inputs.is_text or container == "native":
            raise InputError(
                "compare: transformers opens language models in the containers dense and "
                f"compressed-tensors, this one is {container}; leave compare out"
            )
    return model


def _container(asked: str, model: Model) -> str:
    """The container that an export will have."""
    table = name_map_of(model.config)
    rows = {row.name: row for row in table.of_kind("linear", "head")}

    def compressed(params: Any) -> dict[str, Any]:
        found: Iterable[tuple[Any, Any]] = table.walk(params)
        return {row.name: row.to_checkpoint(x) for row, x in found if is_compressed(x)}

    forms = jax.eval_shape(compressed, model.params)
    pieces = {
        name: Piece(None, name in rows and rows[name].axes == (1, 0), like=form)
        for name, form in forms.items()
    }
    return container_for(asked, pieces, model.config.to_hf())


# By the name of a stage: what is wrong with it, and the model of shapes that it leaves (None: only
# the data can tell).
CHECKS: dict[str, Callable[[Stage, Model | None, Scene], Model | None]] = {
    "finetune": _finetuned,
    "distill": _distilled,
    "evaluate": lambda stage, model, scene: model,
    "export": _exported,
    **dict.fromkeys(SCHEDULES, _scheduled),
    "iterative": _iterated,
    "greedy": _greedy,
}
