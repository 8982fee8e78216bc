"""`Transform`: what a way of training changes about a training, beside its settings.

Sparse training by schedules and by learned gates (`pruning.schedules`) are such changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import optax

from jaxcompress.training.objective import Objective


def _same(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class Transform:
    """A change to a training. What it remembers lies in the train state, and is checkpointed.

    Attributes:
      optimizer: the optimizer that takes the place of the settings' one; its state holds masks,
        and its updates may take any parameter anywhere.
      objective: the objective that takes the place of the given one: where the loss must see other
        weights than those that train.
      begin: the parameters that train, from the model's; must give the same each time.
      end: the model's parameters, from those that were trained.
      paths: of the leaves that it works on, whose zeros it sees to itself.
      steps: optimizer steps in all, where they are not those of the settings.
    """

    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = _same
    objective: Callable[[Objective], Objective] = _same
    begin: Callable[[Any], Any] = _same
    end: Callable[[Any], Any] = _same
    paths: Iterable[str] = ()
    steps: int | None = None
