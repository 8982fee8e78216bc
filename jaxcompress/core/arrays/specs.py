"""Shardings of a dense array carried over to the buffers of a compressed one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import jax
from jax import lax
from jax.sharding import NamedSharding

from jaxcompress.core.arrays import views
from jaxcompress.core.arrays.base import CONTRACTED, ROWS, Array, CompressedArray, Partition

P = jax.P


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _size(entry: Any, mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))


def _by_axis(leaf: CompressedArray, spec: Any) -> tuple[list[Any], Any, Any] | None:
    """(entries of the leading axes, of the rows, of the columns) of a dense spec.

    None where a spec splits a row or contracted axis that is not the major one.
    """
    entries = [*spec, *[None] * (leaf.ndim - len(spec))]
    rows = [entries[axis] for axis in views.row_axes(leaf)]
    columns = [entries[axis] for axis in views.contracted_axes(leaf)]
    if any(entry is not None for entry in rows[1:] + columns[1:]):
        return None
    return entries[: len(leaf.lead)], (rows or [None])[0], (columns or [None])[0]


def buffer_specs(leaf: CompressedArray, spec: Any, mesh: Any) -> Any | None:
    """PartitionSpecs of the buffers of `leaf`, given that of the dense array.

    Args:
      leaf: any compressed array.
      spec: PartitionSpec of the dense array.
      mesh: the mesh that the spec names axes of.

    Returns:
      The array with a PartitionSpec in the place of each buffer, or None where the spec cannot be
      carried over: it cuts through a word of codes, a group, the padding, or a minor axis.
    """
    parts = _by_axis(leaf, spec)
    if parts is None:
        return None
    lead, rows, columns = parts
    # Words and groups must both be cut at the same columns.
    pieces = _size(columns, mesh)
    if pieces > 1 and (getattr(leaf, "pad", 0) or leaf.contracted % pieces):
        return None
    ok = True

    def spec_of(buffer: Array, roles: tuple[str, str]) -> Any:
        nonlocal ok
        entries: list[Any] = []
        for size, role in zip(buffer.shape[-2:], roles, strict=True):
            entry = {ROWS: rows, CONTRACTED: columns}.get(role)
            # A single entry stands for all: every shard has it.
            entry = None if size == 1 else entry
            ok = ok and size % _size(entry, mesh) == 0
            entries.append(entry)
        return P(*lead, *entries)

    specs = leaf.map_roles(spec_of)
    return specs if ok else None


def buffer_shardings(leaf: CompressedArray, sharding: Any) -> Any | None:
    """Shardings of the buffers of `leaf`, given that of the dense array; None: see buffer_specs."""
    if not isinstance(sharding, NamedSharding):
        return leaf.map(lambda _: sharding)
    specs = buffer_specs(leaf, sharding.spec, sharding.mesh)
    if specs is None:
        return None
    named = [NamedSharding(sharding.mesh, s) for s in _spec_leaves(specs)]
    return jax.tree.unflatten(jax.tree.structure(leaf), named)


def _spec_leaves(specs: Any) -> list[Any]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))


def constrain(leaf: Any, sharding: Any) -> Any | None:
    """`lax.with_sharding_constraint`, buffer by buffer."""
    shardings = buffer_shardings(leaf, sharding)
    return None if shardings is None else lax.with_sharding_constraint(leaf, shardings)


def all_gather(leaf: Any, axis_name: Any, dimension: int) -> Any | None:
    """`lax.all_gather(..., tiled=True)` of a leading axis, or of the major row or column axis."""
    rows, columns = views.row_axes(leaf), views.contracted_axes(leaf)
    if dimension < len(leaf.lead):
        return leaf.map(lambda b: lax.all_gather(b, axis_name, axis=dimension, tiled=True))
    if dimension not in (rows[:1] + columns[:1]) or not views.is_canonical(leaf):
        return None
    role, axis = (ROWS, -2) if dimension in rows else (CONTRACTED, -1)
    if role == CONTRACTED and getattr(leaf, "pad", 0):
        return None
    n = leaf.rows

    def gather(buffer: Array, roles: tuple[str, str]) -> Array:
        shared = role == ROWS and buffer.shape[-2] != n
        if roles[axis] != role or shared:
            return buffer
        return lax.all_gather(buffer, axis_name, axis=buffer.ndim + axis, tiled=True)

    return leaf.map_roles(gather)


def partitioned(leaf: Any, sharding: Any, batch: Sequence[str] = ()) -> Any:
    """`leaf` with the static `partition` that a dense sharding means for its products.

    Args:
      leaf: a compressed array.
      sharding: NamedSharding of the dense array.
      batch: mesh axes over the batch of the other operand.

    Returns:
      `leaf` itself where its class carries no partition or the sharding cannot be carried over.
    """
    if not hasattr(leaf, "partition") or not isinstance(sharding, NamedSharding):
        return leaf
    parts = _by_axis(leaf, sharding.spec)
    if parts is None or buffer_specs(leaf, sharding.spec, sharding.mesh) is None:
        return leaf
    partition = Partition(sharding.mesh, _names(parts[1]), _names(parts[2]), tuple(batch))
    return replace(cast(Any, leaf), partition=partition)
