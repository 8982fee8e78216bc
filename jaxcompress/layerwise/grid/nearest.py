"""Rounding a matrix to a grid, group by group."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray
from jaxcompress.layerwise.grid.base import Grid


def nearest(grid: Grid, matrix: Array) -> CompressedArray:
    """Every weight at the grid's nearest value, the parameters from the weights themselves.

    Args:
      grid: see `grid_of`.
      matrix: float `[*lead, N, K]`.

    Returns:
      The stored matrix, in the dims `[N, K]` with the dtype of `matrix`.

    Raises:
      InputError: the group size does not divide K.
    """
    parameters, share = parameters_of(grid, matrix)
    return grid.encode(matrix, parameters, share)


def on_grid(grid: Grid, matrix: Array, parameters: Any = None) -> Array:
    """The values of `nearest`, float32 `[*lead, N, K]`.

    Args:
      grid: see `grid_of`.
      matrix: float `[*lead, N, K]`.
      parameters: of the groups, each `[*lead, N, groups]`; None: from the weights themselves.
    """
    matrix = matrix.astype(jnp.float32)
    if parameters is None:
        parameters, _ = parameters_of(grid, matrix)
    columns = matrix.shape[-1]
    width = group_width(grid, columns)

    def spread(parameter: Array) -> Array:
        return jnp.repeat(parameter, width, axis=-1)[..., :columns].reshape(-1)

    return grid.snap(matrix.reshape(-1), jax.tree.map(spread, parameters)).reshape(matrix.shape)


@partial(jax.jit, static_argnums=(0, 4))
def stored(grid: Grid, weight: Array, parameters: Any, share: Any, dtype: Any) -> CompressedArray:
    """`grid.encode` of a float32 solution, as an array of `dtype`.

    Args:
      grid: on which the weight lies.
      weight: float32 `[*lead, N, K]`.
      parameters: each `[*lead, N, groups]`.
      share: what the groups share.
      dtype: of the array that it stands for.
    """
    made = grid.encode(weight, parameters, share)
    return made.replace(casts=(*made.casts, str(dtype)))


def parameters_of(grid: Grid, matrix: Array) -> tuple[Any, Any]:
    """The parameters of every group, each `[*lead, N, groups]`, and what the groups share.

    Args:
      grid: see `grid_of`.
      matrix: float `[*lead, N, K]`.
    """
    find = partial(_parameters, grid)
    for _ in matrix.shape[:-2]:
        find = jax.vmap(find)
    return find(matrix)


def _parameters(grid: Grid, matrix: Array) -> tuple[Any, Any]:
    share = grid.share(matrix)
    found = jax.vmap(lambda group: grid.find(group, share), 1, -1)
    return found(by_group(grid, matrix)), share


def by_group(grid: Grid, matrix: Array) -> Array:
    """`[N, groups, columns of a group]`; a group that lacks columns is filled up with zeros."""
    rows, columns = matrix.shape
    width = group_width(grid, columns)
    whole = jnp.pad(matrix, ((0, 0), (0, -columns % width)))
    return whole.reshape(rows, -1, width)


def group_width(grid: Grid, columns: int) -> int:
    """Columns of a group, of so many in all; the last group may have fewer.

    Raises:
      InputError: the group size does not divide them.
    """
    groups = grid.groups(columns)
    return columns if grid.group_size is None or groups == 1 else grid.group_size
