"""L1 and group lasso: what pays least is pulled to exactly 0 while the network trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.coupling import coupling
from jaxcompress.pruning.patterns import parse_block
from jaxcompress.pruning.schedules.masked import masked, removing
from jaxcompress.pruning.schedules.targets import Targets, at_targets, matrices_of
from jaxcompress.pruning.structured.roles import per_step, roles

Shrink = Callable[[Any, Array], Any]  # parameters and a threshold to parameters


class ProximalState(NamedTuple):
    """State of `proximal`: steps taken, and that of the optimizer."""

    step: Array
    inner: Any


def proximal(
    inner: optax.GradientTransformation,
    where: Targets,
    shrink: Shrink,
    *,
    strength: float,
    rate: optax.Schedule,
) -> optax.GradientTransformation:
    """The optimizer, each of whose steps is followed by the proximal operator of a penalty.

    w <- prox_{rate * strength * penalty}(w + update), which gives exact zeros where a subgradient
    would give small numbers. Matrices that have zeros already keep them.

    Source: Parikh and Boyd, "Proximal Algorithms", section 4.2.

    Args:
      inner: the optimizer.
      where: what the penalty is of.
      shrink: the proximal operator: `soft_threshold`, `group_threshold` or `coupled_threshold`.
      strength: of the penalty.
      rate: learning rate of each step.

    Raises:
      InputError: a negative strength.
    """
    if strength < 0:
        raise InputError(f"strength {strength}: must be 0 or more")

    def init(params: Any) -> ProximalState:
        return ProximalState(jnp.int32(0), inner.init(params))

    def update(gradients: Any, state: ProximalState, params: Any = None) -> tuple[Any, Any]:
        updates, moments = inner.update(gradients, state.inner, params)
        moved = optax.apply_updates(params, updates)
        shrunk = shrink(moved, strength * jnp.asarray(rate(state.step)))
        back = jax.tree.map(lambda u, m, s: u + (s - m), updates, moved, shrunk)
        kept = map_with_paths(
            lambda path, x: x != 0 if path in where else jax.tree.map(lambda _: jnp.bool_(True), x),
            shrunk,
        )
        return removing(kept, back, params), ProximalState(state.step + 1, moments)

    return masked(optax.GradientTransformation(init, update), where)


def soft_threshold(where: Targets) -> Shrink:
    """The operator of sum |w|: sign(w) max(|w| - t, 0)."""

    def shrink(params: Any, threshold: Array) -> Any:
        return at_targets(
            params, where, lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0)
        )

    return shrink


def group_threshold(where: Targets, groups: str) -> Shrink:
    """The operator of sum sqrt(size of g) ||w_g||: w_g max(1 - t sqrt(size) / ||w_g||, 0).

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables",
    2006; on networks: Wen et al., arXiv:1608.03665, section 3.

    Args:
      where: the matrices.
      groups: "rows" (all that makes one output), "columns" (all that one input is multiplied by)
        or `block:RxC`.

    Raises:
      InputError: none of these.
    """
    if groups not in ("rows", "columns") and not re.fullmatch(r"block:\d+x\d+", groups):
        raise InputError(f"groups {groups!r}: use rows, columns, block:RxC or coupling")

    def shrink(params: Any, threshold: Array) -> Any:
        return at_targets(params, where, lambda w: w * _factors(w, threshold, groups))

    return shrink


def _factors(weight: Array, threshold: Array, groups: str) -> Array:
    """By what each weight is multiplied."""
    *lead, n, k = weight.shape
    blocks = {"rows": (1, k), "columns": (n, 1)}.get(groups) or parse_block(groups)
    assert blocks is not None
    r, c = blocks
    if n % r or k % c:
        raise InputError(f"groups {groups}: do not divide a matrix of {n} x {k}")
    squares = jnp.square(weight).reshape(*lead, n // r, r, k // c, c).sum((-3, -1))
    factors = _factor(squares, threshold * (r * c) ** 0.5)
    return jnp.repeat(jnp.repeat(factors, r, -2), c, -1)


def _factor(squares: Array, threshold: Array) -> Array:
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.maximum(1 - threshold / jnp.sqrt(jnp.maximum(squares, tiny)), 0)


class _Place(NamedTuple):
    """Where a coupled group stands in one matrix."""

    axis: int
    labels: np.ndarray  # the group's index at each position of the axis, -1 where there is none


class _Coupled(NamedTuple):
    """Indices of coupled axes that go together, and the weights at each of them."""

    size: int
    steps: int  # of a scan, whose steps may lose other indices; 0 where there is none
    places: dict[str, list[_Place]]
    entries: np.ndarray  # how many weights belong to an index


def coupled_threshold(where: Targets, model: Model, *inputs: Any) -> Shrink:
    """As `group_threshold`, of groups that a structured cut removes as one.

    All weights that make or read a neuron, a filter, a unit or a head, in whatever matrices they
    lie, are one group; the residual stream is none. A weight that lies in two groups is pulled by
    both, one after the other.

    Args:
      where: the matrices whose weights count.
      model: whose axes are coupled.
      *inputs: that it takes, arrays or shapes.

    Raises:
      InputError: the model has no such group.
    """
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(model.params) if path in where}
    found = roles(coupling(model.apply)(model.params, *inputs))
    groups = [
        _coupled(role.group, shapes) for role in found if role.group.cuttable and not role.residual
    ]
    groups = [group for group in groups if group.places]
    if not groups:
        raise InputError("groups coupling: the model has no axes that can be cut; use rows")

    def shrink(params: Any, threshold: Array) -> Any:
        weights = {path: leaf for path, leaf in leaves_with_paths(params) if path in where}
        for group in groups:
            weights |= _pulled(group, weights, threshold)
        return map_with_paths(lambda path, leaf: weights.get(path, leaf), params)

    return shrink


def _coupled(group: Any, shapes: dict[str, tuple[int, ...]]) -> _Coupled:
    steps = group.steps if per_step(group) else 0
    places: dict[str, list[_Place]] = {}
    entries = np.zeros(group.size)
    for member in group.members:
        if member.path not in shapes:
            continue
        labels = group.labels(member)
        shape = shapes[member.path]
        places.setdefault(member.path, []).append(_Place(member.axis, labels))
        each = int(np.prod(shape)) // shape[member.axis] // max(steps, 1)
        np.add.at(entries, labels[labels >= 0], each)
    return _Coupled(group.size, steps, places, entries)


def _pulled(group: _Coupled, weights: dict[str, Array], threshold: Array) -> dict[str, Array]:
    """The weights of one group, pulled towards 0."""
    squares = jnp.zeros((max(group.steps, 1), group.size))
    mine = [(p, place) for p in group.places if p in weights for place in group.places[p]]
    for path, place in mine:
        rows = _by_index(jnp.square(weights[path]), place.axis, group.steps)
        squares = squares.at[:, np.maximum(place.labels, 0)].add(
            jnp.where(place.labels >= 0, rows, 0)
        )
    factors = _factor(squares, threshold * jnp.sqrt(jnp.asarray(group.entries, jnp.float32)))
    out: dict[str, Array] = {}
    for path, place in mine:
        weight = out.get(path, weights[path])
        by_position = jnp.where(place.labels >= 0, factors[:, np.maximum(place.labels, 0)], 1)
        shape = [1] * weight.ndim
        shape[place.axis] = weight.shape[place.axis]
        if group.steps:
            shape[0] = group.steps
        out[path] = weight * by_position.reshape(shape)
    return out


def _by_index(x: Array, axis: int, steps: int) -> Array:
    """Sums `[steps or 1, positions of the axis]` over all other axes."""
    rest = tuple(i for i in range(x.ndim) if i != axis and not (steps and i == 0))
    found = x.sum(rest)
    return found if steps else found[None]


def zeros_told(params: Any, where: Targets) -> list[str]:
    """What became 0, a line for each matrix: `w: 41.0% zero, 3 of 8 rows, 0 of 16 columns`."""
    told = []
    for path, matrix in matrices_of(params, where).items():
        live = np.asarray(matrix != 0)
        rows, columns = live.any(-1), live.any(-2)
        told.append(
            f"{path}: {1 - live.mean():.1%} zero, {(~rows).sum()} of {rows.size} rows, "
            f"{(~columns).sum()} of {columns.size} columns"
        )
    return told
