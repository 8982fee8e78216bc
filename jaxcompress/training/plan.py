"""What a training takes of each device's memory, told before it begins: arithmetic over shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.training.mesh import RULES, AnyMesh, param_shardings
from jaxcompress.training.prepare import arrays_of, parts_of
from jaxcompress.training.settings import Training

COLUMNS = ("stage", "parameters", "trained", "weights", "moments", "gradients", "teacher", "total")


@dataclass(frozen=True)
class StageMemory:
    """One stage; sizes are bytes on each device, activations not counted.

    Attributes:
      name: of the stage.
      parameters: of the model, entries of compressed arrays counted as if dense.
      trained: numbers that train.
      weights: of the model: float32 master weights of what trains, the rest as it is.
      moments: of the optimizer.
      gradients: of what trains.
      teacher: parameters of teachers.
    """

    name: str
    parameters: int
    trained: int = 0
    weights: int = 0
    moments: int = 0
    gradients: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        """Bytes on each device."""
        return self.weights + self.moments + self.gradients + self.teacher


def plan_stage(
    name: str,
    model: Model,
    mesh: AnyMesh,
    *,
    settings: Training | None = None,
    teachers: Sequence[Model] = (),
    rules: Mapping[str, str | None] = RULES,
) -> StageMemory:
    """The memory of a stage.

    Args:
      name: of the stage.
      model: at its beginning; its parameters may be `jax.ShapeDtypeStruct`s.
      mesh: of devices, or from `abstract_mesh`.
      settings: of a stage that trains, None for another.
      teachers: models that lie on the mesh beside this one.
      rules: how logical axes of parameters lie on the mesh.

    Raises:
      InputError: nothing to train.
    """
    parameters = sum(leaf.size for _, leaf in leaves_with_paths(model.params) if is_array(leaf))
    beside = sum(_of_model(teacher, mesh, rules) for teacher in teachers)
    if settings is None:
        weights = _of_model(model, mesh, rules)
        return StageMemory(name, parameters, weights=weights, teacher=beside)
    parts = parts_of(
        model,
        settings.make_optimizer(),
        mesh,
        rules=rules,
        train=settings.train,
        include=settings.include,
        exclude=settings.exclude,
    )
    masters = bytes_on_device(parts.state.trainable, parts.state_at.trainable)
    return StageMemory(
        name,
        parameters,
        trained=sum(x.size for x in jax.tree.leaves(parts.trainable)),
        weights=masters + bytes_on_device(parts.frozen, parts.frozen_at),
        moments=bytes_on_device(parts.state.optimizer, parts.state_at.optimizer),
        gradients=masters,
        teacher=beside,
    )


def plan_table(stages: Sequence[StageMemory], mesh: AnyMesh) -> str:
    """The stages as a table to print, sizes per device."""
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    rows = [COLUMNS, *(_row(stage) for stage in stages)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        return "  ".join(cells).rstrip()

    title = f"On each of {mesh.size} devices ({sizes}), activations not counted:"
    return "\n".join([title, *map(line, rows)])


def bytes_on_device(tree: Any, shardings: Any) -> int:
    """Bytes that each device holds of arrays, or of what has their shapes.

    Args:
      tree: of arrays.
      shardings: a tree like it of `NamedSharding`s that divide them evenly.
    """
    held = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(held))


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a size."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "size")


def _of_model(model: Model, mesh: AnyMesh, rules: Mapping[str, str | None]) -> int:
    model = model.replace(params=arrays_of(model.params))
    return bytes_on_device(model.params, param_shardings(model, mesh, rules))


def _row(stage: StageMemory) -> tuple[str, ...]:
    counts = [_short(stage.parameters, 1000, ("", "K", "M", "B", "T"))]
    counts.append(_short(stage.trained, 1000, ("", "K", "M", "B", "T")) if stage.trained else "-")
    sizes = [getattr(stage, name) for name in COLUMNS[3:]]
    shown = [_short(size, 1024, (" B", " KiB", " MiB", " GiB", " TiB")) for size in sizes]
    return stage.name, *counts, *(s if size else "-" for s, size in zip(shown, sizes, strict=True))


def _short(number: float, base: int, units: Sequence[str]) -> str:
    """A number with its unit, in two digits at least."""
    for unit in units:
        if number < base or unit == units[-1]:
            break
        number /= base
    return f"{number:.1f}{unit}" if number < 10 and unit != units[0] else f"{number:.0f}{unit}"
