"""Better codes and scales than the greedy ones: column after column again, and least squares.

Minimizes tr((Q - W) H (Q - W)') over Q on a grid, from any Q. A weight at a time, exactly, the
others as they are: coordinate descent on the codes (Behdin et al., "QuantEase",
arXiv:2309.01885, section 3; Nair and Suggala, "CDQuant", arXiv:2406.17542, algorithm 1). The codes
given, the scales of a row's groups are a least squares problem of their own. Rows are independent.
What is 0 in W stays 0: a pruned matrix keeps its mask.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array
from jaxcompress.layerwise.factor import without_dead
from jaxcompress.layerwise.grid import Grid, group_width, on_grid
from jaxcompress.layerwise.refit import squared_error
from jaxcompress.layerwise.solver import solve

PANEL = 128  # columns between two updates of the gradient of all others
SCALE_STEPS = 16  # of conjugate gradients, for the scales of a row


class Descended(NamedTuple):
    """A matrix on a grid.

    Attributes:
      weight: float32 `[N, K]`.
      parameters: of the grid, each leaf `[N, groups]`.
      before: float32 `[N]`, the error of every row as it came.
      after: the error now, alike; never larger.
    """

    weight: Array
    parameters: Any
    before: Array
    after: Array


@partial(jax.jit, static_argnames=("grid", "rounds"))
def descend(
    weight: Array,
    start: Array,
    parameters: Any,
    second_moment: Array,
    *,
    grid: Grid,
    rounds: int = 3,
    damp: float | Array = 0.01,
) -> Descended:
    """Improves codes and scales of every row.

    Args:
      weight: W, `[N, K]`: what the products should have been made with; its zeros stay.
      start: `[N, K]`, on the grid.
      parameters: of its groups, each leaf `[N, groups]`.
      second_moment: H = X'X `[K, K]` of the inputs, in any scale.
      grid: the values that are allowed.
      rounds: of descent on the codes and least squares of the scales, in turn.
      damp: fraction of the mean of H's diagonal that is added to it.
    """
    with jax.default_matmul_precision("highest"):
        weight, moment = weight.astype(jnp.float32), damped(second_moment, damp)
        start = start.astype(jnp.float32)
        before = squared_error(weight, start, moment)

        def turn(_: Array, best: tuple[Array, Any, Array]) -> tuple[Array, Any, Array]:
            found = _recode(grid, weight, best[0], best[1], moment)
            best = _better(best, (found, best[1], squared_error(weight, found, moment)))
            found, scaled = _rescale(grid, weight, best[0], best[1], moment)
            return _better(best, (found, scaled, squared_error(weight, found, moment)))

        found, parameters, after = lax.fori_loop(0, rounds, turn, (start, parameters, before))
        return Descended(found, parameters, before, after)


@partial(jax.jit, static_argnames=("grid", "rounds"))
def search(
    weight: Array,
    second_moment: Array,
    parameters: tuple[Any, Any],
    *,
    grid: Grid,
    rounds: int = 3,
    damp: float | Array = 0.01,
) -> Descended:
    """Codes and scales from nothing: the best of several starts of every row.

    Each start is the column solver's with other scales, those of the weights times one of
    `grid.shrinks`, and goes down by `descend`.

    Args:
      weight: W, `[N, K]`; its zeros stay.
      second_moment: H = X'X `[K, K]` of the inputs, in any scale.
      parameters: of the weights' own range, as `grid.parameters_of` gives them.
      grid: the values that are allowed; static.
      rounds: of `descend`.
      damp: fraction of the mean of H's diagonal that is added to it.

    Returns:
      What was found; `before` is the error of the column solver with the weights' own range.
    """
    own, share = parameters

    def attempt(shrink: Array) -> Descended:
        scaled = grid.rescaled(own, jnp.full(_groups_of(own), shrink))
        first = solve(
            weight,
            second_moment,
            grid=grid,
            parameters=(scaled, share),
            keep=weight != 0,
            act_order=True,
            damp=damp,
        )
        return descend(
            weight, first.weight, scaled, second_moment, grid=grid, rounds=rounds, damp=damp
        )

    def step(best: Descended, shrink: Array) -> tuple[Descended, None]:
        found = attempt(shrink)
        kept = _better(
            (best.weight, best.parameters, best.after),
            (found.weight, found.parameters, found.after),
        )
        return Descended(kept[0], kept[1], best.before, kept[2]), None

    best = attempt(jnp.float32(grid.shrinks[0]))
    return lax.scan(step, best, jnp.float32(grid.shrinks[1:]))[0]


def damped(second_moment: Array, damp: float | Array) -> Array:
    """A second moment with some of its mean diagonal added; inputs never seen weigh the mean."""
    moment, _ = without_dead(second_moment)
    return moment + damp * jnp.mean(jnp.diagonal(moment)) * jnp.eye(len(moment))


def _groups_of(parameters: Any) -> tuple[int, ...]:
    return jax.tree.leaves(parameters)[0].shape


def _better(
    best: tuple[Array, Any, Array], found: tuple[Array, Any, Array]
) -> tuple[Array, Any, Array]:
    """Of every row the one with the smaller error."""
    better = found[2] < best[2]
    return jax.tree.map(
        lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), b, a), best, found
    )


def _recode(grid: Grid, weight: Array, start: Array, parameters: Any, moment: Array) -> Array:
    """One sweep over the columns, each at the grid's values nearest to the row's optimum.

    Transposed inside, `[K, N]`: a column is contiguous.
    """
    columns = weight.shape[1]
    pad = -columns % PANEL
    group = jnp.arange(columns + pad) // group_width(grid, columns)
    by_group = jax.tree.map(jnp.transpose, parameters)
    weight = jnp.pad(weight.T, ((0, pad), (0, 0)))
    moment = jnp.pad(moment, ((0, pad), (0, pad)))
    moment = moment + jnp.diag((jnp.arange(columns + pad) >= columns).astype(moment.dtype))

    def panel(index: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        found, pull = state  # Q and H (Q - W)
        at = index * PANEL
        square = lax.dynamic_slice(moment, (at, at), (PANEL, PANEL))
        given = lax.dynamic_slice_in_dim(found, at, PANEL)
        here = lax.dynamic_slice_in_dim(pull, at, PANEL)

        def column(i: Array, inside: tuple[Array, Array]) -> tuple[Array, Array]:
            values, slope = inside
            wanted = values[i] - slope[i] / square[i, i]
            # Padded columns have no group of their own: the index clamps to the last.
            of_column = jax.tree.map(lambda leaf: leaf[group[at + i]], by_group)
            new = grid.snap(wanted, of_column).astype(values.dtype)
            new = jnp.where(weight[at + i] == 0, 0, new)
            slope = slope + square[i][:, None] * (new - values[i])
            return values.at[i].set(new), slope

        values, _ = lax.fori_loop(0, PANEL, column, (given, here))
        beside = lax.dynamic_slice_in_dim(moment, at, PANEL, axis=1)
        pull = pull + beside @ (values - given)
        return lax.dynamic_update_slice_in_dim(found, values, at, 0), pull

    found = jnp.pad(start.T, ((0, pad), (0, 0)))
    pull = moment @ (found - weight)
    found, _ = lax.fori_loop(0, (columns + pad) // PANEL, panel, (found, pull))
    return found[:columns].T


def _rescale(
    grid: Grid, weight: Array, found: Array, parameters: Any, moment: Array
) -> tuple[Array, Any]:
    """The codes as they are, the scale of every group by least squares of its row.

    Conjugate gradients on the groups' factors a, for which the row is sum_g a_g Q_g.
    """
    rows, columns = weight.shape
    width = group_width(grid, columns)
    groups = -(-columns // width)

    def sums(product: Array) -> Array:  # [N, K] to [N, groups]
        whole = jnp.pad(product, ((0, 0), (0, groups * width - columns)))
        return whole.reshape(rows, groups, width).sum(-1)

    def spread(factor: Array) -> Array:  # [N, groups] to [N, K]
        return jnp.repeat(factor, width, axis=1)[:, :columns]

    def curvature(factor: Array) -> Array:
        return sums(((spread(factor) * found) @ moment) * found)

    blocks = jnp.pad(moment, (0, groups * width - columns)).reshape(groups, width, groups, width)
    each = jnp.arange(groups)
    inside = blocks[each, :, each]
    by_group = jnp.pad(found, ((0, 0), (0, groups * width - columns)))
    by_group = by_group.reshape(rows, groups, width)
    diagonal = jnp.einsum("rgk,gkl,rgl->rg", by_group, inside, by_group)
    inverse = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)

    def step(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        change, residual, direction, power = state
        product = curvature(direction)
        length = _ratio(power, (direction * product).sum(-1))[:, None]
        residual = residual - length * product
        next_power = (residual * residual * inverse).sum(-1)
        turned = residual * inverse + _ratio(next_power, power)[:, None] * direction
        return change + length * direction, residual, turned, next_power

    residual = sums(((weight - found) @ moment) * found)
    direction = residual * inverse
    start = (jnp.zeros_like(residual), residual, direction, (residual * direction).sum(-1))
    factor = 1 + lax.fori_loop(0, SCALE_STEPS, step, start)[0]
    factor = jnp.where(factor > 0.25, factor, 1)
    scaled = grid.rescaled(parameters, factor)
    return on_grid(grid, found * spread(factor), scaled), scaled


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
