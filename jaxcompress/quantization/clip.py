"""Ranges that are cut where the outputs gain by it: the rounding that goes with AWQ's scales."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.grid import Grid, by_group, grid_of

SHRINKS = 20  # steps of 5 % of the range; half of them are tried
SMALLEST = 0.5


def clip(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
) -> CompressedArray:
    """Round to nearest within the range of each group that errs least in the outputs.

    A group's weights, limited to +-c max|w|, choose the grid, and all of its weights go to the
    nearest values of that grid. Of c = 1, 0.95, ..., 0.5 the one with the least d' H d is taken, d
    the group's errors and H the second moments of its inputs: the output error of the group alone.

    Source: Lin et al., "AWQ", arXiv:2306.00978, section 5.1 (its weight clipping; there with
    outputs of a sample of tokens in place of the moments).

    Args:
      weight: `[*lead, N, K]`, N rows by K contracted columns.
      second_moment: H = X'X `[*lead, K, K]` of the inputs.
      dtype: number format, see `layerwise.grid.grid_of`.
      bits: bits of an integer weight.
      group_size: contracted columns that share a scale; -1: one scale per row.
      symmetric: fixed zero in the middle of the codes; otherwise a zero point per group.

    Returns:
      The quantized matrix in the dims `[N, K]`.

    Raises:
      InputError: no such format, or a group size that does not divide K.
    """
    grid = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    matrix = dense(weight)
    parameters, share = over_lead(_Clip(grid), matrix, second_moment)
    return grid.encode(matrix, parameters, share)


@dataclass(frozen=True)
class _Clip:
    """The search for one matrix."""

    grid: Grid

    def __call__(self, weight: Array, second_moment: Array) -> tuple[object, object]:
        """Parameters of every group, `[N, groups]`, and what they share."""
        share = self.grid.share(weight)
        groups = jnp.moveaxis(by_group(self.grid, weight), 1, 0)  # [groups, N, G]
        moments = _blocks(second_moment.astype(jnp.float32), groups.shape[0], groups.shape[2])

        def of_group(group: Array, moment: Array) -> object:
            largest = jnp.abs(group).max(-1, keepdims=True)

            def found(shrink: Array) -> tuple[Array, object]:
                limit = (largest * shrink).astype(group.dtype)
                parameters = self.grid.find(jnp.clip(group, -limit, limit), share)
                values = jax.vmap(self.grid.snap, (1, None), 1)(
                    group.astype(jnp.float32), parameters
                )
                error = values - group
                return ((error @ moment) * error).sum(-1), parameters

            count = int(SHRINKS * (1 - SMALLEST)) + 1
            losses, every = jax.lax.map(found, jnp.linspace(1.0, SMALLEST, count))
            best = losses.argmin(0)  # the widest of equal ones
            return jax.tree.map(lambda p: p[best, jnp.arange(p.shape[1])], every)

        made = jax.lax.map(lambda given: of_group(*given), (groups, moments))
        return jax.tree.map(lambda p: jnp.moveaxis(p, 0, 1), made), share


def _blocks(moment: Array, groups: int, width: int) -> Array:
    """The diagonal blocks `[groups, width, width]` of a moment, with zeros where columns lack."""
    lacking = groups * width - len(moment)
    whole = jnp.pad(moment, ((0, lacking), (0, lacking)))
    at = jnp.arange(groups)
    return whole.reshape(groups, width, groups, width)[at, :, at]
