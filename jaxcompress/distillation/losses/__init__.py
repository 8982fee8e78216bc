"""What is compared between teacher and student: a loss per file, a line per loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from jax import Array

from jaxcompress.distillation.losses.cosine import cosine
from jaxcompress.distillation.losses.kl import kl
from jaxcompress.distillation.losses.mse import mse


@dataclass(frozen=True)
class Loss:
    """A loss between the logits of a student and of its teacher.

    Attributes:
      function: `function(student, teacher, **options) -> losses` of logits `[..., classes]`, one
        loss `[...]` for each row, in float32 or wider. Keyword-only parameters are its options.
      alpha: its weight beside the hard loss, unless one is given.
    """

    function: Callable[..., Array]
    alpha: float

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options of the function."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


LOSSES: dict[str, Loss] = {
    "kl": Loss(kl, alpha=0.5),
    "mse": Loss(mse, alpha=1.0),
    "cosine": Loss(cosine, alpha=1.0),
}
