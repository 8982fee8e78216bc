"""Which leaves a schedule prunes, and how each is a matrix `[*lead, N, K]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxcompress.core.arrays.base import Dims, from_matrix, is_compressed, to_matrix
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.contractions import contractions
from jaxcompress.core.selection import Patterns, select
from jaxcompress.layerwise.problem import StoredMatrix
from jaxcompress.models import linear_paths

Targets = Mapping[str, Dims]  # by path
Matrices = dict[str, jax.Array]  # by path, each [*lead, N, K]


def targets(
    model: Model, *inputs: Any, include: Patterns = None, exclude: Patterns = None
) -> dict[str, Dims]:
    """The dense matrices to prune: which of their axes are rows, and which are contracted.

    Args:
      model: read off its own program, so that a convolution's kernel is one matrix.
      *inputs: that it takes, arrays or shapes.
      include: patterns of paths; None: the linear weights of a reference model, or every `kernel`.
      exclude: patterns of paths left alone.

    Raises:
      InputError: a pattern matches nothing, a leaf is compressed already, or no product reads it.
    """
    leaves = {path: leaf for path, leaf in leaves_with_paths(model.params) if hasattr(leaf, "ndim")}
    chosen = select(leaves, include or linear_paths(model) or "**/kernel", exclude)
    axes = contractions(model.apply)(model.params, *inputs)
    for path in chosen:
        if is_compressed(leaves[path]):
            name = type(leaves[path]).__name__
            raise InputError(f"{path}: is stored as {name}; a schedule prunes dense arrays")
    return {path: StoredMatrix.of(path, leaves[path], axes).dims for path in chosen}


def matrices_of(tree: Any, where: Targets) -> Matrices:
    """The leaves at these paths as matrices; those that are not in the tree are left out."""
    found = leaves_with_paths(tree)
    return {path: to_matrix(leaf, where[path]) for path, leaf in found if path in where}


def with_matrices(tree: Any, where: Targets, matrices: Matrices) -> Any:
    """`tree` with these matrices in the place of its leaves."""

    def put(path: str, leaf: Any) -> Any:
        return from_matrix(matrices[path], where[path]) if path in matrices else leaf

    return map_with_paths(put, tree)


def at_targets(tree: Any, where: Targets, change: Callable[[jax.Array], jax.Array]) -> Any:
    """`tree` with `change(matrix)` at each of these paths."""
    changed = {path: change(matrix) for path, matrix in matrices_of(tree, where).items()}
    return with_matrices(tree, where, changed)
