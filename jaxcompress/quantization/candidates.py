"""Number formats that parameters may get, and the parameters rounded to them, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import Array, dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.contractions import contractions
from jaxcompress.core.selection import select
from jaxcompress.evaluation.footprint import bytes_of
from jaxcompress.layerwise.grid import Grid, grid_of, nearest
from jaxcompress.layerwise.pieces import shapes_by_path
from jaxcompress.layerwise.problem import StoredMatrix
from jaxcompress.models import linear_paths

DEFAULT_INCLUDE = "**/kernel"
DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """A number format that a parameter may get.

    Attributes:
      name: short, such as `int4 g64`, `mxfp4`, `dense`.
      options: of `layerwise.grid.grid_of`, as any rounding method takes them; None: left as it is.
    """

    name: str
    options: Mapping[str, Any] | None

    @classmethod
    def of(cls, given: Any) -> Candidate:
        """From options such as `{"bits": 4, "group_size": 64}`, from "dense", or itself.

        Raises:
          InputError: options that are none of a number format.
        """
        if isinstance(given, Candidate):
            return given
        if given == DENSE:
            return cls(DENSE, None)
        try:
            grid_of(**given)
        except TypeError:
            raise InputError(
                f"candidate {given!r}: give options of a number format, such as "
                f'{{"bits": 4, "group_size": 64}}, or "dense"'
            ) from None
        return cls(_name(given), dict(given))

    @property
    def grid(self) -> Grid | None:
        """Its grid; None where the parameter is left as it is."""
        return None if self.options is None else grid_of(**self.options)


@dataclass(frozen=True)
class Trials:
    """Parameters of a model and the formats that each is tried in.

    Attributes:
      model: parameters may be compressed; they count by their dense values.
      matrices: by path.
      candidates: every parameter's.
    """

    model: Model
    matrices: Mapping[str, StoredMatrix]
    candidates: tuple[Candidate, ...]

    @classmethod
    def of(
        cls,
        model: Model,
        candidates: Sequence[Any],
        inputs: Sequence[np.ndarray],
        paths: Sequence[str] | None,
    ) -> Trials:
        """The parameters of these paths; None: `default_paths`.

        Raises:
          InputError: no such parameter, one that no product reads, or no such format.
        """
        made = tuple(map(Candidate.of, candidates))
        if not made or len({candidate.name for candidate in made}) < len(made):
            raise InputError("candidates: give one or more, each once")
        known = dict(leaves_with_paths(model.params))
        chosen = default_paths(model) if paths is None else list(paths)
        if unknown := set(chosen) - set(known):
            raise InputError(f"{min(unknown)}: no such parameter")
        one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in inputs]
        axes = contractions(model.apply)(model.params, *one)
        return cls(model, {p: StoredMatrix.of(p, known[p], axes) for p in chosen}, made)

    @cached_property
    def bytes(self) -> np.ndarray:
        """Of the stored parameters, float64 `[P, C]`; NaN where a format does not fit."""
        return np.array(
            [[_bytes(stored, c) for c in self.candidates] for stored in self.matrices.values()]
        ).reshape(len(self.matrices), len(self.candidates))

    def grids(self, path: str) -> Iterator[tuple[int, Grid]]:
        """(index, grid) of the candidates that round this parameter and fit it."""
        sizes = self.bytes[list(self.matrices).index(path)]
        for index, candidate in enumerate(self.candidates):
            grid = candidate.grid
            if grid is not None and np.isfinite(sizes[index]):
                yield index, grid

    def leaves(self, path: str) -> Iterator[tuple[int, Array]]:
        """(index of the candidate, the parameter as it decodes once it is rounded), dense."""
        stored = self.matrices[path]
        for index, grid in self.grids(path):
            yield index, stored.put_back(rounded(stored.matrix(), grid))


def default_paths(model: Model) -> list[str]:
    """The linear weights of the reference models, elsewhere every `kernel`."""
    return select(shapes_by_path(model.params), linear_paths(model) or DEFAULT_INCLUDE)


@partial(jax.jit, static_argnums=1)
def rounded(matrix: Any, grid: Grid) -> Array:
    """A matrix `[*lead, N, K]` rounded to nearest: what the stored one decodes to."""
    return dense(nearest(grid, dense(matrix)))


@partial(jax.jit, static_argnums=1)
def change(matrix: Any, grid: Grid) -> Array:
    """What rounding to nearest adds to a matrix, float32 `[*lead, N, K]`."""
    after, before = rounded(matrix, grid), dense(matrix)
    return after.astype(jnp.float32) - before.astype(jnp.float32)


def _bytes(stored: StoredMatrix, candidate: Candidate) -> float:
    grid = candidate.grid
    if grid is None:
        return bytes_of(stored.leaf)
    matrix = jax.eval_shape(lambda: dense(stored.matrix()))
    return _rounded_bytes(grid, matrix.shape, matrix.dtype)  # type: ignore[arg-type]


@cache
def _rounded_bytes(grid: Grid, shape: tuple[int, ...], dtype: Any) -> float:
    try:
        return jax.eval_shape(partial(nearest, grid), jax.ShapeDtypeStruct(shape, dtype)).nbytes
    except InputError:  # groups that do not divide the columns
        return np.nan


def _name(options: Mapping[str, Any]) -> str:
    dtype = options.get("dtype", "int")
    parts = [f"int{options.get('bits', 4)}" if dtype == "int" else dtype]
    size = options.get("group_size", 128)
    if size == -1:
        parts.append("rows")
    elif dtype.startswith("int") or size != 128:
        parts.append(f"g{size}")
    if not options.get("symmetric", True):
        parts.append("asymmetric")
    rest = ("granularity", "range", "scale_bits", "static")
    parts += [f"{key} {options[key]}" for key in rest if key in options]
    return " ".join(parts)
