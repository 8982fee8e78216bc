"""Students made from their teachers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import ResNetConfig, build_model, take_layers


def student_from(teacher: Model, layers: int | Sequence[int]) -> Model:
    """A student that begins as some layers of its teacher; widths stay.

    To drop the layers that matter least instead, use `jaxcompress.compress(teacher, "depth")`.

    Source: Sanh et al., "DistilBERT", arXiv:1910.01108, section 3.

    Args:
      teacher: a model with blocks.
      layers: how many, evenly spaced, the first and the last among them (one: the first); or
        which, in their order, negative ones counted from the end.

    Returns:
      The student, its config rewritten; `notes` name the layers.

    Raises:
      InputError: more layers than there are, none, or a model without blocks.
    """
    depth = _depth(teacher)
    if isinstance(layers, int):
        layers = evenly_spaced(layers, depth)
    student = take_layers(teacher, layers)
    taken = ", ".join(str(range(depth)[layer]) for layer in layers)
    note = f"student: layers {taken} of {depth}"
    return student.replace(notes=(*teacher.notes, note))


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of `range(total)`, evenly spaced, the first and the last among them.

    Raises:
      InputError: `count` is not between 1 and `total`.
    """
    if not 1 <= count <= total:
        raise InputError(f"layers {count}: the teacher has {total}, take 1 to {total}")
    gaps = max(count - 1, 1)
    return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(count)]


def resnet_student(
    teacher: Model,
    stage_sizes: Sequence[int],
    *,
    widths: Sequence[int] | None = None,
    seed: int = 0,
) -> Model:
    """A fresh, smaller CIFAR ResNet with the classes of its teacher.

    Args:
      teacher: a CIFAR ResNet.
      stage_sizes: residual blocks per stage; `(1, 1, 1)` is ResNet-8, `(2, 2, 2)` ResNet-14. Fewer
        stages than the teacher's are its first ones.
      widths: channels per stage; None: the teacher's.
      seed: of the fresh parameters.

    Raises:
      InputError: another model, or stages that do not fit together.
    """
    if not isinstance(teacher.config, ResNetConfig):
        raise InputError("resnet_student: the teacher is no CIFAR ResNet; use student_from")
    if not stage_sizes or min(stage_sizes) < 1:
        raise InputError(f"stage_sizes {tuple(stage_sizes)}: each stage needs 1 block or more")
    widths = teacher.config.widths[: len(stage_sizes)] if widths is None else widths
    config = dataclasses.replace(
        teacher.config,
        stage_sizes=tuple(stage_sizes),
        widths=tuple(widths),
        inner_widths=(),
        pads=(),
    )
    return build_model(config, seed=seed)


def _depth(model: Model) -> int:
    if model.config is not None:
        return model.config.num_layers
    if model.blocks is None:
        raise InputError("student_from: the teacher has neither a config nor blocks")
    return len(model.blocks.of(model.params))
