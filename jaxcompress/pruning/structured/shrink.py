"""`shrink`: depth, width, heads, neurons, filters and units under one budget, greedily.

A step removes some of one kind (of all layers alike, filters layer by layer) or drops one layer.
The step is taken that costs least loss for what it saves. Steps are tried with zeros in the
network of full size, so that nothing is compiled twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.models import take_layers
from jaxcompress.pruning.depth import layer_scores
from jaxcompress.pruning.structured.budget import (
    Cost,
    Costs,
    MeasuredLoss,
    Part,
    State,
    TaylorLoss,
)
from jaxcompress.pruning.structured.configs import tied_heads
from jaxcompress.pruning.structured.cutting import Cut, Settings
from jaxcompress.pruning.structured.data import data_of
from jaxcompress.pruning.structured.importance import Reduce
from jaxcompress.pruning.structured.roles import Kind

Measure = Literal["loss", "taylor"]

KINDS: tuple[Kind, ...] = ("width", "heads", "neurons", "filters", "units")
PARTS = 16  # a step removes about a sixteenth of what there was
LAYERS_TRIED = 4  # layers that a step tries to drop: those of the least influence


def shrink(
    model: Model,
    *,
    calibration: Any,
    budget: float = 0.75,
    cost: Cost = "parameters",
    kinds: str = "all",
    measure: Measure = "loss",
    score: str = "activation",
    reduce: Reduce = "mean",
    multiple: int = 8,
    random_seed: int = 0,
) -> Model:
    """Width and depth together under one budget, each step where it costs least loss.

    Source: the search of Muralidharan et al. (Minitron), arXiv:2407.14679, section 2.4, made
    greedy; the first-order estimate: Molchanov et al., arXiv:1906.10771, equation 8.

    Args:
      model: any model; depth only with `blocks`.
      calibration: token ids `[samples, ctx]`, or a tuple of images and labels.
      budget: what is left of the cost, a fraction in (0, 1).
      cost: "parameters", or "flops" of a forward pass at the calibration's length.
      kinds: what may become smaller, such as "depth,neurons", of depth, width, heads, neurons,
        filters and units; "all": whatever the model has.
      measure: "loss" (each step is tried on the calibration data) or "taylor" (the first-order
        estimate of the loss, from gradients).
      score: which indices of a kind go first; as of `heads`.
      reduce: sum, mean, max or l2.
      multiple: what stays of width, neurons, filters and units is a multiple of it.
      random_seed: of the score random.

    Returns:
      The smaller model; its notes tell the steps.

    Raises:
      InputError: a budget out of range or out of reach, or an unknown kind.
    """
    if not 0 < budget < 1:
        raise InputError(f"budget {budget}: must be a fraction in (0, 1), such as 0.75")
    every = {"depth", *KINDS}
    wanted = every if kinds == "all" else set(kinds.replace(" ", "").split(","))
    if unknown := wanted - every:
        raise InputError(f"kinds {min(unknown)!r}: use some of depth, {', '.join(KINDS)}, or all")
    settings = Settings(score=score, reduce=reduce, multiple=multiple, random_seed=random_seed)
    data = data_of(model, calibration)
    cut = Cut.of(model, data)
    parts = _parts(cut, settings, wanted)
    influence = np.zeros(0)
    if "depth" in wanted and model.blocks is not None and data.labels is None:
        influence = layer_scores(model, tuple(_joined(x) for x in data.inputs))
    if not parts and len(influence) < 2:
        raise InputError(f"kinds {kinds}: the model has nothing of them that can be cut")
    depth = len(influence) > 0
    loss = MeasuredLoss(cut, parts, data, depth) if measure == "loss" else (
        TaylorLoss(cut, parts, depth)
    )  # fmt: skip
    state, told = _search(parts, influence, Costs(cut, parts, cost), loss, budget)
    notes = [f"shrink: {line}" for line in told]
    return _result(cut, calibration, settings, wanted, parts, state, notes)


def _joined(chunks: Any) -> np.ndarray:
    array = np.asarray(chunks)
    return array.reshape(-1, *array.shape[2:])


def _parts(cut: Cut, settings: Settings, wanted: set[str]) -> list[Part]:
    """What can become smaller step by step."""
    parts: list[Part] = []
    head_dim = tied_heads(cut.model.config)
    for kind in KINDS:
        roles = [r for r in cut.roles if r.kind == kind and r.group.cuttable]
        if kind not in wanted or not roles or (kind == "heads" and head_dim):
            continue
        groups = [role.group for role in roles]
        scores = cut.scores(groups, settings)
        if kind == "filters":  # the formats of convolutional networks have a size for each layer
            alone = [
                _part(f"{g.name} filters", [g], [s], settings.multiple)
                for g, s, r in zip(groups, scores, roles)
                if not r.residual
            ]
            parts += [part for part in alone if part is not None]
            continue
        multiple = 1 if kind == "heads" else settings.multiple
        made = _part(kind, groups, scores, multiple)
        if kind == "width" and head_dim:
            made = _with_heads(cut, settings, groups, scores, head_dim)
        if made is not None:
            parts.append(made)
    return parts


def _part(name: str, groups: Any, scores: Any, multiple: int) -> Part | None:
    """Groups of one size that go down together; None where there is no step to take."""
    size = min(group.size for group in groups)
    per = tuple(group.size // size for group in groups)
    step = max(multiple, size // PARTS // multiple * multiple)
    if step >= size:
        return None
    return Part(name, tuple(groups), tuple(scores), per, step, size)


def _with_heads(
    cut: Cut, settings: Settings, groups: Any, scores: Any, head_dim: int
) -> Part | None:
    """The width and the heads that together are as wide."""
    also = cut.of_kind("heads")
    more = cut.scores(also, settings)
    count = also[0].size
    step = math.lcm(settings.multiple, head_dim) // head_dim
    if step >= count:
        return None
    per = (*[head_dim] * len(groups), *[1] * len(also))
    return Part("width", (*groups, *also), (*scores, *more), per, step, count)


def _search(
    parts: list[Part], influence: np.ndarray, cost: Costs, loss: Any, budget: float
) -> tuple[State, list[str]]:
    """Steps until the cost is within the budget, and what was done."""
    state = State(tuple(range(len(influence))), tuple(part.size for part in parts))
    full = now = cost(state)
    told = [f"{cost.of} {full:,}, loss {loss(state):.4f}"]
    while now > budget * full:
        found = []
        for text, new in _steps(parts, influence, state):
            saved = now - cost(new)
            if saved > 0:
                found.append(((loss(new) - loss(state)) / saved, text, new))
        if not found:
            raise InputError(
                f"budget {budget}: nothing is left to cut at {now / full:.3f} of the {cost.of}; "
                "allow more kinds, or a smaller multiple"
            )
        _, text, state = min(found, key=lambda row: row[0])
        now = cost(state)
        told.append(f"{text}: {now / full:.3f} of the {cost.of}, loss {loss(state):.4f}")
    return state, told


def _steps(parts: list[Part], influence: np.ndarray, state: State) -> Iterator[tuple[str, State]]:
    """Every next state, with its name."""
    for i, part in enumerate(parts):
        count = (state.counts[i] - 1) // part.step * part.step
        if count > 0:
            counts = (*state.counts[:i], count, *state.counts[i + 1 :])
            shown = f"{part.name} {state.counts[i]} -> {count}"
            yield shown, replace(state, counts=counts)
    if len(state.layers) > 1:
        order = sorted(state.layers, key=lambda layer: influence[layer])
        for layer in order[:LAYERS_TRIED]:
            layers = tuple(other for other in state.layers if other != layer)
            yield f"layer {layer} dropped", replace(state, layers=layers)


def _result(
    cut: Cut,
    calibration: Any,
    settings: Settings,
    wanted: set[str],
    parts: list[Part],
    state: State,
    notes: list[str],
) -> Model:
    """The layers that stay, then the groups, by scores of the network that is left."""
    model = cut.model
    shallow = bool(state.layers) and len(state.layers) < len(model.blocks.of(model.params))  # type: ignore[union-attr]
    if shallow:
        model = take_layers(model, state.layers)
        cut = Cut.of(model, data_of(model, calibration))
    cut.model = model.replace(notes=(*model.notes, *notes))
    if all(count == part.size for part, count in zip(parts, state.counts, strict=True)):
        return cut.model
    groups: list[Any] = []
    indices: list[np.ndarray] = []
    again = _parts(cut, settings, wanted) if shallow else parts
    for part, count in zip(again, state.counts, strict=True):
        if count < part.size:
            groups += part.groups
            indices += part.indices(count)
    return cut.result(groups, indices, settings, "shrink")
