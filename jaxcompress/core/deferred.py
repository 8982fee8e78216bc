"""Leaves that stay on the disk until they are needed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxcompress.core.arrays.base import is_compressed


@dataclass(frozen=True, eq=False)
class Deferred:
    """A leaf whose shape is known and whose values are read each time that they are asked for.

    Attributes:
      read: gives the array, or the compressed array.
      like: its shapes: a `jax.ShapeDtypeStruct`, or a compressed array of them.
    """

    read: Callable[[], Any]
    like: Any

    @classmethod
    def of(cls, leaf: Any, read: Callable[[], Any]) -> Deferred:
        """What takes the place of a leaf that `read` gives again."""
        return cls(read, jax.eval_shape(lambda: leaf))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense array."""
        return self.like.shape

    @property
    def ndim(self) -> int:
        """Of the dense array."""
        return len(self.like.shape)

    @property
    def size(self) -> int:
        """Entries of the dense array."""
        return self.like.size

    @property
    def dtype(self) -> Any:
        """Of the dense array."""
        return self.like.dtype


def in_memory(leaf: Any) -> Any:
    """The leaf itself, read where it is deferred."""
    return leaf.read() if isinstance(leaf, Deferred) else leaf


def is_deferred(params: Any) -> bool:
    """Whether a leaf among these is deferred."""
    return any(isinstance(leaf, Deferred) for leaf in jax.tree.leaves(params))


def as_shapes(params: Any) -> Any:
    """The tree with shapes for what is deferred."""
    return jax.tree.map(lambda leaf: leaf.like if isinstance(leaf, Deferred) else leaf, params)


def return_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it (glibc).

    Of arrays of many sizes that come and go it otherwise keeps as much again as is in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def parameters_read(function: Callable[..., Any], params: Any, *inputs: Any) -> list[bool]:
    """Which leaves of `params` a function reads, in the order of the tree; nothing is computed.

    Args:
      function: `function(params, *inputs)`.
      params: leaves of which shape and dtype are known.
      *inputs: arrays or shapes.
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=is_compressed)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    program = jax.make_jaxpr(function)(jax.tree.unflatten(tree, shapes), *inputs).jaxpr
    used = {id(x) for eqn in program.eqns for x in eqn.invars} | {id(x) for x in program.outvars}
    return [id(x) in used for x in program.invars[: len(leaves)]]
