"""The methods `heads`, `neurons`, `filters`, `units` and `width`: one cut of one kind of group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.readers.coupling import Group, Groups, coupling
from jaxcompress.core.readers.kept import KeptArrays, combine
from jaxcompress.pruning.structured.choice import Allocation, best, choose, kept_count
from jaxcompress.pruning.structured.compensate import Compensate, compensated
from jaxcompress.pruning.structured.configs import tied_heads
from jaxcompress.pruning.structured.data import Data, Seen, data_of
from jaxcompress.pruning.structured.importance import Reduce, importance, per_step
from jaxcompress.pruning.structured.result import Form, smaller_model
from jaxcompress.pruning.structured.roles import Kind, Role, of_kind, roles


@dataclass(frozen=True)
class Settings:
    """The options of every structured method; see `heads`."""

    sparsity: float = 0.25
    score: str = "magnitude"
    reduce: Reduce = "sum"
    multiple: int = 1
    minimum: int = 1
    allocation: Allocation = "uniform"
    compensate: Compensate = "none"
    form: Form = "config"
    seed: int = 0


@dataclass
class Cut:
    """A network being cut: its groups, their roles, and what the data say of it."""

    model: Model
    seen: Seen
    groups: Groups
    roles: list[Role]

    @classmethod
    def of(cls, model: Model, data: Data) -> Cut:
        """Reads the network at the shapes of one chunk of the data."""
        groups = coupling(model.apply)(model.params, *data.first)
        return cls(model, Seen.of(model, data), groups, roles(groups))

    def of_kind(self, kind: Kind, residual: bool | None = None) -> list[Group]:
        """The groups of one kind; `InputError` where there is none."""
        name = self.model.config.model_type if self.model.config is not None else "the model"
        return [r.group for r in of_kind(self.roles, kind, residual=residual, name=name)]

    def scores(self, chosen: Sequence[Group], settings: Settings) -> list[np.ndarray]:
        """Scores of the chosen groups."""
        s = settings
        return importance(self.seen, self.groups, chosen, s.score, s.reduce, s.seed)

    def result(
        self, chosen: Sequence[Group], indices: Sequence[np.ndarray], settings: Settings, what: str
    ) -> Model:
        """The model that keeps these indices of the chosen groups."""
        kept = combine(*(g.keep(i) for g, i in zip(chosen, indices, strict=True)))
        program = self.groups.program
        params, done = compensated(self.seen, program, chosen, kept, settings.compensate)
        told = _counted(chosen, indices)
        notes = [f"{what}: kept {told} by {settings.score} ({settings.reduce})", *done]
        return smaller_model(
            self.model, params, kept, _few(self.seen.data.first), settings.form, notes
        )


def _few(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Two samples, to compare outputs on."""
    return tuple(x[:2] for x in inputs)


def _counted(chosen: Sequence[Group], indices: Sequence[np.ndarray]) -> str:
    """`6 of 8 (12 times), 3 of 4`."""
    found: dict[str, int] = {}
    for group, index in zip(chosen, indices, strict=True):
        text = f"{index.shape[-1]} of {group.size}"
        found[text] = found.get(text, 0) + (group.steps or 1)
    return ", ".join(t if n == 1 else f"{t} ({n} times)" for t, n in found.items())


def _cut(
    model: Model, calibration: Any, kind: Kind, settings: Settings, residual: bool | None = None
) -> Model:
    """One kind of group, cut."""
    _check_heads(model, kind, settings)
    cut = Cut.of(model, data_of(model, calibration))
    chosen = cut.of_kind(kind, residual)
    indices = choose(
        cut.scores(chosen, settings),
        settings.sparsity,
        multiple=settings.multiple,
        minimum=settings.minimum,
        allocation=settings.allocation,
    )
    return cut.result(chosen, indices, settings, kind)


def _check_heads(model: Model, kind: Kind, settings: Settings) -> None:
    if kind == "heads" and settings.form == "config" and tied_heads(model.config):
        raise InputError(
            f"heads: the config of {model.config.model_type} makes all heads together as wide as "
            "the residual stream; use method width, which cuts both, or form='function'"
        )


def heads(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    allocation: Allocation = "uniform",
    compensate: Compensate = "none",
    form: Form = "config",
    seed: int = 0,
) -> Model:
    """Attention heads go: those that share a key and value head, together with it.

    Source: Michel et al., "Are Sixteen Heads Really Better than One?", arXiv:1905.10650.

    Args:
      model: any model; heads are found in its program.
      calibration: inputs `[samples, ...]`, where the score or the compensation needs them.
      sparsity: fraction removed, floor(sparsity * n) of each group, or fewer for `multiple`.
      score: of the weights: magnitude, taylor, fisher, wanda and the other scores of single
        weights; of what consumers read: activation, activation_l2, apoz (fraction of zeros); gate
        (gradient of a gate); random; of heads: entropy (the most spread go first) or
        entropy_reversed.
      reduce: how scores of single weights or channels become one: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a group.
      allocation: "uniform", or "global": the lowest of all groups together.
      compensate: "none", "bias" (the mean of what goes into the consumers' biases), or "refit"
        (the consumers fitted anew by least squares).
      form: "config", or "function": of a reference model too, the cut program without a config.
      seed: of the score random.

    Returns:
      The smaller model; its notes say what stayed.

    Raises:
      InputError: no such group, an option out of range, or a format that cannot say the result.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, allocation, compensate, form, seed
    )
    return _cut(model, calibration, "heads", settings)


def neurons(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    allocation: Allocation = "uniform",
    compensate: Compensate = "none",
    form: Form = "config",
    seed: int = 0,
) -> Model:
    """Neurons inside the blocks go: of feed-forward layers, of hidden layers of a classifier.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), arXiv:2407.14679, section 2.2.

    Args:
      model: see `heads`, like the rest.
      calibration: inputs, where the score or the compensation needs them.
      sparsity: fraction removed.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a group.
      allocation: "uniform", or "global": the lowest of all groups together.
      compensate: "none", "bias" or "refit".
      form: "config" or "function".
      seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, allocation, compensate, form, seed
    )
    return _cut(model, calibration, "neurons", settings)


def filters(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    allocation: Allocation = "uniform",
    residual: bool = False,
    compensate: Compensate = "none",
    form: Form = "config",
    seed: int = 0,
) -> Model:
    """Filters of convolutions go, with their norms and what reads them.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3; over
    coupled layers: Fang et al., "DepGraph", arXiv:2301.12900.

    Args:
      model: see `heads`, like the rest.
      calibration: images, or (images, labels) for scores from gradients.
      sparsity: fraction removed.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a group.
      allocation: "uniform", or "global": the lowest of all groups together.
      residual: also cut the filters that residual additions tie together.
      compensate: "none", "bias" or "refit".
      form: "config" or "function".
      seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, allocation, compensate, form, seed
    )
    return _cut(model, calibration, "filters", settings, None if residual else False)


def units(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "magnitude",
    reduce: Reduce = "sum",
    multiple: int = 1,
    minimum: int = 1,
    compensate: Compensate = "none",
    form: Form = "config",
    seed: int = 0,
) -> Model:
    """Units of recurrent layers go, with all their gates.

    Source: Wen et al., "Learning Intrinsic Sparse Structures within Long Short-Term Memory",
    arXiv:1709.05027, section 3.

    Args:
      model: see `heads`, like the rest.
      calibration: inputs, where the score or the compensation needs them.
      sparsity: fraction removed of each layer.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay of a layer.
      compensate: "none", "bias" or "refit".
      form: "config" or "function".
      seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, "uniform", compensate, form, seed
    )
    return _cut(model, calibration, "units", settings)


def width(
    model: Model,
    *,
    calibration: Any = None,
    sparsity: float = 0.25,
    score: str = "activation",
    reduce: Reduce = "mean",
    multiple: int = 1,
    minimum: int = 1,
    form: Form = "config",
    seed: int = 0,
) -> Model:
    """The residual stream becomes narrower: embeddings, norms, and every block's ins and outs.

    Where the format makes all heads together as wide as the residual stream (GPT-2), as many heads
    go as well.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), arXiv:2407.14679, section 2.2.

    Args:
      model: see `heads`, like the rest.
      calibration: inputs, where the score needs them.
      sparsity: fraction removed.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays is a multiple of it, such as 8, 64 or 128.
      minimum: the least that stay.
      form: "config" or "function".
      seed: of the score random.
    """
    settings = Settings(sparsity, score, reduce, multiple, minimum, form=form, seed=seed)
    cut = Cut.of(model, data_of(model, calibration))
    streams = cut.of_kind("width")
    head_dim = tied_heads(model.config) if form == "config" else 0
    settings = replace(settings, multiple=math.lcm(multiple, head_dim or 1))
    scores = cut.scores(streams, settings)
    indices = choose(scores, sparsity, multiple=settings.multiple, minimum=minimum)
    if not head_dim:
        return cut.result(streams, indices, settings, "width")
    also = cut.of_kind("heads")
    count = indices[0].shape[-1] // head_dim
    chosen = [best(s, count) for s in cut.scores(also, settings)]
    return cut.result([*streams, *also], [*indices, *chosen], settings, "width with heads")


# ---------------------------------------------------------------------------- shapes alone


def shapes_of(kind: Kind, default: float = 0.25) -> Any:
    """A function that gives a model of the shapes that a method gives, without data.

    Args:
      kind: of the groups that the method cuts.
      default: of the method's option `sparsity`.
    """

    def shapes(
        model: Model,
        *,
        sparsity: float = default,
        multiple: int = 1,
        minimum: int = 1,
        residual: bool = False,
        **_: Any,
    ) -> Model:
        data = data_of(model, None)
        groups = coupling(model.apply)(model.params, *data.first)
        which = None if kind != "filters" or residual else False
        chosen = [r.group for r in of_kind(roles(groups), kind, residual=which)]
        head_dim = tied_heads(model.config) if kind == "width" else 0
        if head_dim:
            multiple = math.lcm(multiple, head_dim)
        counts = [kept_count(g.size, sparsity, multiple, minimum) for g in chosen]
        if head_dim:
            also = [r.group for r in of_kind(roles(groups), "heads")]
            counts += [counts[0] // head_dim] * len(also)
            chosen += also
        kept = combine(*(_first(g, n) for g, n in zip(chosen, counts, strict=True)))
        form: Form = "config"
        return smaller_model(model, model.params, kept, data.first, form, (), checked=False)

    return shapes


def _first(group: Group, count: int) -> KeptArrays:
    """A record that keeps the first indices."""
    indices = np.arange(count)
    return group.keep(np.stack([indices] * group.steps) if per_step(group) else indices)
