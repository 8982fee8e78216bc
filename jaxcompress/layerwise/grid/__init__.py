"""Where quantized values may lie: number formats with their granularity, as the solvers ask."""

from jaxcompress.layerwise.grid.base import Granularity, Grid, Range
from jaxcompress.layerwise.grid.floats import FloatGrid
from jaxcompress.layerwise.grid.integers import IntegerGrid, TernaryGrid
from jaxcompress.layerwise.grid.make import DTYPES, grid_of, split_dtype
from jaxcompress.layerwise.grid.nearest import (
    by_group,
    group_width,
    nearest,
    on_grid,
    parameters_of,
    stored,
)
from jaxcompress.layerwise.grid.tables import TableGrid

__all__ = [
    "DTYPES",
    "FloatGrid",
    "Granularity",
    "Grid",
    "IntegerGrid",
    "Range",
    "TableGrid",
    "TernaryGrid",
    "by_group",
    "grid_of",
    "group_width",
    "nearest",
    "on_grid",
    "parameters_of",
    "split_dtype",
    "stored",
]
