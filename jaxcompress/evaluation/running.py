"""How evaluation runs a model: compiled once, on the devices that its parameters lie on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.readers.lift import Lifted, lift

BATCH_AXES = ("data", "fsdp")  # mesh axes over which a batch is split


def lifted(apply: Callable[..., Any]) -> Lifted:
    """`lift(apply)`, the same object for the same function, so that nothing compiles twice."""
    try:
        return _lifted(apply)
    except TypeError:  # a method of an unhashable object
        return lift(apply)


_lifted = functools.lru_cache(maxsize=8)(lift)


@dataclass(frozen=True)
class Placement:
    """Where a computation runs: on the devices of a mesh, or (None) wherever JAX puts it.

    Every process gives the same host arrays and gets the same host arrays back.
    """

    mesh: Mesh | None = None

    @classmethod
    def of(cls, *trees: Any) -> Placement:
        """The mesh of the first array that lies on one of several devices."""
        for leaf in jax.tree.leaves(trees):
            sharding = getattr(leaf, "sharding", None)
            if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
                assert isinstance(sharding.mesh, Mesh)  # that of an array
                return cls(sharding.mesh)
        return cls()

    @property
    def everywhere(self) -> NamedSharding | None:
        """A copy on every device: how results come back."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    @property
    def shards(self) -> int:
        """Parts that a batch is split into; its rows must be a multiple."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[a] for a in self._batch_axes)

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return tuple(a for a in BATCH_AXES if self.mesh is not None and a in self.mesh.shape)

    def batch(self, rows: np.ndarray) -> Any:
        """`rows` with its first axis split over the mesh."""
        if self.mesh is None:
            return rows
        sharding = NamedSharding(self.mesh, P(self._batch_axes or None))
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    def put(self, tree: Any) -> Any:
        """`tree`, of which the arrays that lie elsewhere than on the mesh are copied to all of it.

        A teacher that was loaded on one device may so stand beside a student on the mesh.
        """
        if self.mesh is None:
            return tree
        devices, everywhere = set(self.mesh.devices.flat), NamedSharding(self.mesh, P())

        def one(leaf: Any) -> Any:
            sharding = getattr(leaf, "sharding", None)
            if sharding is not None and set(sharding.device_set) == devices:
                return leaf
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, everywhere, lambda i: host[i])

        return jax.tree.map(one, tree)
