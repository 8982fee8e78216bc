"""The record of a cut, `{path: {axis: kept indices}}`: it depends on no trace and can be stored.

Kept indices are a sorted integer array `[k]`. Along an axis of stacked parameters (the layers of
a scan) they may be `[steps, k]`: other indices in each layer, the same number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths, map_with_paths

Kept = Mapping[str, Mapping[int, Any]]
KeptArrays = dict[str, dict[int, np.ndarray]]


def combine(*records: Kept) -> KeptArrays:
    """What is left after several cuts: along each axis, the indices that every record keeps.

    Raises:
        InputError: a record with other indices in each step meets one that leaves steps with
            different numbers of indices.
    """
    out: KeptArrays = {}
    for record in records:
        for path, axes in record.items():
            for axis, kept in axes.items():
                known = out.setdefault(path, {})
                kept = np.asarray(kept)
                known[axis] = _intersect(known[axis], kept, path) if axis in known else kept
    return out


def _intersect(a: np.ndarray, b: np.ndarray, path: str) -> np.ndarray:
    if a.ndim == b.ndim == 1:
        return np.intersect1d(a, b)
    steps = max(len(x) for x in (a, b) if x.ndim == 2)
    rows = [
        np.intersect1d(x, y)
        for x, y in zip(*(np.broadcast_to(k, (steps, k.shape[-1])) for k in (a, b)))
    ]
    if len({len(row) for row in rows}) > 1:
        raise InputError(f"{path}: the cuts leave a different number of indices in each step")
    return np.stack(rows)


def checked(kept: Kept, shapes: Mapping[str, tuple[int, ...]]) -> KeptArrays:
    """The record as sorted integer arrays, its paths, axes and indices seen to exist.

    Args:
        kept: the record.
        shapes: shape of every parameter.

    Raises:
        InputError: unknown path or axis; indices that are not integers, out of range, double, or
            none at all.
    """
    out: KeptArrays = {}
    for path, axes in kept.items():
        if path not in shapes:
            raise InputError(f"kept: there is no parameter {path}")
        for axis, indices in axes.items():
            out.setdefault(path, {})[axis] = _checked_indices(
                np.asarray(indices), shapes[path], path, axis
            )
    return out


def _checked_indices(
    indices: np.ndarray, shape: tuple[int, ...], path: str, axis: int
) -> np.ndarray:
    where = f"kept[{path!r}][{axis}]"
    if not 0 <= axis < len(shape):
        raise InputError(f"{where}: {path} has axes 0 to {len(shape) - 1}")
    if indices.ndim not in (1, 2) or not indices.size or indices.dtype.kind not in "iu":
        raise InputError(f"{where}: wants at least one integer index, [k] or [steps, k]")
    if indices.ndim == 2 and (axis == 0 or len(indices) != shape[0]):
        raise InputError(f"{where}: [steps, k] wants one row for each of the {shape[0]} steps")
    if indices.min() < 0 or indices.max() >= shape[axis]:
        raise InputError(f"{where}: indices must lie in 0 to {shape[axis] - 1}")
    indices = np.sort(indices, axis=-1)
    if (np.diff(indices, axis=-1) == 0).any():
        raise InputError(f"{where}: an index occurs twice")
    return indices


def _of(leaf: Any) -> Any:
    """The library of an array: what is NumPy stays NumPy."""
    return np if isinstance(leaf, np.ndarray) else jnp


def _for_each_axis(params: Any, kept: Kept, change: Callable[[Any, int, np.ndarray], Any]) -> Any:
    shapes = {
        path: leaf.shape for path, leaf in leaves_with_paths(params) if hasattr(leaf, "shape")
    }
    record = checked(kept, shapes)

    def one(path: str, leaf: Any) -> Any:
        if path not in record:
            return leaf
        if is_compressed(leaf):
            leaf = leaf.dense()
        for axis, indices in record[path].items():
            leaf = change(leaf, axis, indices)
        return leaf

    return map_with_paths(one, params)


def sliced(params: Any, kept: Kept) -> Any:
    """Parameters without the indices that are not kept; compressed leaves become dense.

    Raises:
        InputError: see `checked`.
    """

    def take(leaf: Any, axis: int, indices: np.ndarray) -> Any:
        if indices.ndim == 1:
            return _of(leaf).take(leaf, indices, axis=axis)
        shape = [1] * leaf.ndim
        shape[0], shape[axis] = indices.shape
        return _of(leaf).take_along_axis(leaf, indices.reshape(shape), axis=axis)

    return _for_each_axis(params, kept, take)


def masked(params: Any, kept: Kept) -> Any:
    """Parameters of the same shapes with zeros at the indices that are not kept.

    Raises:
        InputError: see `checked`.
    """

    def zero(leaf: Any, axis: int, indices: np.ndarray) -> Any:
        rows = indices.reshape(-1, indices.shape[-1])
        mask = np.zeros((len(rows), leaf.shape[axis]), bool)
        np.put_along_axis(mask, rows, True, axis=1)
        shape = [1] * leaf.ndim
        shape[axis] = leaf.shape[axis]
        if indices.ndim == 2:
            shape[0] = len(rows)
        return _of(leaf).where(mask.reshape(shape), leaf, np.zeros((), leaf.dtype))

    return _for_each_axis(params, kept, zero)
