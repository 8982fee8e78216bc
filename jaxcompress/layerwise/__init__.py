"""Matrices one at a time: solvers on second moments of activations, and the walk through a model.

The 2-D tools take a stored matrix `[N rows, K contracted]` and moments `[K, K]` of what it
multiplies; they know nothing of models.
"""

from jaxcompress.layerwise.grid import Grid, IntegerGrid, grid_of, nearest, on_grid
from jaxcompress.layerwise.output_moments import output_moments
from jaxcompress.layerwise.refine import Refined, refine
from jaxcompress.layerwise.refit import Refit, refit, squared_error
from jaxcompress.layerwise.solver import Solution, solve
from jaxcompress.layerwise.target import dense_target

__all__ = [
    "Grid",
    "IntegerGrid",
    "Refined",
    "Refit",
    "Solution",
    "dense_target",
    "grid_of",
    "nearest",
    "on_grid",
    "output_moments",
    "refine",
    "refit",
    "solve",
    "squared_error",
]
