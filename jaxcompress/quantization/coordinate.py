"""Coordinate descent from several starts: the best rounding known here for calibration data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.descent import search
from jaxcompress.layerwise.figures import or_nearest, record
from jaxcompress.layerwise.grid import Grid, grid_of, on_grid, parameters_of, stored


def coordinate(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    rounds: int = 3,
    damp: float = 0.01,
) -> CompressedArray:
    """Coordinate descent: codes and scales in turn, from several starts: the best rounding here.

    From GPTQ's codes (arXiv:2210.17323), at each of several scales, coordinate descent on the codes
    (QuantEase, arXiv:2309.01885; CDQuant, arXiv:2406.17542) and least squares of the group scales
    in turn; every row keeps its best. Symmetric integers also try scales below 0, whose range ends
    a step further on the other side. By default a matrix aims at the dense model's outputs from
    the inputs that the model compressed so far gives, matrix after matrix (`sequential`,
    `dense_target`), as GPTAQ (arXiv:2504.02692).

    Args:
      weight: float `[*lead, N, K]`, N rows by K contracted columns; its zeros stay.
      second_moment: X'X `[*lead, K, K]` of the inputs.
      dtype: the number format: see `rtn`.
      bits: of an integer, 1 to 8.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: of integers: fixed zero in the middle of the codes.
      rounds: of codes and scales in turn, of each start.
      damp: added to X'X, as a share of its mean diagonal.

    Returns:
      The quantized matrix, in the dims `[N, K]` with the dtype of `weight`; scales of float32
      weights are float16.

    Raises:
      InputError: an unknown format, or a group size that does not divide K.
    """
    matrix = dense(weight)
    grid: Any = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    if grid.own_scales and matrix.dtype == jnp.float32:
        grid = replace(grid, scale_bits=16)
    solver = _Search(grid, rounds, damp)
    (found, parameters, share), told = over_lead(solver, matrix, second_moment)
    record(**told)
    return stored(grid, found, parameters, share, matrix.dtype)


@dataclass(frozen=True)
class _Search:
    """`layerwise.descent.search` with its options, for one matrix and its second moment."""

    grid: Grid
    rounds: int
    damp: float

    def __call__(
        self, weight: Array, second_moment: Array
    ) -> tuple[tuple[Array, Any, Any], dict[str, Array]]:
        """Weight on the grid, parameters, and what they share; and figures of it."""
        known = parameters_of(self.grid, weight)
        found = search(
            weight, second_moment, known, grid=self.grid, rounds=self.rounds, damp=self.damp
        )
        nearest = on_grid(self.grid, weight, known[0]), known[0]
        result = found.weight, found.parameters
        *kept, told = or_nearest(weight, nearest, result, second_moment)
        return (*kept, known[1]), told
