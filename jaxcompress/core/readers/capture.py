"""`capture(fn, statistics)`: run a function, and leave statistics of what its weights multiply.

The walk of `lift`, asked for statistics. Each product of a selected parameter with a value that
depends on the inputs is observed: the value's rows of K features, K in the order of the
parameter's contracted axes. Statistics are ordinary outputs, so that it works under `jit` and on a
mesh; compressed parameters are run as by `lift`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers import unofficial
from jaxcompress.core.readers.array_rules import ARRAY_RULES
from jaxcompress.core.readers.observations import Observations, Settings, bytes_of
from jaxcompress.core.readers.origins import Given, Tag
from jaxcompress.core.readers.rules import RULES
from jaxcompress.core.readers.statistics import STATISTICS, Statistic, histogram_edges
from jaxcompress.core.readers.tracing import Tracer, is_array, unwrap_static
from jaxcompress.core.readers.unofficial import Body
from jaxcompress.core.readers.walk import Walk
from jaxcompress.core.selection import select

__all__ = ["Statistic", "capture", "combine", "histogram_edges", "means"]

Patterns = str | Sequence[str] | None
Wanted = str | Statistic | Callable[..., Any]
Key = tuple[str, int]


def capture(
    fn: Callable[..., Any],
    statistics: Wanted | Sequence[Wanted],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    names: Sequence[str] = (),
    with_outputs: bool = False,
    limit_bytes: int | None = None,
) -> Callable[..., Any]:
    """Observe what the parameters of `fn(params, *args, **kwargs)` multiply.

    The result of `capture(fn, ...)(params, *args, token_mask=None, **kwargs)` is a dict from
    (path, use) to a dict of statistics: use 0, 1, ... counts the products that read the parameter,
    in the order of the program. Products that read one value share one dict.

      "second_moment": X'X `[K, K]`
      "mean_abs": the sum of |x| `[K]`; over `count`, the mean
      "max_abs": the largest |x| `[K]`
      "histogram": how many |x| are in each bin of `histogram_edges()`, over all features
      "zeros": the number of zeros `[K]`; over `count`, their fraction
      "values", "extremes": a signed histogram, and ranges, of all features together; see
        `readers.statistics`
      "count": over how many rows (tokens), always there

    Batch axes of the product (experts) and the axes of scans over the parameter (layers) lead.
    Loops that read a parameter again add to its statistics; a branch that is not taken leaves a
    count of 0. `combine` adds the results of several batches, `means` divides by the counts.

    A `token_mask` `[batch, tokens]` (True, or a weight, where a token counts) is matched with the
    leading axes of each value that are no features: both, their product in one axis, or the batch
    alone (then a sequence counts if any of its tokens does).

    Args:
      fn: any JAX function whose first argument is a pytree of parameters.
      statistics: names as above, functions or `Statistic`s, one or several. A function
        `f(x [*batch, rows, K], weight [*batch, rows])` gives a pytree of arrays that are summed.
      include: patterns of paths to observe; None: all parameters.
      exclude: patterns of paths to leave out.
      names: values tagged with `jax.ad_checkpoint.checkpoint_name` to observe as well, their last
        axis as features, under (name, use); stacked along a scan.
      with_outputs: whether to return (outputs, statistics).
      limit_bytes: refuse, before anything is computed, if the statistics and the largest single
        value, in float32, take more than this; None: no limit.

    Raises:
      InputError: an unknown statistic, a mask that does not fit, or more than `limit_bytes`.
    """
    settings = Settings(_statistics(statistics), tuple(names))
    observed = Observed(fn, settings, include, exclude)

    def run(params: Any, *args: Any, token_mask: Any = None, **kwargs: Any) -> Any:
        if limit_bytes is not None:
            observed.check_memory(limit_bytes, params, args, kwargs, token_mask)
        outputs, found = observed(params, args, kwargs, token_mask)
        return (outputs, found) if with_outputs else found

    run.observed = observed  # type: ignore[attr-defined]
    return run


class Observed:
    """A function whose parameters are observed; holds the caches of its walk."""

    def __init__(
        self, fn: Callable[..., Any], settings: Settings, include: Patterns, exclude: Patterns
    ) -> None:
        unofficial.warn_if_unknown()
        self.walk = Walk(RULES, ARRAY_RULES, settings)
        self.tracer = Tracer(fn, self.walk.traces)
        self.include, self.exclude = include, exclude

    def __call__(
        self, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any
    ) -> tuple[Any, dict[Key, dict[str, Any]]]:
        """Outputs, and statistics by (path, use)."""
        traced = self.tracer((params, *args), kwargs)
        parameters = self.parameters(params)
        given = self.given(parameters, traced.values)
        body = Body.of(traced.closed)
        inputs = [*body.consts, *traced.values]
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((inputs, mask))):
            outputs, seen = self.walk.run(body, traced.values, given, mask)
        else:
            run = self.walk.jitted(
                Body(traced.closed.jaxpr), "captured", given, hoisted=len(body.consts), defer=False
            )
            outputs, seen = run(mask, *inputs)
        outputs = unwrap_static(jax.tree.unflatten(traced.out_tree, outputs))
        return outputs, by_path(seen, [path for path, _ in parameters])

    def observe(
        self, params: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Any = None
    ) -> tuple[Observations, list[tuple[str, Any]]]:
        """Abstract observations, nothing computed; and the parameters by position."""
        traced = self.tracer((params, *args), kwargs)
        parameters = self.parameters(params)
        given = self.given(parameters, traced.values)
        seen = jax.eval_shape(
            lambda values, mask: self.walk.run(Body.of(traced.closed), values, given, mask)[1],
            traced.values,
            mask,
        )
        return seen, parameters

    def check_memory(
        self,
        limit: int,
        params: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mask: Any,
    ) -> None:
        """Raise `InputError` if the statistics would take more than `limit` bytes."""
        seen, parameters = self.observe(params, args, kwargs, mask)
        sizes = [bytes_of(statistic) for statistic in seen.statistics]
        need = sum(sizes) + 4 * self.walk.largest
        if need <= limit:
            return
        i = max(range(len(sizes)), key=sizes.__getitem__)
        origin = seen.entries[i].uses[0].origin
        name = origin if isinstance(origin, str) else parameters[origin][0]
        raise InputError(
            f"capture: statistics need {need:,} bytes, more than limit_bytes={limit:,}; the "
            f"largest, {sizes[i]:,} bytes, is that of {name}; choose fewer parameters with "
            "include= and walk the model in parts, or take mean_abs instead of second_moment"
        )

    @staticmethod
    def parameters(params: Any) -> list[tuple[str, Any]]:
        """Array leaves by path, in the order in which they are traced."""
        return [(path, leaf) for path, leaf in leaves_with_paths(params) if is_array(leaf)]

    def given(self, parameters: list[tuple[str, Any]], values: list[Any]) -> list[Given]:
        """What the body is told: selected parameters are tagged, the others are constants."""
        chosen = set(select([path for path, _ in parameters], self.include, self.exclude))
        tags: list[Given] = [
            Tag(((),) * len(leaf.shape)) if path in chosen else False for path, leaf in parameters
        ]
        return tags + [None] * (len(values) - len(parameters))


def by_path(seen: Observations, paths: list[str]) -> dict[Key, dict[str, Any]]:
    """Statistics by (path or name, use)."""
    uses: Counter[str] = Counter()
    out: dict[Key, dict[str, Any]] = {}
    for entry, statistic in zip(seen.entries, seen.statistics, strict=True):
        for use in entry.uses:
            name = use.origin if isinstance(use.origin, str) else paths[use.origin]
            out[name, uses[name]] = statistic
            uses[name] += 1
    return out


def combine(a: dict[Key, Any], b: dict[Key, Any]) -> dict[Key, Any]:
    """Statistics of two batches together: sums are added, of maxima the larger is taken."""
    if a.keys() != b.keys():
        odd = sorted(map(str, a.keys() ^ b.keys()))[0]
        raise InputError(f"combine: {odd} is in one of the results only; capture both alike")

    def one(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {
            name: STATISTICS.get(name, Statistic(name, max)).combine(a[name], b[name]) for name in a
        }

    made: dict[tuple[int, int], dict[str, Any]] = {}  # what was shared stays shared
    for key in a:
        both = (id(a[key]), id(b[key]))
        if both not in made:
            made[both] = one(a[key], b[key])
    return {key: made[id(a[key]), id(b[key])] for key in a}


def means(statistics: dict[str, Any]) -> dict[str, Any]:
    """One result with its sums divided by `count` (at least 1); all else as it is."""
    count = jax.numpy.maximum(statistics["count"], 1)

    def mean(name: str, value: Any) -> Any:
        if name == "count" or (name in STATISTICS and not STATISTICS[name].summed):
            return value
        return jax.tree.map(
            lambda x: x / count.reshape(*count.shape, *(1,) * (x.ndim - count.ndim)), value
        )

    return {name: mean(name, value) for name, value in statistics.items()}


def _statistics(wanted: Wanted | Sequence[Wanted]) -> tuple[Statistic, ...]:
    several = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
    out = []
    for item in several:
        if isinstance(item, Statistic):
            out.append(item)
        elif isinstance(item, str):
            if item not in STATISTICS:
                known = ", ".join(STATISTICS)
                raise InputError(f"statistic {item!r} is unknown; there are {known}, or a function")
            out.append(STATISTICS[item])
        elif callable(item):
            out.append(Statistic(getattr(item, "__name__", "statistic"), item))
        else:
            raise InputError(f"statistics: {item!r} is neither a name nor a function")
    if len({s.name for s in out} | {"count"}) != len(out) + 1:
        raise InputError("statistics: two of them have one name, or one is called count")
    return tuple(out)
