"""The method `queries`: query heads go, the same number under each key head, each its own.

A group of coupled axes would take the same place under every key head. But the query heads that
share a key head may change places, which changes nothing; so the ones that stay are moved to the
front first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.decisions import tell
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import map_with_paths
from jaxcompress.core.readers.coupling import Group, Member
from jaxcompress.pruning.structured.choice import best, kept_count
from jaxcompress.pruning.structured.compensate import Compensate
from jaxcompress.pruning.structured.cutting import Cut, Settings
from jaxcompress.pruning.structured.data import data_of
from jaxcompress.pruning.structured.importance import Reduce, importance
from jaxcompress.pruning.structured.result import Form
from jaxcompress.pruning.structured.roles import per_step


class QueryHeads:
    """The query heads of one attention, each index a pair (key head, query head of it).

    It stands where a `Group` does in `importance`.

    Attributes:
      keys, queries: the two groups.
      members: where the queries stand.
      size: key heads times query heads of each.
      steps: of the scan that it lives in, else 0.
      positional: whether every step must keep the same.
    """

    def __init__(self, keys: Group, queries: Group) -> None:
        self.keys, self.queries = keys, queries
        self.members, self.size = queries.members, keys.size * queries.size
        self.steps, self.positional, self.name = queries.steps, queries.positional, queries.name
        if queries.positional:
            raise InputError(f"queries: {self.name} is told apart by its position; use heads")
        for member in self.members:
            self.labels(member)

    def labels(self, member: Member) -> np.ndarray:
        """The pair's index at every position of the member's axis, -1 where there is none."""
        own = self.queries.labels(member)
        of_keys = np.full(len(own), -1)
        for other in self.keys.members:
            if (other.path, other.axis) == (member.path, member.axis):
                of_keys = np.maximum(of_keys, self.keys.labels(other))
        if (of_keys[own >= 0] < 0).any():
            raise InputError(f"queries: {self.name} is shared by all key heads; use heads")
        return np.where(own >= 0, of_keys * self.queries.size + own, -1)

    def moved(self, order: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
        """Where each position of an axis comes from, once query heads stand in another order.

        Args:
          order: `[key heads, query heads]` or `[steps, ...]`: which query head comes where.

        Returns:
          `{path: {axis: source positions [size] or [steps, size]}}`.
        """
        out: dict[str, dict[int, np.ndarray]] = {}
        lead = order.shape[:-2]
        for member in self.members:
            labels = self.labels(member)
            at = np.flatnonzero(labels >= 0)
            key, query = np.divmod(labels[at], self.queries.size)
            along = out.setdefault(member.path, {})
            whole = np.broadcast_to(np.arange(len(labels)), (*lead, len(labels)))
            sources = along.setdefault(member.axis, whole.copy())
            sources[..., at] = at + (order[..., key, query] - query) * member.stride
        return out


def queries(
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
    random_seed: int = 0,
) -> Model:
    """Query heads go, as many under each key head; keys and values stay (grouped-query attention).

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), arXiv:2407.14679, section 2.2, whose heads of grouped-query models are these.

    Args:
      model: see `heads`, like the rest.
      calibration: inputs, where the score or the compensation needs them.
      sparsity: fraction removed of the query heads of each key head.
      score: as of `heads`, without the entropies.
      reduce: sum, mean, max or l2.
      multiple: what stays under each key head is a multiple of it.
      minimum: the least that stay under each key head.
      compensate: "none", "bias" or "refit".
      form: "config" or "function".
      random_seed: of the score random.
    """
    settings = Settings(
        sparsity, score, reduce, multiple, minimum, "uniform", compensate, form, random_seed
    )
    data = data_of(model, calibration)
    cut = Cut.of(model, data)
    pairs = _pairs(cut)
    if score.startswith("entropy"):
        raise InputError(f"queries: score {score} is of the heads of one key; use heads")
    found = importance(cut.seen, cut.groups, pairs, score, reduce, random_seed)  # type: ignore[arg-type]
    kept, sources = [], []
    for pair, scores in zip(pairs, found, strict=True):
        scores = scores.reshape(*scores.shape[:-1], pair.keys.size, pair.queries.size)
        count = kept_count(pair.queries.size, sparsity, multiple, minimum)
        first = best(scores, count)
        stays = np.zeros(scores.shape, bool)
        np.put_along_axis(stays, first, True, axis=-1)
        flat = scores.reshape(-1, scores.shape[-2] * scores.shape[-1])
        tell("queries", pair.queries.name, score, flat, stays.reshape(flat.shape))
        rest = _others(first, pair.queries.size)
        sources.append(pair.moved(np.concatenate([first, rest], axis=-1)))
        kept.append(np.arange(count))
    cut = Cut.of(model.replace(params=_rearranged(model.params, sources)), data)
    again = _pairs(cut)
    indices = [
        np.stack([own] * pair.steps) if per_step(pair.queries) else own
        for pair, own in zip(again, kept, strict=True)
    ]
    return cut.result([pair.queries for pair in again], indices, settings, "queries")


def _others(first: np.ndarray, size: int) -> np.ndarray:
    """The indices below `size` that are not in `first`, along the last axis."""
    inside = np.zeros((*first.shape[:-1], size), bool)
    np.put_along_axis(inside, first, True, axis=-1)
    order = np.argsort(inside, axis=-1, kind="stable")
    return order[..., : size - first.shape[-1]]


def _pairs(cut: Cut) -> list[QueryHeads]:
    """The query heads of every attention, each with its key heads."""
    keys = [r.group for r in cut.roles if r.kind == "heads" and r.group.cuttable]
    out = []
    for group in cut.of_kind("queries"):
        mine = {(m.path, m.axis) for m in group.members}
        own = [k for k in keys if mine & {(m.path, m.axis) for m in k.members}]
        if len(own) != 1:
            raise InputError(f"queries: {group.name} has no key heads of its own; use heads")
        out.append(QueryHeads(own[0], group))
    return out


def _after(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(first.shape, then.shape)
    return np.take_along_axis(np.broadcast_to(first, shape), np.broadcast_to(then, shape), -1)


def _rearranged(params: Any, sources: Sequence[dict[str, dict[int, np.ndarray]]]) -> Any:
    by_path: dict[str, dict[int, np.ndarray]] = {}
    for source in sources:
        for path, axes in source.items():
            known = by_path.setdefault(path, {})
            for axis, places in axes.items():  # two attentions in one weight: one after the other
                known[axis] = _after(known[axis], places) if axis in known else places

    def move(path: str, leaf: Any) -> Any:
        for axis, places in by_path.get(path, {}).items():
            leaf = jnp.asarray(dense(leaf))
            if places.ndim == 1:
                leaf = jnp.take(leaf, places, axis=axis)
            else:
                shape = [1] * leaf.ndim
                shape[0], shape[axis] = places.shape
                leaf = jnp.take_along_axis(leaf, places.reshape(shape), axis=axis)
        return leaf

    return map_with_paths(move, params)
