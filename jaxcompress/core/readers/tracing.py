"""From a user's call to a jaxpr on dense shapes, and back to the user's output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxcompress.core.arrays.base import is_compressed


def is_array(x: Any) -> bool:
    """Whether a leaf is traced; everything else is static."""
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
    return isinstance(x, kinds) or is_compressed(x)


def abstract(x: Any) -> Any:
    """Aval of an array, or the ShapeDtypeStruct itself."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


@functools.lru_cache(maxsize=4096)
def _dense_aval(tree: Any, avals: tuple[Any, ...]) -> Any:
    return jax.eval_shape(lambda *leaves: jax.tree.unflatten(tree, leaves).dense(), *avals)


def dense_aval(x: Any) -> Any:
    """Aval of the dense array: shape, dtype, weak type, sharding, varying mesh axes."""
    if not is_compressed(x):
        return abstract(x)
    leaves, tree = jax.tree.flatten(x)
    return _dense_aval(tree, tuple(map(abstract, leaves)))


@jax.tree_util.register_pytree_node_class
class Static:
    """A value that is no array, inside an output pytree."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        """No children."""
        return (), self.value

    @classmethod
    def tree_unflatten(cls, value: Any, children: Any) -> Static:
        """Inverse of `tree_flatten`."""
        return cls(value)


def unwrap_static(tree: Any) -> Any:
    """`tree` with every `Static` replaced by its value."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Static) else x,
        tree,
        is_leaf=lambda x: isinstance(x, Static),
    )


@dataclass(frozen=True)
class Traced:
    """One call of a function, traced.

    Attributes:
      closed: the jaxpr, on dense shapes; closed-over arrays are its constants.
      values: the array leaves of the call, in the order of the jaxpr's inputs.
      out_tree: tree of the outputs; values that are no arrays stand in it as `Static`.
    """

    closed: ClosedJaxpr
    values: list[Any]
    out_tree: Any


class Tracer:
    """Traces one function; a second call of the same structure and shapes traces nothing."""

    def __init__(self, fn: Callable[..., Any], traces: dict[str, int]) -> None:
        self.fn, self.traces = fn, traces
        self.flat: dict[Any, Callable[..., Any]] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
        """Trace a call. Array leaves are traced, all other leaves are static.

        Static leaves are told apart by type too: True is not 1.
        """
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_compressed)
        static = tuple(None if is_array(x) else (x, type(x)) for x in leaves)
        try:
            flat = self.flat.get((tree, static))
        except TypeError:  # an unhashable static leaf: nothing to look up
            flat = self._flattened(tree, static)
        else:
            if flat is None:
                flat = self.flat[tree, static] = self._flattened(tree, static)
        values = [x for x in leaves if is_array(x)]
        closed, out = jax.make_jaxpr(flat, return_shape=True)(*map(dense_aval, values))
        return Traced(closed, values, jax.tree.structure(out))

    def _flattened(self, tree: Any, static: tuple[Any, ...]) -> Callable[..., Any]:
        def flat(*arrays: Any) -> Any:
            self.traces["function"] += 1
            it = iter(arrays)
            args, kwargs = jax.tree.unflatten(
                tree, [next(it) if s is None else s[0] for s in static]
            )
            out = self.fn(*args, **kwargs)
            return jax.tree.map(lambda x: x if is_array(x) else Static(x), out)

        flat.__name__ = flat.__qualname__ = getattr(self.fn, "__name__", "lifted")
        return flat
