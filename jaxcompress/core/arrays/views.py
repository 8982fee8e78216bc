"""Views of compressed arrays that stay compressed: what may happen to a weight before its product.

Every rule takes a compressed array and the parameters of the JAX primitive that it mirrors, and
returns a compressed array, or None where the result cannot be expressed: the caller goes dense.
The rules know no class: they move buffers by the roles of their axes. Leading axes and row axes
can be moved, indexed and joined freely; contracted axes are packed into one and keep their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import INNER, ROWS, Array, CompressedArray, Dims, infer_first

L = TypeVar("L", bound=CompressedArray)


# ------------------------------------------------------------------------------- axes


def row_axes(leaf: CompressedArray) -> list[int]:
    """Dense axes that fold into the rows, in order."""
    lead = len(leaf.lead)
    return [lead + i for i, (kind, _) in enumerate(leaf.dims) if kind == "n"]


def contracted_axes(leaf: CompressedArray) -> list[int]:
    """Dense axes that fold into the contracted columns, in order."""
    lead = len(leaf.lead)
    return [lead + i for i, (kind, _) in enumerate(leaf.dims) if kind == "k"]


def with_dims(leaf: L, dims: Sequence[tuple[str, int]]) -> L:
    """`leaf` with other `dims`, the first size of each kind left to the buffers."""
    return cast(L, replace(cast(Any, leaf), dims=infer_first(tuple(dims))))


def canonical(leaf: L) -> L:
    """`leaf` with its buffers as they are stored, if it lies in the layout of a chip's kernel."""
    if getattr(leaf, "layout", "canonical") == "canonical":
        return leaf
    return cast(Any, leaf).with_layout("canonical")


def row_roles(leaf: CompressedArray) -> list[str]:
    """The role of the rows of every buffer, in the order of the pytree's leaves."""
    roles: list[str] = []

    def note(buffer: Array, role: tuple[str, str]) -> Array:
        roles.append(role[0])
        return buffer

    leaf.map_roles(note)
    return roles


def map_axes(leaf: L, fn: Callable[[Array, tuple[bool, ...]], Array], dims: Dims, lead: int) -> L:
    """Apply `fn` to every buffer, unfolded to its leading and row axes.

    Args:
      leaf: the array.
      fn: `fn(buffer [*lead, *row sizes, c], present) -> [*new lead, *new row sizes, c]`; `present`
        says which of the leading and row axes the buffer has: where it does not, its size there
        is 1 and must stay 1.
      dims: dims of the result, with its sizes.
      lead: number of leading axes of the result.
    """
    old_lead, rows, sizes = leaf.lead, leaf.rows, [leaf.shape[a] for a in row_axes(leaf)]

    def apply(buffer: Array, roles: tuple[str, str]) -> Array:
        r, c = buffer.shape[-2:]
        full = roles[0] == ROWS and r == rows
        present = (True,) * len(old_lead) + (full,) * len(sizes)
        inner = 1 if roles[0] == ROWS else r
        unfolded = buffer.reshape(*old_lead, *(sizes if full else [1] * len(sizes)), inner * c)
        out = fn(unfolded, present)
        new_rows = math.prod(out.shape[lead:-1]) * inner
        return out.reshape(*out.shape[:lead], new_rows, c)

    return with_dims(leaf.map_roles(apply), dims)


def rearrange(leaf: L, lead: Sequence[int], rows: Sequence[int], dims: Dims) -> L | None:
    """Make the axes `lead` leading and the axes `rows` the rows, in the orders given.

    Args:
      leaf: the array; its leading and row axes are those of `lead` and `rows` together.
      lead: dense axes that shall lead.
      rows: dense axes that shall fold into the rows.
      dims: dims of the result's tail, with sizes.

    Returns:
      None where a leading axis would have to become rows of a factor that has none.
    """
    old_lead = len(leaf.lead)
    if list(lead) == list(range(old_lead)) and list(rows) == row_axes(leaf):
        return with_dims(leaf, dims)
    gains = any(axis < old_lead for axis in rows)
    leaf = canonical(leaf)
    if gains and any(role != ROWS for role in row_roles(leaf)):
        return None
    axes = [*range(old_lead), *row_axes(leaf)]
    order = [axes.index(axis) for axis in (*lead, *rows)]
    # Every buffer carries every leading axis; and all rows, where a leading axis became one.
    needed = [gains or axis in lead for axis in axes]

    def move(buffer: Array, present: tuple[bool, ...]) -> Array:
        shape = [
            leaf.shape[axis] if need or have else 1
            for axis, need, have in zip(axes, needed, present, strict=True)
        ]
        buffer = jnp.broadcast_to(buffer, (*shape, buffer.shape[-1]))
        return buffer.transpose(*order, len(order))

    return map_axes(leaf, move, dims, len(lead))


# ------------------------------------------------------------------- shapes and dtypes


def transpose(leaf: L, permutation: Sequence[int]) -> L | None:
    """`lax.transpose`: any order, so long as contracted axes keep theirs."""
    old_lead, contracted = len(leaf.lead), contracted_axes(leaf)
    if [axis for axis in permutation if axis in contracted] != contracted:
        return None
    lead = 0
    while lead < len(permutation) and permutation[lead] < old_lead:
        lead += 1
    tail = permutation[lead:]
    dims = tuple(("k" if axis in contracted else "n", leaf.shape[axis]) for axis in tail)
    rows = [axis for axis in tail if axis not in contracted]
    return rearrange(leaf, permutation[:lead], rows, dims)


def reshape(leaf: L, new_sizes: Sequence[int]) -> L | None:
    """`lax.reshape`: axes of one kind may be merged and split."""
    old_lead, shape = len(leaf.lead), leaf.shape
    lead: list[int] = []
    dims: list[tuple[str, int]] = []
    for old, new in _common_factors(shape, new_sizes):
        sizes = [new_sizes[j] for j in new]
        if not dims and all(i < old_lead for i in old):
            lead += sizes
            continue
        while not dims and len(sizes) > 1 and sizes[0] == 1:
            lead.append(sizes.pop(0))
        joined = [i for i in old if i < old_lead and shape[i] != 1]
        if joined:
            return _reshape_leading_as_rows(leaf, joined[0], new_sizes)
        tail = [i for i in old if i >= old_lead]
        kinds = {leaf.dims[i - old_lead][0] for i in tail if shape[i] != 1}
        if len(kinds) > 1:
            return None
        kind = kinds.pop() if kinds else (leaf.dims[tail[0] - old_lead][0] if tail else "n")
        dims += [(kind, size) for size in sizes]
    out = leaf.map(lambda buffer: buffer.reshape(*lead, *buffer.shape[old_lead:]))
    return with_dims(out, dims)


def _reshape_leading_as_rows(leaf: L, first: int, new_sizes: Sequence[int]) -> L | None:
    """`reshape` where leading axes from `first` on merge with rows: they become rows before."""
    lead, sizes = len(leaf.lead), leaf.shape
    rows = [*range(first, lead), *row_axes(leaf)]
    kinds = ["n"] * (lead - first) + [kind for kind, _ in leaf.dims]
    moved = rearrange(leaf, range(first), rows, tuple(zip(kinds, sizes[first:], strict=True)))
    return None if moved is None else reshape(moved, new_sizes)


def _common_factors(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Smallest runs of axes of `old` and of `new` with equal products, in order."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = (old[i] if left else 1), (new[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while a != b:
            if a < b:
                a *= old[i]
                left.append(i)
                i += 1
            else:
                b *= new[j]
                right.append(j)
                j += 1
        yield left, right


def squeeze(leaf: L, dimensions: Sequence[int]) -> L | None:
    """`lax.squeeze`."""
    drop = {d % leaf.ndim for d in dimensions}
    return reshape(leaf, [s for i, s in enumerate(leaf.shape) if i not in drop])


def broadcast_in_dim(
    leaf: L, shape: Sequence[int], broadcast_dimensions: Sequence[int]
) -> L | None:
    """`lax.broadcast_in_dim`: new axes anywhere, and axes of size 1 grown."""
    at = list(broadcast_dimensions)
    lead = at[len(leaf.lead)]  # everything before the first tail axis leads
    old = at[: len(leaf.lead)]

    def grow(buffer: Array) -> Array:
        rest = buffer.shape[len(old) :]
        places = (*old, *range(lead, lead + len(rest)))
        return lax.broadcast_in_dim(buffer, (*shape[:lead], *rest), places)

    known = dict(zip(at, leaf.shape, strict=True))
    sizes = [*shape[:lead], *(known.get(axis, 1) for axis in range(lead, len(shape)))]
    out = reshape(leaf.map(grow), sizes)
    for axis in range(lead, len(shape)):
        if out is not None and sizes[axis] != shape[axis]:
            out = _repeat_rows(out, axis, shape[axis])
    return out


def _repeat_rows(leaf: L, axis: int, size: int) -> L:
    """A tail axis of size 1 grown to `size`: it becomes a row axis."""
    leaf, lead = canonical(leaf), len(leaf.lead)
    dims = [
        ("n" if i == axis - lead else kind, n)
        for i, ((kind, _), n) in enumerate(zip(leaf.dims, leaf.tail, strict=True))
    ]
    leaf = with_dims(leaf, dims)
    place = lead + row_axes(leaf).index(axis)
    dims[axis - lead] = ("n", size)

    def repeat(buffer: Array, present: tuple[bool, ...]) -> Array:
        if not present[place]:
            return buffer
        return jnp.broadcast_to(buffer, (*buffer.shape[:place], size, *buffer.shape[place + 1 :]))

    return map_axes(leaf, repeat, tuple(dims), lead)


def convert_element_type(leaf: L, new_dtype: Any) -> L | None:
    """`lax.convert_element_type` to another float: the cast is remembered."""
    dtype = jnp.dtype(new_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if dtype == leaf.dtype:
        return leaf
    return cast(L, replace(cast(Any, leaf), casts=(*leaf.casts, str(dtype))))


# ------------------------------------------------------------------ indexing and joining


def sliced_dims(leaf: CompressedArray, sizes: Sequence[int]) -> Dims:
    """The dims of a slice of `leaf`; `sizes`: of all its axes, leading ones included."""
    lead = len(leaf.lead)
    return tuple((kind, sizes[lead + i]) for i, (kind, _) in enumerate(leaf.dims))


def _whole_contracted(leaf: CompressedArray, sizes: Sequence[int]) -> bool:
    return all(sizes[axis] == leaf.shape[axis] for axis in contracted_axes(leaf))


def lax_slice(
    leaf: L,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
) -> L | None:
    """`lax.slice` along leading and row axes."""
    lead = len(leaf.lead)
    steps = strides or (1,) * leaf.ndim
    if (
        tuple(limit_indices[lead:]) == leaf.tail
        and not any(start_indices[lead:])
        and (set(steps[lead:]) <= {1})
    ):  # any layout: only leading axes are cut
        cuts = zip(start_indices[:lead], limit_indices[:lead], steps[:lead], strict=True)
        index = tuple(slice(*c) for c in cuts)
        return leaf.map(lambda buffer: buffer[index])
    sizes = [
        max(0, -(-(stop - start) // step))
        for start, stop, step in zip(start_indices, limit_indices, steps, strict=True)
    ]
    if not _whole_contracted(leaf, sizes):
        return None
    leaf = canonical(leaf)
    axes = [*range(len(leaf.lead)), *row_axes(leaf)]

    def cut(buffer: Array, present: tuple[bool, ...]) -> Array:
        index = [
            slice(start_indices[axis], limit_indices[axis], steps[axis]) if have else slice(None)
            for axis, have in zip(axes, present, strict=True)
        ]
        return buffer[tuple(index)]

    return map_axes(leaf, cut, sliced_dims(leaf, sizes), len(leaf.lead))


def split(leaf: L, sizes: Sequence[int], axis: int) -> list[L] | None:
    """`lax.split` along a leading or row axis."""
    out, start = [], 0
    for size in sizes:
        first, last = [0] * leaf.ndim, list(leaf.shape)
        first[axis], last[axis] = start, start + size
        piece = lax_slice(leaf, first, last, None)
        if piece is None:
            return None
        out.append(piece)
        start += size
    return out


def dynamic_slice(leaf: L, starts: Sequence[Any], slice_sizes: Sequence[int]) -> L | None:
    """`lax.dynamic_slice` along leading and row axes."""
    if not _whole_contracted(leaf, slice_sizes):
        return None
    whole_tail = tuple(slice_sizes[len(leaf.lead) :]) == leaf.tail
    if whole_tail:  # any layout: only leading axes are cut
        return _dynamic_slice_leading(leaf, starts, slice_sizes)
    leaf = canonical(leaf)
    axes = [*range(len(leaf.lead)), *row_axes(leaf)]

    def cut(buffer: Array, present: tuple[bool, ...]) -> Array:
        zero = jnp.zeros_like(starts[0])
        begin = [starts[axis] if have else zero for axis, have in zip(axes, present, strict=True)]
        sizes = [slice_sizes[axis] if have else 1 for axis, have in zip(axes, present, strict=True)]
        return lax.dynamic_slice(buffer, (*begin, zero), (*sizes, buffer.shape[-1]))

    return map_axes(leaf, cut, sliced_dims(leaf, slice_sizes), len(leaf.lead))


def _dynamic_slice_leading(leaf: L, starts: Sequence[Any], slice_sizes: Sequence[int]) -> L:
    lead = len(leaf.lead)

    def cut(buffer: Array) -> Array:
        rest = buffer.shape[lead:]
        begin = (*starts[:lead], *(jnp.zeros_like(starts[0]) for _ in rest))
        return lax.dynamic_slice(buffer, begin, (*slice_sizes[:lead], *rest))

    return leaf.map(cut)


def concatenate(leaves: Sequence[Any], dimension: int) -> Any:
    """`lax.concatenate` of arrays of one format along a leading or row axis, or None."""
    leaves = [canonical(leaf) for leaf in leaves]
    first = leaves[0]
    if dimension in contracted_axes(first):
        return None
    specs = {jax.tree.structure(with_dims(leaf, _unsized(leaf))) for leaf in leaves}
    if len(specs) > 1 or len({len(leaf.lead) for leaf in leaves}) > 1:
        return None
    lead = len(first.lead)
    if dimension >= lead:
        # One row that stands for all of its part does not stand for all of the whole.
        full = [every for every in map(_every_row, leaves) if every is not None]
        if len(full) < len(leaves):
            return None
        leaves = full
    flat = [jax.tree.leaves(leaf) for leaf in leaves]
    sizes = list(first.shape)
    sizes[dimension] = sum(leaf.shape[dimension] for leaf in leaves)
    rows = row_axes(first)
    if any(len({b.shape[-1] for b in group}) > 1 for group in zip(*flat, strict=True)):
        return None
    if dimension < lead:
        joined = [jnp.concatenate(group, axis=dimension) for group in zip(*flat, strict=True)]
    else:
        joined = []
        for group in zip(*flat, strict=True):
            unfolded = [
                b.reshape(*first.lead, *(leaf.shape[a] for a in rows), b.shape[-1])
                for b, leaf in zip(group, leaves, strict=True)
            ]
            whole = jnp.concatenate(unfolded, axis=lead + rows.index(dimension))
            joined.append(whole.reshape(*first.lead, -1, whole.shape[-1]))
    out = jax.tree.unflatten(jax.tree.structure(first), joined)
    return with_dims(out, sliced_dims(first, sizes))


def _unsized(leaf: CompressedArray) -> Dims:
    return tuple((kind, 1) for kind, _ in leaf.dims)


def _every_row(leaf: L) -> L | None:
    """`leaf` with an entry per row in every buffer; None for factors that have no rows."""
    if any(role == INNER for role in row_roles(leaf)):
        return None
    n = leaf.rows
    return leaf.map(lambda b: jnp.broadcast_to(b, (*b.shape[:-2], n, b.shape[-1])))


def stack(leaves: Sequence[Any], axis: int) -> Any | None:
    """Stack arrays of one format along a new axis."""
    shape = list(leaves[0].shape)
    shape.insert(axis, 1)
    at = [i for i in range(len(shape)) if i != axis]
    grown = [broadcast_in_dim(leaf, shape, at) for leaf in leaves]
    return None if any(leaf is None for leaf in grown) else concatenate(grown, axis)
