"""GPTQ: weights are rounded column after column, and those that follow make up for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.layerwise import solve
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.descent import descend
from jaxcompress.layerwise.figures import or_nearest, record
from jaxcompress.layerwise.grid import Grid, Range, grid_of, on_grid, parameters_of, stored


def gptq(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    range: Range = "minmax",  # noqa: A002 (the field's word)
    scales: Literal["static", "updated"] = "static",
    act_order: bool | None = None,
    damp: float = 0.01,
    rounds: int = 0,
    scale_bits: int = 0,
) -> CompressedArray:
    """GPTQ: round column by column, the columns that follow make up for it.

    Source: Frantar et al., "GPTQ", arXiv:2210.17323, algorithm 1; with `rounds`, coordinate
    descent on its codes and least squares of its scales (QuantEase, arXiv:2309.01885).

    Args:
      weight: float `[*lead, N, K]`, N rows by K contracted columns; its zeros stay.
      second_moment: X'X `[*lead, K, K]` of the inputs.
      dtype: the number format: see `rtn`.
      bits: of an integer, 1 to 8.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: of integers: fixed zero in the middle of the codes.
      range: "minmax", "percentile" or "mse": see `rtn`.
      scales: "static": found from the weights as they are; "updated": from what the columns before
        have made of them.
      act_order: go through the columns by falling activation; by default where scales are static.
      damp: added to X'X, as a share of its mean diagonal; grows until X'X can be factored.
      rounds: of coordinate descent afterwards.
      scale_bits: 16: scales are stored as float16; 0: in the dtype of the weights.

    Returns:
      The quantized matrix, in the dims `[N, K]` with the dtype of `weight`.

    Raises:
      InputError: an unknown format, or a group size that does not divide K.
    """
    matrix = dense(weight)
    grid = grid_of(
        dtype,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        range=range,
        static=scales == "static",
        scale_bits=scale_bits,
    )
    order = grid.static if act_order is None else act_order
    solver = Columns(grid, order, damp, rounds)
    (found, parameters, share), told = over_lead(solver, matrix, second_moment)
    record(**told)
    return stored(grid, found, parameters, share, matrix.dtype)


@dataclass(frozen=True)
class Columns:
    """The column solver and the descent behind it, for one matrix."""

    grid: Grid
    act_order: bool
    damp: float
    rounds: int

    def __call__(
        self, weight: Array, second_moment: Array
    ) -> tuple[tuple[Array, Any, Any], dict[str, Array]]:
        """Weight on the grid, parameters, and what they share; and figures of it."""
        near, share = parameters_of(self.grid, weight)
        known = (near, share) if self.grid.static else None
        found = solve(
            weight,
            second_moment,
            grid=self.grid,
            parameters=known,
            keep=weight != 0,
            act_order=self.act_order,
            damp=self.damp,
        )
        rounded, parameters = found.weight, found.parameters
        if self.rounds:
            better = descend(
                weight,
                rounded,
                parameters,
                second_moment,
                grid=self.grid,
                rounds=self.rounds,
                damp=self.damp,
            )
            rounded, parameters = better.weight, better.parameters
        nearest = on_grid(self.grid, weight, near), near
        *kept, told = or_nearest(weight, nearest, (rounded, parameters), second_moment)
        return (*kept, found.share), {"damp": found.damp} | told
