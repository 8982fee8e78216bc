"""Where quantized values may lie: number formats with their granularity, as the solvers ask."""

from jaxcompress.layerwise.grid.base import Granularity, Grid, Range
from jaxcompress.layerwise.grid.integers import IntegerGrid
from jaxcompress.layerwise.grid.make import DTYPES, grid_of
from jaxcompress.layerwise.grid.nearest import (
    by_group,
    group_width,
    nearest,
    on_grid,
    parameters_of,
)

__all__ = [
    "DTYPES",
    "Granularity",
    "Grid",
    "IntegerGrid",
    "Range",
    "by_group",
    "grid_of",
    "group_width",
    "nearest",
    "on_grid",
    "parameters_of",
]
