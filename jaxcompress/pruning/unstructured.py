"""Methods of single weights: every score with every pattern, scope and allocation.

`method(score)` makes a `core.method.Method` of a score (`pruning.scores`): its options are those
of `Options` and the score's own, its statistics those that the score names.
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.sparsify import Store
from jaxcompress.core.arrays.sparsify import store as kept
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Matrices, Method
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.observe import activation_names
from jaxcompress.pruning import allocation as allocations
from jaxcompress.pruning import patterns
from jaxcompress.pruning.scores import SCOPES, SCORES, Score

# `measure(index, function)`: by how much the loss grows if the result of `function(matrix,
# **statistics)` takes the place of that matrix, in the order of the survey.
Measure = Callable[[int, Callable[..., Any]], float]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the methods of all scores have in common.

    Attributes:
      sparsity: fraction removed, exactly floor(sparsity * n) of each unit; n:m ignores it.
      pattern: "unstructured", n:m such as 2:4 (keep 2 of every 4 contracted columns), or
        block:RxC (whole blocks of R rows and C contracted columns, by the sum of their scores).
      scope: the unit in which the fraction is exact: every layer, every row, or all together (the
        matrices that `compress` selects; called by itself, those of `weight`).
      allocation: how much of each matrix goes, all together exactly the fraction: "uniform" the
        same; "global" by one threshold over all scores (with scope row: then evenly over its
        rows); "erk" smaller matrices keep more (arXiv:1911.11134); "owl" blocks with more outliers
        keep more (arXiv:2310.05175); "measured" what costs least, by the loss with one matrix
        pruned.
      rounding: "floor", or "nearest" as `torch.nn.utils.prune` rounds.
      store: "zeros" in a dense array, "masked" (to train on), or a sparse array: "sparse" (what
        the pattern calls for), "bitmask" or "csr".
      owl_threshold: for allocation owl: outliers are so many times the mean.
      owl_spread: for allocation owl: sparsities differ by twice this at most.
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"
    scope: patterns.Scope = "layer"
    allocation: Literal["uniform", "global", "erk", "owl", "measured"] = "uniform"
    rounding: Literal["floor", "nearest"] = "floor"
    store: Store = "zeros"
    owl_threshold: float = 5.0
    owl_spread: float = 0.08

    @property
    def n_m(self) -> tuple[int, int] | None:
        """(n, m) of an n:m pattern; `InputError` where the pattern is unknown."""
        return None if patterns.parse_block(self.pattern) else patterns.parse_n_m(self.pattern)


def method(score: Score, *, scope: str = "layer") -> Method:
    """The pruning method of a score.

    Args:
      score: see `pruning.scores`; its docstring becomes the method's.
      scope: the default of the option `scope`.
    """
    pruner = _Pruner(score)

    def prune(weight: Any, *statistics: Any, **given: Any) -> Any:
        bound = signature.bind(weight, *statistics, **given)
        bound.apply_defaults()
        return pruner(*bound.args, **bound.kwargs)

    def survey(matrices: Matrices, *, measure: Measure | None = None, **given: Any) -> Any:
        return pruner.survey(matrices, measure, {"scope": scope, **given})

    signature = _signature(score, scope)
    prune.__name__ = prune.__qualname__ = score.__name__
    prune.__doc__ = _docstring(score)
    prune.__signature__ = signature  # type: ignore[attr-defined]
    prune.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    walked = "block" if activation_names(pruner.statistics) else "none"
    return Method(prune, produces="sparse", survey=survey, sequential=walked, score=score)


@dataclass(frozen=True)
class _Scorer:
    """Scores of what goes together in one matrix: of its entries, or of its blocks."""

    score: Score
    options: tuple[tuple[str, Any], ...]
    pattern: str

    def __call__(self, weight: Array, *statistics: Array) -> Array:
        scores = self.score(weight.astype(jnp.float32), *statistics, **dict(self.options))
        scores = patterns.unit_scores(scores, self.pattern)
        # What is 0 already goes first, whatever its score: pruned a second time, zeros stay.
        there = patterns.unit_scores((weight != 0).astype(jnp.float32), self.pattern)
        return jnp.where(there > 0, scores, jnp.finfo(scores.dtype).min)


@dataclass(frozen=True)
class _Masker:
    """The mask of one matrix, and whether its scores are finite."""

    scorer: _Scorer
    scope: str
    n_m: tuple[int, int] | None

    def __call__(self, weight: Array, removed: Array, *statistics: Array) -> tuple[Array, Array]:
        scores = self.scorer(weight, *statistics)
        if self.n_m:
            mask = patterns.keep_n_of_m(scores, *self.n_m)
        else:
            mask = patterns.keep_counted(scores, removed, scope=self.scope)
        return patterns.unit_mask(mask, self.scorer.pattern), jnp.isfinite(scores).all()


@dataclass(frozen=True)
class _Pruner:
    """A score at work."""

    score: Score

    @property
    def statistics(self) -> list[str]:
        """Names of the statistics that the score needs."""
        given = inspect.signature(self.score).parameters.values()
        return [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    def __call__(
        self,
        weight: Array | CompressedArray,
        *statistics: Array,
        removed: np.ndarray | None = None,
        **given: Any,
    ) -> Array | CompressedArray:
        """`weight` pruned; `removed`: how many go of each matrix, int `[*lead]`."""
        options, own = _split(given)
        scorer = _Scorer(self.score, own, options.pattern)
        matrix = dense(weight)
        if options.scope == "global" and removed is None and not options.n_m:
            scores = over_lead(scorer, matrix, *statistics)
            mask = patterns.keep(
                scores, options.sparsity, scope="global", rounding=options.rounding
            )
            mask, finite = patterns.unit_mask(mask, options.pattern), jnp.isfinite(scores).all()
        else:
            if removed is None:
                removed = np.full(matrix.shape[:-2], _uniform(options, matrix.shape[-2:]))
            masker = _Masker(scorer, options.scope, options.n_m)
            count = jnp.asarray(removed, jnp.int32)
            mask, finite = over_lead(masker, matrix, count, *statistics)
        if not isinstance(finite, jax.core.Tracer) and not finite.all():
            raise InputError(
                f"{self.score.__name__}: scores are NaN or infinite, as the statistics may be"
            )
        return kept(weight, mask, options.store, options.pattern.removeprefix("block:"))

    def survey(
        self, matrices: Matrices, measure: Measure | None, given: Mapping[str, Any]
    ) -> list[Callable[..., Any]] | None:
        """What to do with each matrix, where that is decided over all of them; else None."""
        options, own = _split(given)
        how = "global" if options.scope == "global" else options.allocation
        if options.n_m and options.allocation != "uniform":
            raise InputError(
                f"allocation {how}: pattern {options.pattern} removes the same of every matrix"
            )
        if how == "uniform" or options.n_m:
            return None
        units = _Units(matrices, _Scorer(self.score, own, options.pattern), self.statistics)
        scope = "row" if options.scope == "row" else "layer"
        each = partial(self.counted, {**given, "scope": scope})
        counts = units.by_matrix(units.counts(how, options, measure, each))
        return [Partial(each, removed) for removed in counts]

    def counted(
        self,
        given: Mapping[str, Any],
        removed: np.ndarray,
        weight: Any,
        *statistics: Any,
        **named: Any,
    ) -> Array | CompressedArray:
        """`weight` without so many entries of each matrix; statistics by position or by name."""
        statistics += tuple(named[name] for name in self.statistics[len(statistics) :])
        return self(weight, *statistics, removed=removed, **given)


class _Units:
    """All matrices `[N, K]` of a survey, one after the other; those of a stacked leaf apart."""

    def __init__(self, matrices: Matrices, scorer: _Scorer, names: Sequence[str]) -> None:
        self.matrices, self.scorer, self.names = matrices, scorer, names
        self.leads: list[tuple[int, ...]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.sizes: list[int] = []
        self.blocks: list[str] = []
        rows, columns = patterns.parse_block(scorer.pattern) or (1, 1)
        for number, (matrix, statistics) in enumerate(matrices()):
            *lead, n, k = matrix.shape
            path = statistics.get("path", str(number))
            window = statistics.get("window", ())  # a convolution's, which is folded into K
            self.leads.append(tuple(lead))
            for index in np.ndindex(*lead):
                self.shapes.append((n, k // math.prod(window), *window))
                self.sizes.append((n // rows) * (k // columns))
                self.blocks.append(_block_of(path, index))

    def counts(
        self, how: str, options: Options, measure: Measure | None, prune: Callable[..., Any]
    ) -> np.ndarray:
        """How many go of each unit."""
        asked = options.sparsity, options.rounding
        if how == "global":
            return allocations.global_threshold(lambda: self._each(self.scorer), *asked)
        if how == "erk":
            return allocations.erdos_renyi(self.shapes, *asked, sizes=self.sizes)
        if how == "owl":
            shares = allocations.outlier_shares(
                lambda: self._each(_Outliers(tuple(self.names))), self.blocks, options.owl_threshold
            )
            return allocations.outlier_weighted(
                shares, self.sizes, self.blocks, *asked, spread=options.owl_spread
            )
        if measure is None:
            raise InputError(
                "allocation measured: needs the model and calibration data to measure the loss on"
            )

        def loss_increase(unit: int, count: int) -> float:
            alone = np.zeros(len(self.sizes), np.int64)
            alone[unit] = count
            counts = self.by_matrix(alone)
            index = next(i for i, removed in enumerate(counts) if removed.any())
            return measure(index, partial(prune, counts[index]))

        return allocations.measured(self.sizes, loss_increase, *asked)

    def by_matrix(self, counts: np.ndarray) -> list[np.ndarray]:
        """Counts of the units as int `[*lead]` of each matrix."""
        ends = np.cumsum([math.prod(lead) for lead in self.leads])
        parts = np.split(counts, ends[:-1])
        return [part.reshape(lead) for part, lead in zip(parts, self.leads, strict=True)]

    def _each(self, function: Callable[..., Array]) -> typing.Iterator[np.ndarray]:
        """`function(weight, *statistics)` of every unit, on the host."""
        for matrix, statistics in self.matrices():
            given = [statistics[name] for name in self.names]
            found = np.asarray(over_lead(function, dense(matrix), *given))
            yield from found.reshape(-1, *found.shape[-2:])


@dataclass(frozen=True)
class _Outliers:
    """|w| ||x||, from whichever statistic tells the norms."""

    names: tuple[str, ...]

    def __call__(self, weight: Array, *statistics: Array) -> Array:
        known = dict(zip(self.names, statistics, strict=True))
        if "sum_squares" in known:
            squares = known["sum_squares"]
        elif "second_moment" in known:
            squares = jnp.diagonal(known["second_moment"])
        else:
            raise InputError("allocation owl: needs a score of the activations, such as wanda")
        return jnp.abs(weight.astype(jnp.float32)) * jnp.sqrt(squares)


def _block_of(path: str, index: tuple[int, ...]) -> str:
    """The block of the model: `layers/3` of `layers/3/attn/q_proj/kernel`, stacked or not."""
    if one_by_one := re.match(r"(.*?/\d+)/", path):
        return one_by_one[1]
    stacked = re.fullmatch(r".*\[(\d+)\]", path)
    place = stacked[1] if stacked else index[0] if index else None
    return path if place is None else f"{path.split('/')[0]}/{place}"


def _uniform(options: Options, shape: tuple[int, ...]) -> int:
    """How many units of a matrix go where every one loses the same share."""
    if options.n_m:
        return 0
    rows, columns = patterns.parse_block(options.pattern) or (1, 1)
    n, k = shape[0] // rows, shape[1] // columns
    if options.scope == "row":
        return n * patterns.removed_count(k, options.sparsity, options.rounding)
    return patterns.removed_count(n * k, options.sparsity, options.rounding)


def _split(given: Mapping[str, Any]) -> tuple[Options, tuple[tuple[str, Any], ...]]:
    """The common options, and the score's own."""
    common = {field.name for field in fields(Options)}
    options = Options(**{name: value for name, value in given.items() if name in common})
    own = {name: value for name, value in given.items() if name not in common}
    return options, tuple(sorted(own.items()))


# ---------------------------------------------------------- what `Method` reads: names and texts


def _signature(score: Score, scope: str) -> inspect.Signature:
    """`(weight, *statistics, *, <common options>, <the score's own>)`, annotations resolved."""
    hints = typing.get_type_hints(score)
    common = typing.get_type_hints(Options)
    given = list(inspect.signature(score).parameters.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    made = [p.replace(annotation=hints[p.name]) for p in given if p.kind is not keyword]
    for field in fields(Options):
        default = scope if field.name == "scope" else field.default
        made.append(
            inspect.Parameter(field.name, keyword, default=default, annotation=common[field.name])
        )
    made += [p.replace(annotation=hints[p.name]) for p in given if p.kind is keyword]
    return inspect.Signature(made)


def _docstring(score: Score) -> str:
    """The score's text, with the common options among its arguments."""
    about, _, arguments = (inspect.getdoc(score) or "").partition("\nArgs:\n")
    common = (inspect.getdoc(Options) or "").partition("\nAttributes:\n")[2]
    returns = "The pruned matrix in the dims `[N, K]`, dense or compressed as `store` says."
    return f"{about}\nArgs:\n{arguments}\n{common}\n\nReturns:\n  {returns}\n"


METHODS = {name: method(score, scope=SCOPES.get(name, "layer")) for name, score in SCORES.items()}
