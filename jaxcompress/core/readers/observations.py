"""What `capture` observes inside bodies, and how it leaves them: as ordinary outputs.

Every body returns `(outputs, Observations)`. `Observations` is a pytree whose statistics are
children and whose description is static, so that the structure travels in the output tree of
`jit`, `scan` or `shard_map`, and cached bodies carry it. Uses name arguments of the body by their
position; each caller maps them to its own, and paths appear only at the top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn


@dataclass(frozen=True)
class Use:
    """One reading of a value: by the weight at `origin` (or under a name), on a source line."""

    origin: int | str
    line: str


@dataclass(frozen=True)
class Later:
    """A statistic left to the caller: of the body's argument `arg`, seen along these axes."""

    arg: int
    contracted: tuple[int, ...]
    batch: tuple[int, ...]


@jax.tree_util.register_pytree_node_class
@dataclass
class Observations:
    """Entries `uses[i]` (and `later[i]`) static, `statistics[i]` a dict of arrays or None."""

    uses: list[tuple[Use, ...]] = field(default_factory=list)
    later: list[Later | None] = field(default_factory=list)
    statistics: list[Any] = field(default_factory=list)

    def add(self, uses: Sequence[Use], later: Later | None, statistic: Any) -> None:
        """Append one entry."""
        self.uses.append(tuple(uses))
        self.later.append(later)
        self.statistics.append(statistic)

    def with_statistics(self, statistics: list[Any]) -> Observations:
        """The same entries with other statistics."""
        return Observations(list(self.uses), list(self.later), statistics)

    def split(self, first: Callable[[Use], bool]) -> tuple[Part, Part]:
        """The uses for which `first` holds, and the others; an entry may be part of both."""
        parts = (Part(), Part())
        for i, uses in enumerate(self.uses):
            for part, wanted in zip(parts, (True, False), strict=True):
                kept = tuple(use for use in uses if first(use) == wanted)
                if kept:
                    part.index.append(i)
                    part.uses.append(kept)
        return parts

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Children: the statistics."""
        return (self.statistics,), (tuple(self.uses), tuple(self.later))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Observations:
        """Inverse of `tree_flatten`."""
        return cls(list(static[0]), list(static[1]), children[0])


@dataclass
class Part:
    """Some of the entries of `Observations`, by position."""

    index: list[int] = field(default_factory=list)
    uses: list[tuple[Use, ...]] = field(default_factory=list)

    def observations(self, statistics: list[Any]) -> Observations:
        """These entries with the statistics given."""
        return Observations(list(self.uses), [None] * len(self.uses), list(statistics))


@dataclass(frozen=True)
class Settings:
    """What to observe."""

    statistics: tuple[Any, ...]
    names: tuple[str, ...] = ()


class Recorder:
    """Observes one frame."""

    def __init__(self, settings: Settings, mask: Any, defer: bool) -> None:
        self.settings, self.mask, self.defer = settings, mask, defer
        self.observations = Observations()

    def enter(self, args: Sequence[Any], origins: Sequence[int | None]) -> None:
        pass

    def before(self, eqn: JaxprEqn, operands: list[Any], origins: list[int | None]) -> Any:
        return None

    def after(self, eqn: JaxprEqn, operands: list[Any], outputs: list[Any]) -> None:
        pass

    def named_inside(self, eqn: JaxprEqn) -> bool:
        return False

    def absorb(self, seen: Observations, args: Sequence[Any], origins: Sequence[Any]) -> None:
        pass


def combine(a: Any, b: Any) -> Any:
    return {k: a[k] + b[k] for k in a}


def zeros_like(s: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), s)


def reduce_over_mesh(s: Any) -> Any:
    return jax.tree.map(lambda x: x.sum(0), s)
