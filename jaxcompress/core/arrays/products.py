"""What a product in JAX does when one operand is compressed: dot_general, convolution, gather.

Each rule brings its operands into the form that every compressed array multiplies in,
`leaf.product(x [*lead, M, K or N], over)`, and returns a dense array, or None where there is no
such form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays import chunked, views
from jaxcompress.core.arrays.base import Array, CompressedArray, is_compressed
from jaxcompress.core.arrays.inputs import QuantizedInput


@dataclass(frozen=True)
class Contraction:
    """The parameters of a dot_general, seen from one operand ("mine") towards the other."""

    mine: tuple[int, ...]
    other: tuple[int, ...]
    my_batch: tuple[int, ...]
    other_batch: tuple[int, ...]

    @classmethod
    def of(cls, dimension_numbers: Any, side: int) -> Contraction:
        """Seen from the operand `side` (0: left, 1: right)."""
        contract, batch = dimension_numbers
        return cls(
            tuple(contract[side]),
            tuple(contract[1 - side]),
            tuple(batch[side]),
            tuple(batch[1 - side]),
        )


@partial(jax.jit, static_argnames=("over", "precision", "dtype"))
def product(leaf: CompressedArray, x: Array, over: str, precision: Any, dtype: Any) -> Array:
    """`leaf.product`, traced and lowered once per (format, shapes) however often it is used."""
    out = leaf.product(x, over, precision=precision, preferred_element_type=dtype)
    return out.astype(dtype)


def dot_general(
    leaf: CompressedArray, x: Array, dimension_numbers: Any, side: int, precision: Any, dtype: Any
) -> Array | None:
    """`lax.dot_general` with the compressed array `leaf` as operand `side` (0: left, 1: right).

    Leading and row axes of `leaf` may be batch, free or contracted; its contracted columns are
    contracted whole, or free whole.

    Returns:
      The result in `dtype`, or None: some contracted axes only, or an outer product.
    """
    axes = Contraction.of(dimension_numbers, side)
    columns = views.contracted_axes(leaf)
    summed = [axis for axis in axes.mine if axis in columns]
    if summed and len(summed) == len(columns):
        out = _over_columns(leaf, x, axes, precision, dtype)
    elif not summed and axes.mine:
        out = _over_rows(leaf, x, axes, precision, dtype)
    else:
        return None
    if out is None or side == 1:
        return out
    batch, free = len(axes.my_batch), x.ndim - len(axes.other) - len(axes.other_batch)
    order = [*range(batch), *range(batch + free, out.ndim), *range(batch, batch + free)]
    return out.transpose(order)


def _free(ndim: int, *used: Sequence[int]) -> list[int]:
    taken = {axis for group in used for axis in group}
    return [axis for axis in range(ndim) if axis not in taken]


def _over_columns(
    leaf: CompressedArray, x: Array, axes: Contraction, precision: Any, dtype: Any
) -> Array | None:
    """Contract all columns. Result: `[*batch, *free of x, *free of leaf]`.

    A leading or row axis that is contracted as well is a batch axis of the product, summed after.
    """
    columns = views.contracted_axes(leaf)
    partner = dict(zip(axes.mine, axes.other, strict=True))
    also = [axis for axis in axes.mine if axis not in columns]
    free = _free(leaf.ndim, axes.mine, axes.my_batch)
    dims = [("n", leaf.shape[axis]) for axis in free] + [("k", leaf.shape[a]) for a in columns]
    moved = views.rearrange(leaf, [*axes.my_batch, *also], free, tuple(dims))
    spread: list[int] = []
    if moved is None:  # leading axes that cannot become rows: repeat x over them instead
        spread = [axis for axis in free if axis < len(leaf.lead)]
        rest = [axis for axis in free if axis not in spread]
        dims = [("n", leaf.shape[axis]) for axis in rest] + dims[len(free) :]
        moved = views.rearrange(leaf, [*axes.my_batch, *also, *spread], rest, tuple(dims))
        if moved is None or not rest:
            return None
        free = [*spread, *rest]
    x_free = _free(x.ndim, axes.other, axes.other_batch)
    x_order = [*axes.other_batch, *(partner[a] for a in also), *x_free]
    arranged = x.transpose(*x_order, *(partner[axis] for axis in columns))
    b, s, f = len(axes.my_batch), len(also), len(x_free)
    outer, inner = arranged.shape[: b + s], arranged.shape[b + s : b + s + f]
    m, k = math.prod(inner), leaf.contracted
    arranged = arranged.reshape(*outer, *(1,) * len(spread), m, k)
    lead = moved.lead
    arranged = jnp.broadcast_to(arranged, (*lead, m, k))
    y = product(moved, arranged, "k", precision, _sum_dtype(dtype, s))
    spread_sizes = lead[b + s :]
    y = y.reshape(*outer, *spread_sizes, *inner, *(leaf.shape[a] for a in free[len(spread) :]))
    y = y.sum(axis=tuple(range(b, b + s))).astype(dtype) if s else y
    if not spread:
        return y
    # [*batch, *spread, *free of x, *rows] to [*batch, *free of x, *free of leaf in dense order]
    at = {axis: b + i for i, axis in enumerate(spread)}
    at.update({axis: b + len(spread) + f + i for i, axis in enumerate(free[len(spread) :])})
    middle = range(b + len(spread), b + len(spread) + f)
    return y.transpose(*range(b), *middle, *(at[axis] for axis in sorted(free)))


def _over_rows(
    leaf: CompressedArray, x: Array, axes: Contraction, precision: Any, dtype: Any
) -> Array | None:
    """Contract leading and row axes, columns free. Result as of `_over_columns`."""
    columns = views.contracted_axes(leaf)
    if any(axis in columns for axis in axes.my_batch):
        return None
    partner = dict(zip(axes.mine, axes.other, strict=True))
    rows = sorted(axes.mine)
    free = _free(leaf.ndim, axes.mine, axes.my_batch, columns)
    dims = [("n", leaf.shape[a]) for a in rows] + [("k", leaf.shape[a]) for a in columns]
    moved = views.rearrange(leaf, [*axes.my_batch, *free], rows, tuple(dims))
    if moved is None:
        return None
    x_free = _free(x.ndim, axes.other, axes.other_batch)
    arranged = x.transpose(*axes.other_batch, *x_free, *(partner[axis] for axis in rows))
    b, f = len(axes.my_batch), len(x_free)
    batch, inner = arranged.shape[:b], arranged.shape[b : b + f]
    m, n = math.prod(inner), moved.rows
    arranged = arranged.reshape(*batch, *(1,) * len(free), m, n)
    arranged = jnp.broadcast_to(arranged, (*moved.lead, m, n))
    y = product(moved, arranged, "n", precision, dtype)
    y = y.reshape(*moved.lead, *inner, *(leaf.shape[axis] for axis in columns))
    # [*batch, *free rows, *free of x, *columns] to [*batch, *free of x, *free of leaf]
    at = {axis: b + i for i, axis in enumerate(free)}
    at.update({axis: b + len(free) + f + i for i, axis in enumerate(columns)})
    middle = range(b + len(free), b + len(free) + f)
    return y.transpose(*range(b), *middle, *(at[axis] for axis in sorted([*free, *columns])))


def _sum_dtype(dtype: Any, sums: int) -> Any:
    """Partial products that are summed afterwards keep float32."""
    return jnp.promote_types(dtype, jnp.float32) if sums else dtype


def conv_general_dilated(
    x: Array, leaf: CompressedArray, out_dtype: Any, **params: Any
) -> Array | None:
    """`lax.conv_general_dilated` with a compressed kernel, decoded by output channels.

    The output channels must be the rows of `leaf`, in any layout, stride, dilation or grouping.
    """
    spec = params["dimension_numbers"]
    if (
        leaf.lead
        or views.row_axes(leaf) != [spec.rhs_spec[0]]
        or params["batch_group_count"] != 1
        or params.get("out_sharding") is not None
    ):
        return None
    frozen = tuple(sorted((k, v) for k, v in params.items() if k != "out_sharding"))
    if isinstance(leaf, QuantizedInput):
        return _conv_of_rounded(leaf, x, spec.lhs_spec[0], frozen, jnp.dtype(out_dtype))
    return _conv(views.canonical(leaf), x, frozen, jnp.dtype(out_dtype))


def _conv_of_rounded(
    leaf: QuantizedInput, x: Array, batch: int, params: Any, out_dtype: Any
) -> Array:
    """The input rounded with one scale, or one for each sample along its axis `batch`."""
    samples = leaf.rounded(jnp.moveaxis(x, batch, 0), range(1, x.ndim))
    x, kernel = jnp.moveaxis(samples, 0, batch), leaf.bare()
    if is_compressed(kernel):
        return _conv(views.canonical(kernel), x, params, out_dtype)
    settings = dict(params)
    settings["preferred_element_type"] = settings["preferred_element_type"] or out_dtype
    return lax.conv_general_dilated(x, kernel, **settings).astype(out_dtype)


@partial(jax.jit, static_argnames=("params", "out_dtype"))
def _conv(leaf: CompressedArray, x: Array, params: tuple[Any, ...], out_dtype: Any) -> Array:
    settings = dict(params)
    groups, spec = settings.pop("feature_group_count"), settings["dimension_numbers"]
    settings["preferred_element_type"] = settings["preferred_element_type"] or out_dtype
    feature_in, feature_out = spec.lhs_spec[1], spec.out_spec[1]

    def convolve(kernel: CompressedArray, x: Array, groups: int) -> Array:
        return lax.conv_general_dilated(x, kernel.dense(), feature_group_count=groups, **settings)

    size = chunked.rows_per_chunk(leaf)
    if size >= leaf.rows:
        out = jax.checkpoint(convolve, policy=_NOTHING, static_argnums=2)(leaf, x, groups)
    elif groups == 1:
        out = chunked.map_rows(
            partial(convolve, groups=1), leaf, size, shared=x, axis=feature_out - x.ndim
        )
    else:
        out = _grouped_conv(leaf, x, groups, size, feature_in, feature_out, convolve)
    return out.astype(out_dtype)


_NOTHING = jax.checkpoint_policies.nothing_saveable


def _grouped_conv(
    leaf: CompressedArray, x: Array, groups: int, size: int, fin: int, fout: int, convolve: Any
) -> Array:
    """Some whole groups at a time: their output channels and the inputs that they read."""
    per_group = leaf.rows // groups
    at_once = max(1, size // per_group)
    at_once = next(g for g in range(at_once, 0, -1) if groups % g == 0)
    pieces, rebuild, _ = chunked.split_rows(leaf, at_once * per_group)
    split = x.reshape(*x.shape[:fin], groups // at_once, -1, *x.shape[fin + 1 :])
    body = jax.checkpoint(
        lambda kernel, x: convolve(kernel, x, at_once), policy=_NOTHING, prevent_cse=False
    )
    _, out = lax.scan(
        lambda _, xs: (None, body(rebuild(xs[0]), xs[1])),
        None,
        (pieces, jnp.moveaxis(split, fin, 0)),
    )
    out = jnp.moveaxis(out, 0, fout)
    return out.reshape(*out.shape[:fout], -1, *out.shape[fout + 2 :])


def gather(
    leaf: CompressedArray,
    indices: Array,
    *,
    dimension_numbers: Any,
    slice_sizes: Sequence[int],
    mode: Any,
    fill_value: Any,
) -> Any | None:
    """`lax.gather` of whole slices along one leading or row axis: an embedding, an expert.

    Only what is read is decoded: rows come back dense; slices of a leading axis stay compressed,
    unless out-of-bounds ones must be filled.
    """
    numbers, shape = dimension_numbers, leaf.shape
    cut = [axis for axis in range(leaf.ndim) if slice_sizes[axis] != shape[axis]]
    fill = mode == lax.GatherScatterMode.FILL_OR_DROP
    if (
        len(cut) != 1
        or slice_sizes[cut[0]] != 1
        or cut[0] in views.contracted_axes(leaf)
        or numbers.operand_batching_dims
        # Starts of whole axes are clamped to 0, unless what is out of bounds is to be filled.
        or (fill and tuple(numbers.start_index_map) != (cut[0],))
    ):
        return None
    (axis,) = cut
    ids = indices[..., numbers.start_index_map.index(axis)]
    inside = (ids >= 0) & (ids < shape[axis])
    taken = take(leaf, jnp.clip(ids, 0, shape[axis] - 1).reshape(-1), axis)
    # The axes of `ids` stand where `axis` stood (and an axis of size 1 after them, if it is not
    # collapsed); lax.gather puts the offset axes where it is told.
    collapsed = axis in numbers.collapsed_slice_dims
    kept = () if collapsed else (1,)
    unfolded = [*shape[:axis], *ids.shape, *kept, *shape[axis + 1 :]]
    batch = range(axis, axis + ids.ndim)
    offsets = [i for i in range(len(unfolded)) if i not in batch]
    offset_at = list(numbers.offset_dims)
    batch_at = [i for i in range(len(unfolded)) if i not in offset_at]
    order = [0] * len(unfolded)
    for place, i in zip([*offset_at, *batch_at], [*offsets, *batch], strict=True):
        order[place] = i
    if axis < len(leaf.lead) and not fill:
        split = views.reshape(taken, unfolded)
        return None if split is None else views.transpose(split, order)
    out = taken.dense().reshape(unfolded).transpose(order)
    if not fill:
        return out
    value = jnp.nan if fill_value is None else fill_value
    mask = jnp.expand_dims(inside, tuple(offset_at))
    return jnp.where(mask, out, jnp.asarray(value, out.dtype))


def take(leaf: Any, ids: Array, axis: int) -> Any:
    """`jnp.take(leaf, ids [T], axis)` along a leading or row axis, compressed."""
    if axis < len(leaf.lead):  # any layout
        return leaf.map(lambda buffer: jnp.take(buffer, ids, axis=axis, mode="clip"))
    leaf = views.canonical(leaf)
    axes = [*range(len(leaf.lead)), *views.row_axes(leaf)]
    at = axes.index(axis)
    sizes = [*leaf.shape]
    sizes[axis] = ids.shape[0]

    def pick(buffer: Array, present: tuple[bool, ...]) -> Array:
        return jnp.take(buffer, ids, axis=at, mode="clip") if present[at] else buffer

    return views.map_axes(leaf, pick, views.sliced_dims(leaf, sizes), len(leaf.lead))
