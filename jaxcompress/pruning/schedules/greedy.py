"""Greedy removal: of several ways to make a model smaller, the one that costs least loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model


def greedy(
    model: Model,
    candidates: Mapping[str, Callable[[Model], Model]],
    loss: Callable[[Model], float],
    *,
    rounds: int = 1,
) -> Model:
    """`model` after `rounds` removals, each the best of all candidates.

    A candidate that cannot go on (nothing is left that it could cut) is passed over.

    Args:
      model: what is pruned.
      candidates: ways to remove something, by name.
      loss: of a model, on data that no candidate has seen.
      rounds: removals.

    Returns:
      The model; its notes tell the losses of each round.

    Raises:
      InputError: no candidate can go on, with the reason of the first.
    """
    for number in range(1, rounds + 1):
        tried: dict[str, tuple[float, Model]] = {}
        refused: dict[str, InputError] = {}
        for name, remove in candidates.items():
            try:
                made = remove(model)
            except InputError as error:
                refused[name] = error
                continue
            tried[name] = loss(made), made
        if not tried:
            name, reason = next(iter(refused.items()))
            raise InputError(f"greedy: round {number}: no candidate can go on; {name}: {reason}")
        best = min(tried, key=lambda name: tried[name][0])
        told = ", ".join(f"{name} {found:.4f}" for name, (found, _) in tried.items())
        model = tried[best][1]
        model = model.replace(notes=(*model.notes, f"greedy: kept {best} of: {told}"))
    return model
