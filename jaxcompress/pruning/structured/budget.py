"""What `shrink` weighs: parts that can become smaller, their cost, and the loss without them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxcompress.core.flops import flops
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.coupling import Group
from jaxcompress.core.readers.kept import KeptArrays, combine, masked
from jaxcompress.layerwise.losses import loss_of, mean_loss
from jaxcompress.pruning.depth import Walker, token_ids_of
from jaxcompress.pruning.structured.choice import best
from jaxcompress.pruning.structured.cutting import Cut
from jaxcompress.pruning.structured.data import Data
from jaxcompress.pruning.structured.importance import gate_gradients
from jaxcompress.pruning.structured.result import smaller_model
from jaxcompress.pruning.structured.roles import per_step

Cost = Literal["parameters", "flops"]


@dataclass(frozen=True)
class Part:
    """Groups whose counts go down together.

    Attributes:
      name: for notes.
      groups: whose indices go.
      scores: of each group.
      per: of each group, how many indices stay for one of the part's count.
      step: by how much the count goes down; what stays is a multiple of it.
      size: the count at the start.
    """

    name: str
    groups: tuple[Group, ...]
    scores: tuple[np.ndarray, ...]
    per: tuple[int, ...]
    step: int
    size: int

    def indices(self, count: int) -> list[np.ndarray]:
        """What stays of each group."""
        return [best(s, count * n) for s, n in zip(self.scores, self.per, strict=True)]


@dataclass(frozen=True)
class State:
    """Layers that stay, and the count of each part."""

    layers: tuple[int, ...]
    counts: tuple[int, ...]


def record(parts: Sequence[Part], state: State) -> KeptArrays:
    """What stays of the parts, in all layers."""
    return combine(
        *(
            group.keep(indices)
            for part, count in zip(parts, state.counts, strict=True)
            if count < part.size
            for group, indices in zip(part.groups, part.indices(count), strict=True)
        )
    )


def layer_of(path: str, blocks: Blocks) -> int | None:
    """The layer of a path where blocks stand one by one; -1: in all of them, stacked."""
    where = f"{blocks.where}/"
    if not path.startswith(where):
        return None
    first = path.removeprefix(where).split("/", 1)[0]
    return int(first) if first.isdigit() else -1


class Costs:
    """Parameters of a state, or operations of one chunk of the data."""

    def __init__(self, cut: Cut, parts: Sequence[Part], of: Cost) -> None:
        self.cut, self.parts, self.of = cut, parts, of
        self._flops: dict[tuple[int, ...], tuple[int, int]] = {}
        blocks = cut.model.blocks
        self.layers = 0 if blocks is None else len(blocks.of(cut.model.params))

    def __call__(self, state: State) -> int:
        """The cost."""
        if self.of == "parameters":
            return self._parameters(state)
        if state.counts not in self._flops:
            self._flops[state.counts] = self._operations(state)
        total, outside = self._flops[state.counts]
        if not state.layers:
            return total
        return outside + (total - outside) * len(state.layers) // self.layers

    def _parameters(self, state: State) -> int:
        kept, blocks = record(self.parts, state), self.cut.model.blocks
        total = 0
        for path, leaf in leaves_with_paths(self.cut.model.params):
            shape = list(leaf.shape)
            for axis, rows in kept.get(path, {}).items():
                shape[axis] = rows.shape[-1]
            if state.layers and blocks is not None:
                layer = layer_of(path, blocks)
                if layer == -1:
                    shape[0] = len(state.layers)
                elif layer is not None and layer not in state.layers:
                    continue
            total += math.prod(shape)
        return total

    def _operations(self, state: State) -> tuple[int, int]:
        """Of the whole with all layers, and of what is no layer."""
        model, kept = self.cut.model, record(self.parts, state)
        inputs = self.cut.seen.data.first
        if kept:
            model = _abstract(model, kept, inputs)
        total = flops(model.apply, model.params, *inputs).total
        if not state.layers:
            return total, 0
        # A function cut by its program has no blocks: those of the full size tell the share.
        whole = model if model.blocks is not None else self.cut.model
        outside = _outside(whole, inputs)
        if whole is not model:
            outside = outside * total // flops(whole.apply, whole.params, *inputs).total
        return total, outside


def _abstract(model: Model, kept: KeptArrays, inputs: tuple[Any, ...]) -> Model:
    """The smaller model, with shapes for parameters."""
    made: list[Model] = []

    def build(params: Any) -> Any:
        whole = model.replace(params=params)
        made.append(smaller_model(whole, params, kept, inputs, "config", (), checked=False))
        return made[-1].params

    params = jax.eval_shape(build, model.params)
    return made[-1].replace(params=params)


def _outside(model: Model, inputs: tuple[Any, ...]) -> int:
    """Operations of the embedding and the head."""
    blocks = model.blocks
    assert blocks is not None
    hidden = jax.eval_shape(blocks.embed, model.params, *inputs)
    first = flops(blocks.embed, model.params, *inputs).total
    return first + flops(blocks.head, model.params, hidden).total


class MeasuredLoss:
    """The mean loss on the calibration data, of the network with zeros in the place of what goes.

    A norm over the residual stream still divides by the full width there: where the width goes
    down, that is an estimate.
    """

    def __init__(self, cut: Cut, parts: Sequence[Part], data: Data, depth: bool) -> None:
        self.cut, self.parts, self.data = cut, parts, data
        self.walker = Walker(cut.model) if depth else None
        if self.walker is None:
            batches = data.batches()
            self.batches, self.loss = batches, jax.jit(loss_of(cut.model, batches[0]))
        else:
            ids = np.asarray(data.inputs[0])
            self.ids = token_ids_of(ids.reshape(-1, *ids.shape[2:]))
        self._known: dict[State, float] = {}

    def __call__(self, state: State) -> float:
        """The loss of a state."""
        if state not in self._known:
            params = masked(self.cut.model.params, record(self.parts, state))
            if self.walker is None:
                self._known[state] = mean_loss(self.loss, params, self.batches)
            else:
                self._known[state] = self.walker.mean_loss(params, state.layers, self.ids)
        return self._known[state]


class TaylorLoss:
    """The loss to first order: the gate gradients of all that goes, added up.

    A layer that goes counts with its heads, neurons and filters.
    """

    def __init__(self, cut: Cut, parts: Sequence[Part], depth: bool) -> None:
        self.cut, self.parts = cut, parts
        self.gates = [gate_gradients(cut.seen, part.groups) for part in parts]
        self.of_layer: Mapping[int, float] = self._layers() if depth else {}

    def __call__(self, state: State) -> float:
        """The estimate of the loss beyond that of the full network."""
        total = sum(loss for layer, loss in self.of_layer.items() if layer not in state.layers)
        for part, count, gates in zip(self.parts, state.counts, self.gates, strict=True):
            for gate, kept in zip(gates, part.indices(count), strict=True):
                total += float(gate.sum() - np.take_along_axis(gate, kept, -1).sum())
        return total

    def _layers(self) -> dict[int, float]:
        blocks = self.cut.model.blocks
        assert blocks is not None
        inside = ("heads", "neurons", "filters", "units")
        groups = [
            role.group
            for role in self.cut.roles
            if role.kind in inside and role.group.cuttable and not role.residual
        ]
        found: dict[int, float] = dict.fromkeys(range(len(blocks.of(self.cut.model.params))), 0.0)
        for group, gate in zip(groups, gate_gradients(self.cut.seen, groups), strict=True):
            layer = layer_of(group.members[0].path, blocks)
            if per_step(group):
                for step, own in enumerate(gate):
                    found[step] += float(own.sum())
            elif layer is not None and layer >= 0:
                found[layer] += float(gate.sum())
        return found
