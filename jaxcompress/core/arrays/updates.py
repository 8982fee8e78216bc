"""Writing into a compressed array: a quantized KV cache stays quantized.

The update is encoded in the array's own format, one row at a time, and written buffer by buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays import views
from jaxcompress.core.arrays.base import ROWS, STORED, Array, is_compressed


def _encoded_rows(leaf: Any, rows: Array) -> list[Array] | None:
    """Buffers `[*outer, c]` of `rows` `[*outer, K]` in the format of `leaf`, row by row.

    None where the format has no `encode`, or a buffer is shared by several rows.
    """
    shared = leaf.rows > 1 and any(b.shape[-2] != leaf.rows for b in jax.tree.leaves(leaf))
    if not hasattr(leaf, "encode") or shared or set(views.row_roles(leaf)) != {ROWS}:
        return None
    encoded = views.with_dims(leaf, STORED).encode(rows[..., None, :])
    if len(jax.tree.leaves(encoded)) != len(jax.tree.leaves(leaf)):
        return None
    return [
        new[..., 0, :].astype(old.dtype)
        for new, old in zip(jax.tree.leaves(encoded), jax.tree.leaves(leaf), strict=True)
    ]


def _unfolded(leaf: Any) -> list[Array]:
    """Buffers `[*lead, *row sizes, c]`."""
    sizes = [leaf.shape[axis] for axis in views.row_axes(leaf)]
    return [b.reshape(*leaf.lead, *sizes, b.shape[-1]) for b in jax.tree.leaves(leaf)]


def _folded(leaf: Any, buffers: Sequence[Array]) -> Any:
    """`leaf` with other buffers, from the form of `_unfolded`."""
    old = jax.tree.leaves(leaf)
    folded = [new.reshape(b.shape) for new, b in zip(buffers, old, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(leaf), folded)


def dynamic_update_slice(leaf: Any, update: Any, starts: Sequence[Any]) -> Any | None:
    """`lax.dynamic_update_slice` of whole contracted columns.

    Args:
      leaf: a compressed array with `encode`.
      update: dense, or compressed in the same format.
      starts: one index per dense axis.
    """
    leaf = views.canonical(leaf)
    if any(update.shape[axis] != leaf.shape[axis] for axis in views.contracted_axes(leaf)):
        return None
    axes = [*range(len(leaf.lead)), *views.row_axes(leaf)]
    if is_compressed(update):
        format_of_leaf: Any = jax.tree.structure(leaf)
        if format_of_leaf != jax.tree.structure(update) or any(
            b.shape[-2] != update.rows for b in jax.tree.leaves(update)
        ):
            update = update.dense()
    if is_compressed(update):
        pieces: list[Array] | None = _unfolded(update)
    else:
        columns = views.contracted_axes(leaf)
        rows = update.transpose(*axes, *columns)
        pieces = _encoded_rows(leaf, rows.reshape(*rows.shape[: len(axes)], leaf.contracted))
    if pieces is None:
        return None
    begin = [starts[axis] for axis in axes]
    out = [
        lax.dynamic_update_slice(buffer, piece, (*begin, jnp.zeros_like(starts[0])))
        for buffer, piece in zip(_unfolded(leaf), pieces, strict=True)
    ]
    return _folded(leaf, out)


def scatter(
    leaf: Any, indices: Array, update: Any, *, dimension_numbers: Any, **settings: Any
) -> Any | None:
    """`lax.scatter` (each index written once) of whole contracted columns.

    Args:
      leaf: a compressed array with `encode`.
      indices: as for `lax.scatter`.
      update: dense updates.
      dimension_numbers: as for `lax.scatter`.
      **settings: the other arguments of `lax.scatter`.
    """
    leaf = views.canonical(leaf)
    numbers, columns = dimension_numbers, views.contracted_axes(leaf)
    batching = tuple(numbers.operand_batching_dims)
    windows = [
        axis
        for axis in range(leaf.ndim)
        if axis not in numbers.inserted_window_dims and axis not in batching
    ]
    place = dict(zip(windows, numbers.update_window_dims, strict=True))  # operand axis -> update's
    if (
        any(axis not in place or axis in numbers.scatter_dims_to_operand_dims for axis in columns)
        or any(update.shape[place[axis]] != leaf.shape[axis] for axis in columns)
        or is_compressed(update)
    ):
        return None
    column_places = [place[axis] for axis in columns]
    outer = [axis for axis in range(update.ndim) if axis not in column_places]
    rows = update.transpose(*outer, *column_places)
    pieces = _encoded_rows(leaf, rows.reshape(*rows.shape[: len(outer)], leaf.contracted))
    if pieces is None:
        return None
    axes = [*range(len(leaf.lead)), *views.row_axes(leaf)]
    renumber = {axis: i for i, axis in enumerate(axes)}
    inner = lax.ScatterDimensionNumbers(
        update_window_dims=(
            *(outer.index(place[axis]) for axis in windows if axis in renumber),
            len(outer),
        ),
        inserted_window_dims=tuple(renumber[axis] for axis in numbers.inserted_window_dims),
        scatter_dims_to_operand_dims=tuple(
            renumber[axis] for axis in numbers.scatter_dims_to_operand_dims
        ),
        operand_batching_dims=tuple(renumber[axis] for axis in batching),
        scatter_indices_batching_dims=numbers.scatter_indices_batching_dims,
    )
    out = [
        lax.scatter(buffer, indices, piece, inner, **settings)
        for buffer, piece in zip(_unfolded(leaf), pieces, strict=True)
    ]
    return _folded(leaf, out)
