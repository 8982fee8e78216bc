"""A cut of one kind of group, from the model to what stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxcompress.core.decisions import tell
from jaxcompress.core.model import Model
from jaxcompress.core.readers.coupling import Group, Groups, coupling
from jaxcompress.core.readers.kept import KeptArrays, combine
from jaxcompress.pruning.structured.choice import Allocation, choose, kept_count
from jaxcompress.pruning.structured.compensate import Compensate, compensated
from jaxcompress.pruning.structured.configs import tied_heads
from jaxcompress.pruning.structured.data import Data, Seen, data_of
from jaxcompress.pruning.structured.importance import Reduce, importance
from jaxcompress.pruning.structured.result import Form, smaller_model
from jaxcompress.pruning.structured.roles import Kind, Role, of_kind, per_step, roles


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
    random_seed: int = 0


@dataclass
class Cut:
    """A network being cut: its groups, their roles, and what the data say of it."""

    model: Model
    seen: Seen
    groups: Groups
    roles: list[Role]
    scored: dict[int, np.ndarray] = field(default_factory=dict)

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
        found = importance(self.seen, self.groups, chosen, s.score, s.reduce, s.random_seed)
        # Two groups of one axis (heads, and what a head has) may have one name.
        self.scored |= {id(g): scores for g, scores in zip(chosen, found, strict=True)}
        return found

    def result(
        self, chosen: Sequence[Group], indices: Sequence[np.ndarray], settings: Settings, what: str
    ) -> Model:
        """The model that keeps these indices of the chosen groups."""
        self._tell(chosen, indices, settings.score)
        kept = combine(*(g.keep(i) for g, i in zip(chosen, indices, strict=True)))
        program = self.groups.program
        params, done = compensated(self.seen, program, chosen, kept, settings.compensate)
        told = _counted(chosen, indices)
        notes = [f"{what}: kept {told} by {settings.score} ({settings.reduce})", *done]
        return smaller_model(
            self.model, params, kept, _few(self.seen.data.first), settings.form, notes
        )

    def _tell(self, chosen: Sequence[Group], indices: Sequence[np.ndarray], score: str) -> None:
        kinds = {role.group.name: role.kind for role in self.roles}
        for group, index in zip(chosen, indices, strict=True):
            scores = self.scored.get(id(group))
            if scores is not None:
                stays = np.zeros(scores.shape, bool)
                np.put_along_axis(stays, index, True, axis=-1)
                tell(str(kinds[group.name]), group.name, score, scores, stays)


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


@dataclass(frozen=True)
class Decision:
    """What was decided, before anything is cut: for heat maps, and for a cut of one's own.

    Attributes:
      cut: the network.
      groups: what is cut; `group.members` says where it stands.
      scores: of each group, `[size]` or `[steps, size]`.
      kept: the indices that stay, `[k]` or `[steps, k]`.
    """

    cut: Cut
    groups: list[Group]
    scores: list[np.ndarray]
    kept: list[np.ndarray]


def decide(
    model: Model,
    kind: Kind,
    calibration: Any = None,
    settings: Settings | None = None,
    *,
    residual: bool | None = None,
) -> Decision:
    """Scores of all groups of a kind, and what stays of them.

    Args:
      model: any model.
      kind: of the groups.
      calibration: inputs, where the score needs them.
      settings: the options; None: the defaults.
      residual: only groups that a residual addition carries, or only others; None: both.

    Raises:
      InputError: see `methods.heads`.
    """
    settings = settings or Settings()
    cut = Cut.of(model, data_of(model, calibration))
    chosen = cut.of_kind(kind, residual)
    scores = cut.scores(chosen, settings)
    kept = choose(
        scores,
        settings.sparsity,
        multiple=settings.multiple,
        minimum=settings.minimum,
        allocation=settings.allocation,
    )
    return Decision(cut, chosen, scores, kept)


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
