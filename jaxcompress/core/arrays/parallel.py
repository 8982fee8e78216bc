"""Compressed arrays on a mesh: parallel products, sharding constraints and gathers per buffer."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding

from jaxcompress.core.arrays import views
from jaxcompress.core.arrays.base import CONTRACTED, ROWS, Array, Partition
from jaxcompress.core.errors import InputError

P = jax.P


def product(
    leaf: Any, x: Array, over: str, *, precision: Any = None, preferred_element_type: Any = None
) -> Array:
    """`leaf.product` split over the mesh as `leaf.partition` says.

    Contracting the axis that is split is row parallel (partial products are summed), the other
    column parallel. A mesh axis that splits both the weight and the batch (FSDP) gathers the
    weight, which is compressed then. Inside a `shard_map` over these axes the product is local.
    """
    partition: Partition = leaf.partition
    local = leaf.replace(partition=None)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    mesh = partition.mesh
    batch = partition.batch if x.shape[-2] % axes_size(partition.batch, mesh) == 0 else ()
    rows = tuple(name for name in partition.rows if name not in batch)
    columns = tuple(name for name in partition.contracted if name not in batch)
    manual = {*batch, *rows, *columns}
    inside = set(getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()))
    if not manual or manual & inside or axes_size(manual, mesh) == 1:
        return local.local_product(x, over, **options)
    summed, made = (columns, rows) if over == "k" else (rows, columns)

    def part(leaf: Any, x: Array) -> Array:
        y = leaf.local_product(x, over, **options)
        return lax.psum(y, summed) if summed else y

    lead = (None,) * len(leaf.lead)
    spec = _dense_spec(leaf, rows, columns)
    weights = buffer_specs(local, spec, mesh)
    if weights is None:
        return local.local_product(x, over, **options)
    operand = P(*lead, batch or None, summed or None)
    if _explicit(jax.sharding.get_abstract_mesh()):
        # With explicit axes nothing is moved that is not told to.
        x = jax.sharding.reshard(x, operand)
        local = jax.sharding.reshard(local, weights)
    return jax.shard_map(
        part,
        mesh=None if _explicit(jax.sharding.get_abstract_mesh()) else mesh,
        in_specs=(weights, operand),
        out_specs=P(*lead, batch or None, made or None),
        axis_names=manual,
    )(local, x)


def _explicit(mesh: Any) -> bool:
    return AxisType.Explicit in (mesh.axis_types or ())


def partition_of_types(codes: Array, x: Array, swapped: bool = False) -> Partition | None:
    """The partition that the types of the operands tell of, where mesh axes are explicit.

    Args:
      codes: a buffer `[*lead, rows, columns]`.
      x: the other operand `[*lead, M, K or N]`.
      swapped: whether `codes` is `[*lead, columns, rows]`.
    """
    mesh = jax.typeof(codes).sharding.mesh
    if not _explicit(mesh):
        return None
    rows, columns = map(_names, jax.typeof(codes).sharding.spec[-2:])
    batch = _names(jax.typeof(x).sharding.spec[-2])
    if swapped:
        rows, columns = columns, rows
    return Partition(mesh, rows, columns, batch) if rows or columns else None


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _dense_spec(leaf: Any, rows: tuple[str, ...], columns: tuple[str, ...]) -> Any:
    entries: list[Any] = [None] * leaf.ndim
    for axes, names in ((views.row_axes(leaf), rows), (views.contracted_axes(leaf), columns)):
        if axes:
            entries[axes[0]] = names or None
    return P(*entries)


def axes_size(names: Any, mesh: Any) -> int:
    """Number of devices along the mesh axes `names`."""
    return math.prod(mesh.shape[name] for name in names)


def buffer_specs(leaf: Any, spec: Any, mesh: Any) -> Any | None:
    """PartitionSpecs of the buffers, given that of the dense array; None: it does not fit them."""
    from jaxcompress.core.arrays.sharding import spec_of

    try:
        return spec_of(leaf, spec, mesh)
    except InputError:
        return None


def constrain(leaf: Any, sharding: Any) -> Any | None:
    """`lax.with_sharding_constraint`, buffer by buffer; None: it does not fit the buffers."""
    if not isinstance(sharding, NamedSharding):
        return lax.with_sharding_constraint(leaf, leaf.map(lambda _: sharding))
    if P.UNCONSTRAINED in sharding.spec:
        return leaf
    specs = buffer_specs(leaf, sharding.spec, sharding.mesh)
    if specs is None:
        return None
    named = jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    return lax.with_sharding_constraint(leaf, named)


def all_gather(leaf: Any, axis_name: Any, dimension: int) -> Any | None:
    """`lax.all_gather(..., tiled=True)` of a leading axis, or of the major row or column axis."""
    leaf = views.canonical(leaf)
    rows, columns = views.row_axes(leaf), views.contracted_axes(leaf)
    if dimension < len(leaf.lead):
        return leaf.map(lambda b: lax.all_gather(b, axis_name, axis=dimension, tiled=True))
    if dimension not in (rows[:1] + columns[:1]):
        return None
    role, axis = (ROWS, -2) if dimension in rows else (CONTRACTED, -1)
    if role == CONTRACTED and getattr(leaf, "pad", False):
        return None
    n = leaf.rows

    def gather(buffer: Array, roles: tuple[str, str]) -> Array:
        shared = role == ROWS and buffer.shape[-2] != n
        if roles[axis] != role or shared:
            return buffer
        return lax.all_gather(buffer, axis_name, axis=buffer.ndim + axis, tiled=True)

    return leaf.map_roles(gather)
