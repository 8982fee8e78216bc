"""What the reference models tell the compiler of a mesh: batches stay split, tables are gathered.

Left to itself it may rather gather a batch on every device than the weights that `fsdp` splits.
Outside of a program that is traced under a mesh with these axes, all of this does nothing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")  # mesh axes over which a batch is split


def batch_split(x: Array) -> Array:
    """`x` with its first axis, the batch, split; how the others lie is left open."""
    shards = _shards()
    if not x.ndim or x.shape[0] % shards:
        return x
    return _constrained(x, BATCH_AXES, *(P.UNCONSTRAINED,) * (x.ndim - 1))


def rows_whole(table: Array) -> Array:
    """A table `[entries, features]` with whole rows on every device that looks rows up."""
    return _constrained(table, P.UNCONSTRAINED, None)


def _constrained(x: Array, *spec: Any) -> Array:
    return x if _shards() == 1 else jax.lax.with_sharding_constraint(x, P(*spec))


def _shards() -> int:
    """Pieces of a batch under the mesh in force, 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    if any(types.get(name) is not AxisType.Auto for name in BATCH_AXES):
        return 1
    return math.prod(mesh.shape[name] for name in BATCH_AXES)
