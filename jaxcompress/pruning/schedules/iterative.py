"""Prune a little, tune, and again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.pruning.patterns import check_sparsity
from jaxcompress.pruning.schedules.gradual import cubic
from jaxcompress.pruning.schedules.lottery import round_sparsities

Progression = Literal["geometric", "linear", "cubic"]


def iterative(
    model: Model,
    prune: Callable[[Model, float, float], Model],
    tune: Callable[[Model, int], Model],
    totals: list[float],
) -> Model:
    """`model` pruned step by step, and tuned after each.

    Source: Han et al., "Learning both Weights and Connections", arXiv:1506.02626, section 3.3.

    Args:
      model: what is pruned.
      prune: `prune(model, before, after)`: from one share of the dense model removed to another.
      tune: `tune(model, round)`, rounds counted from 0.
      totals: the share removed after each round, see `progression`.
    """
    for number, (before, after) in enumerate(pairwise([0.0, *totals])):
        model = tune(prune(model, before, after), number)
    return model


def progression(kind: Progression, sparsity: float, rounds: int) -> list[float]:
    """The share removed after each round.

    Args:
      kind: "geometric" (each round takes the same share of what is left), "linear", or "cubic"
        (arXiv:1710.01878, equation 1).
      sparsity: after the last round.
      rounds: how many.

    Raises:
      InputError: an unknown kind, or a number out of range.
    """
    check_sparsity(sparsity)
    if rounds < 1:
        raise InputError(f"rounds {rounds}: must be 1 or more")
    if kind == "geometric":
        return round_sparsities(sparsity, rounds)
    if kind == "linear":
        return [sparsity * r / rounds for r in range(1, rounds)] + [sparsity]
    if kind == "cubic":
        return cubic(0.0, sparsity, rounds)[1:]
    raise InputError(f"progression {kind!r}: use geometric, linear or cubic")


def share_of_rest(before: float, after: float) -> float:
    """What must go of what is left, to come from one total share to another."""
    return 1 - (1 - after) / (1 - before)
