"""What `capture` observes inside bodies, and how it leaves them: as ordinary outputs.

Every body returns `(outputs, Observations)`. `Observations` is a pytree whose statistics are
children and whose description is static, so that the structure travels in the output tree of
`jit`, `scan` or `shard_map`, and cached bodies carry it. Uses name arguments of the body by their
position; each caller maps them to its own, and paths appear only at the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.readers.origins import Axis, Origin, Origins, compose
from jaxcompress.core.readers.statistics import COUNT, Statistic


@dataclass(frozen=True)
class Use:
    """One reading of a value: by a product with a weight, or under a name.

    Attributes:
      origin: position of the weight among the body's arguments, or the name.
      line: source line.
      contracted: atoms of the weight that were contracted, in the order of the features.
      batch: atoms that were batch axes of the product.
      free: atoms that made the output.
      product: False for a table that was gathered from.
    """

    origin: int | str
    line: str
    contracted: Axis = ()
    batch: Axis = ()
    free: Axis = ()
    product: bool = True

    def seen_from(self, origin: Origin, shape: Sequence[int], skip: int) -> Use:
        """The same use in terms of a caller's origin of the argument."""
        parts = (self.contracted, self.batch, self.free)
        contracted, batch, free = (compose(atoms, origin, shape, skip) for atoms in parts)
        return replace(self, origin=origin.arg, contracted=contracted, batch=batch, free=free)


@dataclass(frozen=True)
class View:
    """How a value is seen as rows of features.

    Attributes:
      features: its axes that make the features, in order.
      batch: axes that each have statistics of their own.
      gather: mesh axes over which the features are split, inside shard_map.
      copies: other mesh axes over which the weight is split, so that the value is not.
    """

    features: tuple[int, ...]
    batch: tuple[int, ...] = ()
    gather: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One observed value.

    Attributes:
      uses: who read it.
      later: (position of the body's argument, view), where the caller is to observe it.
      rows_over: mesh axes over which its rows are split, inside shard_map.
    """

    uses: tuple[Use, ...]
    later: tuple[int, View] | None = None
    rows_over: tuple[str, ...] = ()


@jax.tree_util.register_pytree_node_class
@dataclass
class Observations:
    """Entries, static, and the statistics of each: a dict of arrays, or None (see `later`).

    `returns` says what each output of the body is made of, in terms of its arguments.
    """

    entries: list[Entry] = field(default_factory=list)
    statistics: list[Any] = field(default_factory=list)
    returns: tuple[Origins, ...] = ()

    def with_statistics(self, statistics: Sequence[Any]) -> Observations:
        """The same entries with other statistics."""
        return Observations(list(self.entries), list(statistics), self.returns)

    def split(self, first: Callable[[Use], bool]) -> tuple[Part, Part]:
        """The uses for which `first` holds, and the others; an entry may be part of both."""
        parts = (Part(), Part())
        for i, entry in enumerate(self.entries):
            for part, wanted in zip(parts, (True, False), strict=True):
                kept = tuple(use for use in entry.uses if first(use) == wanted)
                if kept:
                    part.index.append(i)
                    part.entries.append(replace(entry, uses=kept))
        return parts

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Children: the statistics."""
        return (self.statistics,), (tuple(self.entries), self.returns)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Observations:
        """Inverse of `tree_flatten`."""
        return cls(list(static[0]), children[0], static[1])


@dataclass
class Part:
    """Some of the entries of `Observations`, by position."""

    index: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def observations(self, statistics: Sequence[Any]) -> Observations:
        """These entries with the statistics given."""
        return Observations(list(self.entries), list(statistics))


@dataclass(frozen=True)
class Settings:
    """What to observe: statistics of the values that weights read, and of values under names.

    Attributes:
      statistics: which; none: only uses are noted, as `contractions` wants.
      names: of `checkpoint_name`.
      gathers: whether tables that are gathered from are noted.
    """

    statistics: tuple[Statistic, ...]
    names: tuple[str, ...] = ()
    gathers: bool = False

    def compute(self, x: Any, weight: Any) -> dict[str, Any]:
        """Statistics of x `[*batch, rows, K]`, rows weighted `[*batch, rows]`."""
        if not self.statistics:
            return {}
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        return {s.name: s.compute(x, weight) for s in (*self.statistics, COUNT)}

    def combine(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        """Statistics of two sets of rows."""
        return {s.name: s.combine(a[s.name], b[s.name]) for s in self._of(a)}

    def over_mesh(
        self, stacked: dict[str, Any], sizes: dict[str, int], rows_over: Sequence[str]
    ) -> dict[str, Any]:
        """Statistics with a leading axis over all of a mesh: rows combined, copies dropped."""
        axes = tuple(i for i, name in enumerate(sizes) if name in rows_over)
        first = tuple(slice(None) if name in rows_over else slice(0, 1) for name in sizes)
        every = tuple(range(len(sizes)))
        assert set(axes) <= set(every)

        def reduce(statistic: Statistic) -> Any:
            unfolded = jax.tree.map(
                lambda x: x.reshape(*sizes.values(), *x.shape[1:])[first], stacked[statistic.name]
            )
            return statistic.reduce(unfolded, every)

        return {s.name: reduce(s) for s in self._of(stacked)}

    def _of(self, statistics: dict[str, Any]) -> list[Statistic]:
        return [s for s in (*self.statistics, COUNT) if s.name in statistics]


def zeros_like(statistics: Any) -> Any:
    """Statistics of no rows."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), statistics)


def bytes_of(statistics: Any) -> int:
    """Bytes that statistics take."""
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(statistics))
