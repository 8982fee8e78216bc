"""Sharding: the dense array's PartitionSpec carried over to each buffer of a compressed array.

A buffer's axes have roles (rows, contracted, inner), so its spec follows from where the dense axes
go. A K shard must hold whole words of codes and whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.arrays.affine import CANONICAL, TPU, Affine
from jaxcompress.core.arrays.base import (
    CONTRACTED,
    ROWS,
    CompressedArray,
    Partition,
    is_compressed,
)
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.inputs import QuantizedInput
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.selection import select

Entry = str | tuple[str, ...] | None


def place(
    params: Any,
    shardings: Any = None,
    platform: str | None = None,
    *,
    batch: Sequence[str] = (),
    exclude: str | Sequence[str] | None = None,
) -> Any:
    """Put parameters where and how they will be used, once.

    Args:
      params: parameters; leaves may be compressed.
      shardings: `NamedSharding`s of the *dense* arrays, as a tree like `params` or a prefix of it
        (one sharding for all); None: they stay where they are.
      platform: "tpu": affine arrays of 4 and 8 bits get the layout that the TPU kernel reads;
        "cpu", "gpu", "cuda", "rocm": all get the canonical layout, in which they are stored and
        which these read; None: they keep theirs.
      batch: mesh axes over which the batch of the activations is split.
      exclude: patterns of paths that keep the canonical layout: tables that are gathered from.

    Returns:
      `params` with every buffer under its derived sharding, and each affine array told in its
      static `partition` how its products are to be split.

    Raises:
      InputError: a sharding does not fit a compressed leaf; the message names its path.
    """
    paths = [path for path, _ in leaves_with_paths(params)]
    reordered = set(paths) if exclude is None else set(select(paths, None, exclude))
    leaves, tree = jax.tree.flatten(params, is_leaf=is_compressed)
    wanted = [None] * len(leaves) if shardings is None else _per_leaf(shardings, params)
    placed = []
    for path, leaf, sharding in zip(paths, leaves, wanted, strict=True):
        if sharding is not None:
            leaf = with_partition(leaf, sharding, tuple(batch), path)
            leaf = jax.device_put(leaf, _sharding_of(leaf, sharding, path))
        if platform is not None:  # after it is spread out, so that no device reorders it whole
            leaf = in_layout(leaf, platform if path in reordered else "cpu")
            if sharding is not None:
                leaf = jax.device_put(leaf, _sharding_of(leaf, sharding, path))
        placed.append(leaf)
    return jax.tree.unflatten(tree, placed)


def shardings_of(params: Any, shardings: Any) -> Any:
    """A tree like `params` with the sharding of every buffer, such as `jax.jit` takes.

    Args:
      params: parameters (arrays or `jax.ShapeDtypeStruct`s); leaves may be compressed.
      shardings: as in `place`.

    Raises:
      InputError: a sharding does not fit a compressed leaf; the message names its path.
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=is_compressed)
    paths = [path for path, _ in leaves_with_paths(params)]
    wanted = _per_leaf(shardings, params)
    derived = [_sharding_of(leaf, s, p) for p, leaf, s in zip(paths, leaves, wanted, strict=True)]
    return jax.tree.unflatten(tree, derived)


def spec_of(leaf: Any, spec: P, mesh: Any, path: str = "") -> Any:
    """`leaf` with a PartitionSpec in the place of every buffer.

    Args:
      leaf: a compressed array, or anything else: then its spec is `spec`.
      spec: of the dense array.
      mesh: a mesh; only the sizes of its axes matter.
      path: of the leaf, for messages.

    Raises:
      InputError: `spec` cannot be carried over to the buffers.
    """
    if not is_compressed(leaf):
        return spec
    if getattr(leaf, "layout", CANONICAL) == TPU:
        return _tpu_specs(leaf, spec, mesh, path)
    lead, rows, columns = _folded(leaf, spec, mesh, path)
    _check_columns(leaf, _size(columns, mesh), path)

    def derive(buffer: Any, roles: tuple[str, str]) -> P:
        matrix = [{ROWS: rows, CONTRACTED: columns}.get(role) for role in roles]
        entries = [
            entry if size > 1 else None for entry, size in zip([*lead, *matrix], buffer.shape)
        ]
        for entry, size in zip(entries, buffer.shape):
            if size % _size(entry, mesh):
                raise InputError(
                    f"{_named(leaf, path)}: {spec} cuts an axis of {size} entries into "
                    f"{_size(entry, mesh)}; shard it over a divisor of {size}"
                )
        return P(*entries)

    return leaf.map_roles(derive)


def fitting_spec(leaf: Any, spec: P, mesh: Any) -> P:
    """`spec`, or where a compressed leaf cannot take it (see `spec_of`) as much of it as it can."""
    used = [i for i, entry in enumerate(spec) if entry is not None]
    without = [P(*(None if i == out else e for i, e in enumerate(spec))) for out in used]
    for kept in (spec, *without):
        try:
            spec_of(leaf, kept, mesh)
        except InputError:
            continue
        return kept
    return P()


def in_layout(leaf: Any, platform: str) -> Any:
    """`leaf` in the layout that the kernels of `platform` read, if it is an affine array."""
    if not isinstance(leaf, Affine):
        return leaf
    return leaf.with_layout(TPU if platform == "tpu" and leaf.has_tpu_layout else CANONICAL)


def _per_leaf(shardings: Any, params: Any) -> list[Any]:
    """One sharding for every leaf of `params`."""
    leaves, tree = jax.tree.flatten(params, is_leaf=is_compressed)
    whole = jax.tree.unflatten(tree, [0] * len(leaves))  # a compressed array is one leaf here
    return jax.tree.leaves(jax.tree.broadcast(shardings, whole))


def _sharding_of(leaf: Any, sharding: Any, path: str) -> Any:
    if not is_compressed(leaf):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return leaf.map(lambda _: sharding)
    specs = spec_of(leaf, sharding.spec, sharding.mesh, path)
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )


def with_partition(leaf: Any, sharding: Any, batch: tuple[str, ...], path: str = "") -> Any:
    """`leaf` with the static `partition` of its affine parts set.

    Args:
      leaf: any leaf; only affine arrays, alone or inside of others, carry a partition.
      sharding: of the dense array.
      batch: mesh axes over the batch of the activations.
      path: of the leaf, for messages.

    Raises:
      InputError: the sharding cannot be carried over to the buffers.
    """
    if isinstance(leaf, Sum):
        first, second = (with_partition(part, sharding, batch, path) for part in leaf.parts)
        return leaf.replace(first=first, second=second)
    if isinstance(leaf, QuantizedInput) and is_compressed(leaf.weight):
        weight = leaf.weight  # its dims may be others than those that the sharding is of
        placed = with_partition(leaf.bare(), sharding, batch, path)
        return leaf.replace(weight=placed.replace(dims=weight.dims, casts=weight.casts))
    if not isinstance(leaf, Affine):
        return leaf
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return leaf.replace(partition=None)
    _, rows, columns = _folded(leaf, sharding.spec, sharding.mesh, path)
    return leaf.replace(partition=Partition(sharding.mesh, _axes(rows), _axes(columns), batch))


def _tpu_specs(leaf: Affine, spec: P, mesh: Any, path: str) -> Affine:
    """Specs of codes `[*lead, words, N]`, scale and zero point `[*lead, groups, 1, N]`."""
    canonical = jax.eval_shape(lambda leaf: leaf.with_layout(CANONICAL), leaf)
    specs = spec_of(canonical, spec, mesh, path)

    def swap(spec: P, between: tuple[None, ...]) -> P:
        *lead, rows, columns = spec
        return P(*lead, columns, *between, rows)

    zero = specs.zero_point
    return leaf.replace(
        codes=swap(specs.codes, ()),
        scale=swap(specs.scale, (None,)),
        zero_point=None if zero is None else swap(zero, (None,)),
    )


def _folded(
    leaf: CompressedArray, spec: P, mesh: Any, path: str
) -> tuple[tuple[Entry, ...], Entry, Entry]:
    """Entries of the leading axes, of the rows N and of the columns K that `spec` amounts to."""
    shape = leaf.shape
    if len(spec) > len(shape):
        raise InputError(f"{_named(leaf, path)}: {spec} has more entries than the shape {shape}")
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    lead = len(leaf.lead)
    folds = {}
    for kind in "nk":
        axes: tuple[str, ...] = ()
        whole = True  # whether each device holds one index of the axes before
        for axis in range(lead, len(shape)):
            if leaf.dims[axis - lead][0] != kind:
                continue
            names = _axes(entries[axis])
            if names and not whole:
                raise InputError(
                    f"{_named(leaf, path)}: {spec} shards axis {axis} of {shape}, which is stored "
                    "folded behind another axis; shard the first of these axes instead"
                )
            axes += names
            whole = whole and shape[axis] == _size(names, mesh)
        folds[kind] = axes or None
    return entries[:lead], folds["n"], folds["k"]


def _check_columns(leaf: CompressedArray, shards: int, path: str) -> None:
    """Raise `InputError` unless K can be cut into `shards` pieces."""
    k, unit = leaf.contracted, leaf.column_unit
    if shards == 1 or (unit and k % (shards * unit) == 0):
        return
    what = f"{_named(leaf, path)}: {k} contracted columns cannot be cut into {shards} shards: "
    if not unit:
        raise InputError(what + "the values of a row are one run; shard its rows instead")
    what += f"a shard must be a multiple of {unit}"
    if isinstance(leaf, Affine) and leaf.groups > 1:
        what += f", lcm(32, group size {leaf.group_size})"
        if k % (32 * shards) == 0:
            fits = [g for g in range(1, k // shards + 1) if k // shards % g == 0]
            near = min(fits, key=lambda g: (abs(math.log(g / leaf.group_size)), g))
            raise InputError(f"{what}; the nearest group size that fits is {near}")
    most = max(n for n in range(1, shards + 1) if n == 1 or k % (n * unit) == 0)
    instead = f"cut it into {most}, or shard" if most > 1 else "shard"
    raise InputError(f"{what}; {instead} its rows instead")


def _axes(entry: Entry) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _size(entry: Entry, mesh: Any) -> int:
    return math.prod(mesh.shape[name] for name in _axes(entry))


def _named(leaf: CompressedArray, path: str) -> str:
    return f"{path} ({type(leaf).__name__})" if path else type(leaf).__name__
