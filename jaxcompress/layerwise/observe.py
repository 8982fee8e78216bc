"""Statistics of what the matrices of one piece multiply, summed over the calibration data.

Activation statistics of the rows x (tokens) that a matrix multiplies, sums in float32:

  second_moment `[*lead, K, K]`  sum of x x'
  sum_squares   `[*lead, K]`     sum of x^2
  sum_abs       `[*lead, K]`     sum of |x|
  sum_x         `[*lead, K]`     sum of x
  max_abs       `[*lead, K]`     the largest |x|
  zeros         `[*lead, K]`     number of zeros
  values, extremes               a histogram and ranges over all K, see `readers.statistics`
  count         `[*lead]`        number of rows
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.readers.capture import capture
from jaxcompress.core.readers.contractions import ContractedAxes, contractions
from jaxcompress.core.readers.statistics import STATISTICS, Statistic

Array = jax.Array

ACTIVATIONS: dict[str, Statistic] = {
    "second_moment": STATISTICS["second_moment"],
    "sum_squares": Statistic(
        "sum_squares", lambda x, weight: (jnp.square(x) * weight[..., None]).sum(-2)
    ),
    "sum_abs": Statistic("sum_abs", STATISTICS["mean_abs"].compute),
    "sum_x": Statistic("sum_x", lambda x, weight: (x * weight[..., None]).sum(-2)),
    "max_abs": STATISTICS["max_abs"],
    "zeros": STATISTICS["zeros"],
    "values": STATISTICS["values"],
    "extremes": STATISTICS["extremes"],
}
_ROWS = Statistic("rows", lambda x, weight: (x, weight))


@dataclass(frozen=True)
class Group:
    """Matrices that read the same values, in the order in which the program reads them.

    Attributes:
      paths: within the piece's parameters.
    """

    paths: tuple[str, ...]


class Observer:
    """Observes the selected matrices of a function `function(params, hidden)`.

    One observer serves every block of the same function: its programs are compiled once.

    Args:
      function: the piece's.
      paths: of the selected matrices, within the piece's parameters.
      wanted: names of activation statistics.
    """

    def __init__(
        self, function: Callable[[Any, Any], Any], paths: Sequence[str], wanted: Sequence[str]
    ) -> None:
        self.function, self.paths = function, tuple(paths)
        self.names = tuple(name for name in wanted if name in ACTIVATIONS)
        self._captures: dict[tuple[tuple[str, ...], bool], Callable[..., Any]] = {}
        self._readers: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        self._axes: dict[str, ContractedAxes] | None = None

    def axes(self, params: Any, hidden: Any) -> dict[str, ContractedAxes]:
        """Contracted axes by path, those of equal blocks the same; `hidden` is `[chunks, ...]`."""
        if self._axes is None:
            self._axes = contractions(self.function)(params, first(hidden))
        return self._axes

    def groups(self, params: Any, hidden: Any) -> list[Group]:
        """The selected matrices that something reads, in groups that share an input."""
        keys = self._keys(self.paths, params, hidden)
        made: list[set[str]] = []
        for paths in keys:
            joined = [group for group in made if group & set(paths)]
            for group in joined[1:]:
                joined[0] |= group
                made.remove(group)
            if joined:
                joined[0].update(paths)
            else:
                made.append(set(paths))
        return [Group(tuple(p for p in self.paths if p in group)) for group in made]

    def statistics(
        self, paths: Sequence[str], params: Any, hidden: Any
    ) -> dict[str, dict[str, Array]]:
        """`{path: {statistic: sum over all chunks}}`; matrices that share an input share a dict.

        Args:
          paths: some of the selected ones.
          params: of the piece.
          hidden: `[chunks, samples, ...]` of every leaf.
        """
        keys = self._keys(paths, params, hidden)
        found = summed(self.capture(tuple(paths)), params, hidden)
        return _by_path(keys, found, lambda a, b: {n: _combined(n, a[n], b[n]) for n in a})

    def cross_moments(
        self, paths: Sequence[str], params: Any, hidden: Any, dense_params: Any, dense_hidden: Any
    ) -> dict[str, Array]:
        """`{path: X'Y [*lead, K, K]}`: X the rows that a matrix reads, Y the dense model's."""
        keys = self._keys(paths, params, hidden)
        given = (params, dense_params), (hidden, dense_hidden)
        found = _crossed(self.capture(tuple(paths), rows=True), *given)
        return _by_path(keys, found, jnp.add)

    def capture(self, paths: tuple[str, ...], rows: bool = False) -> Callable[..., Any]:
        """`captured(params, chunk)`: the statistics that these paths read, or the rows."""
        if (paths, rows) not in self._captures:
            wanted = [_ROWS] if rows else [ACTIVATIONS[name] for name in self.names]
            self._captures[paths, rows] = capture(
                self.function, wanted, include=[_literal(path) for path in paths]
            )
        return self._captures[paths, rows]

    def _keys(self, paths: Sequence[str], params: Any, hidden: Any) -> list[tuple[str, ...]]:
        """The paths that read each observed value; those of equal blocks are the same."""
        if tuple(paths) in self._readers:
            return self._readers[tuple(paths)]
        found: list[tuple[str, ...]] = []

        def trace(params: Any, chunk: Any) -> Any:
            values = list(_shared(self.capture(tuple(paths))(params, chunk)))
            found.extend(paths for paths, _ in values)
            return [statistics for _, statistics in values]

        jax.eval_shape(trace, params, first(hidden))
        self._readers[tuple(paths)] = found
        return found


def first(hidden: Any) -> Any:
    """The first chunk of a hidden state, as shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), hidden)


def _literal(path: str) -> str:
    """A pattern that matches this path alone."""
    return "".join(f"[{c}]" if c in "*?[{" else c for c in path)


def _shared(found: Mapping[tuple[str, int], Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each distinct value once, with the paths that read it."""
    paths: dict[int, list[str]] = {}
    values = {}
    for (path, _), value in found.items():
        paths.setdefault(id(value), []).append(path)
        values[id(value)] = value
    return ((tuple(dict.fromkeys(paths[key])), value) for key, value in values.items())


@partial(jax.jit, static_argnums=0)
def summed(captured: Callable[..., Any], params: Any, hidden: Any) -> list[dict[str, Array]]:
    """Of each distinct value that `captured` observes, the statistics over `[chunks, ...]`.

    On a mesh every device sums up what it has seen, and the sums are added once, at the end.
    """

    def of_chunk(chunk: Any) -> list[dict[str, Array]]:
        return [value for _, value in _shared(captured(params, chunk))]

    def step(total: Any, chunk: Any) -> tuple[Any, None]:
        found = of_chunk(chunk)
        return [{n: _combined(n, a[n], b[n]) for n in a} for a, b in zip(total, found)], None

    shapes = jax.eval_shape(of_chunk, first(hidden))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, start, hidden)[0]


@partial(jax.jit, static_argnums=0)
def _crossed(captured: Callable[..., Any], params: Any, hidden: Any) -> list[Array]:
    def of_chunk(chunk: Any) -> list[Array]:
        ours, theirs = (
            [value["rows"] for _, value in _shared(captured(p, h))] for p, h in zip(params, chunk)
        )
        return [
            jnp.einsum(
                "...tk,...tl->...kl",
                x * weight[..., None],
                y,
                precision=jax.lax.Precision.HIGHEST,
            )
            for (x, weight), (y, _) in zip(ours, theirs, strict=True)
        ]

    def step(total: Any, chunk: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_chunk(chunk)), None

    shapes = jax.eval_shape(of_chunk, first(hidden))
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, start, hidden)[0]


def _combined(name: str, a: Any, b: Any) -> Any:
    return ACTIVATIONS[name].combine(a, b) if name in ACTIVATIONS else a + b


def _by_path(
    keys: Sequence[tuple[str, ...]], found: Sequence[Any], combine: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for paths, value in zip(keys, found, strict=True):
        for path in paths:  # a matrix that is read twice has seen the rows of both
            out[path] = combine(out[path], value) if path in out else value
    return out


def activation_names(names: Collection[str]) -> list[str]:
    """Those of `names` that come from activations; `count` comes along with any of them."""
    return [name for name in names if name in ACTIVATIONS]
