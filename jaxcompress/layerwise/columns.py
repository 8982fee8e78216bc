"""The loops of the column solver: panels, strips of a panel, columns of a strip. See `solver`.

Arrays are transposed here, `[K, N]`, so that a column of the stored matrix is contiguous. What a
loop starts with is made like an array that it works on, to vary over a mesh as that does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array
from jaxcompress.layerwise.factor import Factor
from jaxcompress.layerwise.grid import Grid
from jaxcompress.layerwise.lowest import lowest, lowest_rows

SMALL_GROUP = 32  # updated groups up to this size are a strip each, larger ones a panel each


@dataclass(frozen=True)
class Plan:
    """What is known before any array is: a static argument.

    Attributes:
      columns: K.
      panel: columns of a panel, a multiple of `strip`.
      strip: columns of a strip, a multiple of m.
      grid: see `solve`.
      group: columns of a group; K where all share parameters, or without a grid.
      n_m: see `solve`.
      act_order: see `solve`.
    """

    columns: int
    panel: int
    strip: int
    grid: Grid | None
    group: int
    n_m: tuple[int, int] | None
    act_order: bool

    @property
    def panels(self) -> int:
        return -(-self.columns // self.panel)

    @property
    def pad(self) -> int:
        return self.panels * self.panel - self.columns

    @property
    def finds_at(self) -> int:
        """Columns after which the loop finds a group's parameters; 0: all are known before."""
        on_the_way = self.grid is not None and self.grid.group_size and not self.grid.static
        return self.group if on_the_way else 0


class Problem(NamedTuple):
    """What the loops read: columns in the order of the walk, padded to whole panels.

    Attributes:
      weight: `[padded K, N]`.
      keep: bool `[padded K, N]`, or None.
      quota: uint32 `[panels]`, entries that go in each panel; or None.
      group: int32 `[padded K]`, the group of each column.
      factor: of the second moment.
      share: of the grid, what its groups have in common.
    """

    weight: Array
    keep: Array | None
    quota: Array | None
    group: Array
    factor: Factor
    share: Any


class State(NamedTuple):
    """What the loop over the panels carries.

    Attributes:
      result: Q so far, `[padded K, N]`.
      change: D = W - Q so far.
      gone: bool `[padded K, N]`, entries removed; or None.
      parameters: of the grid, every leaf `[groups, N]`.
    """

    result: Array
    change: Array
    gone: Array | None
    parameters: Any


def solve_panel(plan: Plan, problem: Problem, index: Array, state: State) -> State:
    """One panel of columns: its weights as the columns before have left them, then its strips."""
    start = index * plan.panel
    upper = problem.factor.inverses[index]
    given = _cut(problem.weight, start, plan.panel)
    weight = given + upper.T @ _pushed(plan, problem, state.change, index)
    parameters = state.parameters
    if plan.finds_at > SMALL_GROUP:
        parameters = _found(plan, parameters, problem.share, weight, index)
    gone = _chosen(plan, problem, weight, index)
    inside = _Inside(jnp.zeros_like(weight), weight, gone, parameters)
    strips = plan.panel // plan.strip
    inside = lax.fori_loop(0, strips, partial(_strip, plan, problem, upper, start), inside)
    return State(
        _put(state.result, inside.weight, start),
        _put(state.change, given - inside.weight, start),
        None if state.gone is None else _put(state.gone, inside.gone, start),
        inside.parameters,
    )


def _pushed(plan: Plan, problem: Problem, change: Array, index: Array) -> Array:
    """R_<s,s' D_<s', `[P, N]`, panel by panel: the columns that follow have changed nothing yet."""

    def add(j: Array, total: Array) -> Array:
        at = (j * plan.panel, index * plan.panel)
        beside = lax.dynamic_slice(problem.factor.upper, at, (plan.panel, plan.panel))
        return total + beside.T @ _cut(change, j * plan.panel, plan.panel)

    nothing = jnp.zeros_like(change, shape=(plan.panel, change.shape[1]))
    return lax.fori_loop(0, index, add, nothing)


def _chosen(plan: Plan, problem: Problem, weight: Array, index: Array) -> Array | None:
    """The entries of a panel that go, bool `[P, N]`, as far as they are chosen at its start."""
    if problem.keep is not None:
        return ~_cut(problem.keep, index * plan.panel, plan.panel)
    if problem.quota is not None:
        real = jnp.arange(plan.panel) + index * plan.panel < plan.columns
        scores = _saliency(weight, jnp.diagonal(problem.factor.inverses[index]))
        scores = jnp.where(real[:, None], scores, jnp.inf)
        return lowest(scores, problem.quota[index].astype(jnp.int32))
    return jnp.zeros_like(weight, bool) if plan.n_m else None


def _saliency(weight: Array, diagonal: Array) -> Array:
    """Square root of the error that removing an entry makes, w^2 / inv(H)_ii; `[columns, N]`."""
    return jnp.abs(weight / diagonal[:, None])


class _Inside(NamedTuple):
    """What the loop over the strips of a panel carries.

    Attributes:
      error: E of the strips done, `[P, N]`, zero ahead.
      weight: Q of the strips done, V as the panel found it ahead, `[P, N]`.
      gone: bool `[P, N]`, or None.
      parameters: of the grid.
    """

    error: Array
    weight: Array
    gone: Array | None
    parameters: Any


def _strip(
    plan: Plan, problem: Problem, upper: Array, start: Array, index: Array, inside: _Inside
) -> _Inside:
    """One strip of columns: the errors of those before it in the panel, then column by column."""
    at = index * plan.strip
    pushed = lax.dynamic_slice(upper, (0, at), (plan.panel, plan.strip)).T @ inside.error
    weight = _cut(inside.weight, at, plan.strip) - pushed
    upper = lax.dynamic_slice(upper, (at, at), (plan.strip, plan.strip))
    gone = None if inside.gone is None else _cut(inside.gone, at, plan.strip)
    parameters = inside.parameters
    if 0 < plan.finds_at <= SMALL_GROUP:
        parameters = _found(plan, parameters, problem.share, weight, (start + at) // plan.finds_at)
    group = lax.dynamic_slice_in_dim(problem.group, start + at, plan.strip)
    column = partial(_column, plan, upper, group, parameters)
    state = (weight, jnp.zeros_like(weight), gone)
    weight, error, gone = lax.fori_loop(0, plan.strip, column, state)
    return _Inside(
        _put(inside.error, error, at),
        _put(inside.weight, weight, at),
        None if inside.gone is None else _put(inside.gone, gone, at),
        parameters,
    )


def _column(
    plan: Plan,
    upper: Array,
    group: Array,
    parameters: Any,
    i: Array,
    state: tuple[Array, Array, Array | None],
) -> tuple[Array, Array, Array | None]:
    """The papers' step: one column gets its final values, those that follow make up for it."""
    weight, error, gone = state
    if plan.n_m and gone is not None:
        gone = lax.cond(
            i % plan.n_m[1] == 0,
            partial(_choose_run, plan.n_m, upper, i),
            lambda _, gone: gone,
            weight,
            gone,
        )
    before = weight[i]
    after = before
    if plan.grid is not None:
        after = plan.grid.snap(before, jax.tree.map(lambda leaf: leaf[group[i]], parameters))
    if gone is not None:
        after = jnp.where(gone[i], 0, after)
    scaled = (before - after) / upper[i, i]
    here = jnp.arange(plan.strip)[:, None] == i
    weight = jnp.where(here, after, weight - upper[i][:, None] * scaled)
    return weight, error.at[i].set(scaled), gone


def _choose_run(
    n_m: tuple[int, int], upper: Array, start: Array, weight: Array, gone: Array
) -> Array:
    """The m - n entries that go of the run that starts here, in every row."""
    n, m = n_m
    scores = _saliency(_cut(weight, start, m), _cut(jnp.diagonal(upper), start, m))
    return _put(gone, lowest_rows(scores, m - n), start)


def _found(plan: Plan, parameters: Any, share: Any, weight: Array, index: Array) -> Any:
    """`parameters` with those of group `index`, from its weights `[G, N]` as they are now."""
    assert plan.grid is not None
    found = plan.grid.find(weight.T, share)
    # Columns that fill up the last panel have no group.
    return jax.tree.map(lambda all_, one: all_.at[index].set(one, mode="drop"), parameters, found)


def _cut(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _put(x: Array, part: Array | None, start: Array) -> Array:
    assert part is not None
    return lax.dynamic_update_slice_in_dim(x, part, start, 0)
