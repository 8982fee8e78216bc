"""`Run`: a per-matrix method with its options, over the matrices of one model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from jaxcompress.core.arrays.base import dense, is_compressed
from jaxcompress.core.decisions import is_wanted, tell
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.layerwise import figures
from jaxcompress.layerwise.batch import dealt
from jaxcompress.layerwise.observe import ACTIVATIONS
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT
from jaxcompress.layerwise.problem import Problem, StoredMatrix

# A pytree: its operands differ from matrix to matrix, its function is what they have in common.
Decided = Partial


class Run:
    """A per-matrix method with its options, over the matrices of one model.

    The same object serves parameters in memory and a checkpoint that streams by.
    """

    def __init__(self, method: Method, options: Mapping[str, Any]) -> None:
        self.method, self.options = method, dict(options)
        self.decided: dict[str, Decided] = {}
        self.told: dict[str, dict[str, float]] = {}  # figures by path, see `layerwise.figures`
        self.notes: list[str] = []
        self.zeros = self.entries = 0

    @property
    def sparsity(self) -> float:
        """Share of exact zeros in what a pruning method has given so far."""
        return self.zeros / max(self.entries, 1)

    def survey(
        self,
        matrices: Callable[[], Iterator[tuple[str, Any, Mapping[str, Any]]]],
        chosen: Mapping[str, Mapping[str, Any]],
        measure: Callable[[int, Callable[..., Any]], float] | None = None,
    ) -> None:
        """Decide over all matrices together, where the method does.

        Args:
          matrices: a fresh iterator over (path, matrix, its statistics).
          chosen: own options by path.
          measure: for methods that ask for it: `measure(index, function)` is by how much the loss
            grows where one matrix alone goes through `function`.
        """
        if self.method.survey is None:
            return
        paths: list[str] = []

        def told() -> Iterator[tuple[Any, dict[str, Any]]]:
            paths.clear()
            for path, matrix, statistics in matrices():
                paths.append(path)
                yield matrix, {**statistics, "path": path}

        asked = "measure" in inspect.signature(self.method.survey).parameters
        each = self.method.survey(told, **self.options, **({"measure": measure} if asked else {}))
        if each is None:
            return
        if any(chosen.values()):
            raise InputError("overrides: not with a decision over all matrices together")
        for path, how in zip(paths, each, strict=True):
            self.decided[path] = how if isinstance(how, Partial) else Partial(how)

    def __call__(self, problem: Problem) -> Any:
        """The method's result for one matrix."""
        _check(problem)
        with figures.collecting() as told:
            result = self._result(problem, self.decided.get(problem.path))
        self._keep(problem, figures.plain({**told, **figures.of_result(result)}))
        self._account(problem, result)
        return result

    def side_by_side(self, problems: Sequence[Problem], mesh: Mesh) -> list[Any]:
        """The results of several matrices; those of equal shape as one batch over the mesh."""
        batches: dict[Any, list[Problem]] = {}
        for problem in problems:
            _check(problem)
            key = _signature(problem, self.decided.get(problem.path))
            batches.setdefault(key, []).append(problem)
        results = {}
        for members in batches.values():
            decided = [self.decided.get(problem.path) for problem in members]
            with figures.collecting() as told:
                solved = self._result(*_stacked(members, decided, mesh))
            seen = {**told, **figures.of_result(solved)}
            for place, problem in enumerate(members):
                self._keep(problem, figures.plain(seen, place))
                results[problem.path] = jax.tree.map(lambda leaf, at=place: leaf[at], solved)
        for problem in problems:
            self._account(problem, results[problem.path])
        return [results[problem.path] for problem in problems]

    def _keep(self, problem: Problem, told: dict[str, float]) -> None:
        option = self.method.options.get("damp")
        default = None if option is None else option.default
        damp = {**self.options, **problem.options}.get("damp", default)
        self.told[problem.path] = told
        self.notes += figures.warnings(problem.path, told, damp=damp)

    def _account(self, problem: Problem, result: Any) -> None:
        """Count the zeros, and tell of the decision where somebody listens."""
        if self.method.produces == "sparse":
            self.zeros += int((dense(result) == 0).sum())
            self.entries += result.size
        if self.method.score is not None and is_wanted(problem.path):
            self._tell(problem, result)

    def _tell(self, problem: Problem, result: Any) -> None:
        """The scores of a matrix, the middle one of a stack, and what stayed of it."""
        score = self.method.score
        assert score is not None
        parameters = inspect.signature(score).parameters.values()
        options = {
            p.name: self.options[p.name]
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name in self.options
        }
        needed = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        weight = dense(problem.matrix).astype(jnp.float32)
        scores = score(weight, *(problem.statistics[name] for name in needed), **options)
        middle = tuple(n // 2 for n in weight.shape[:-2])
        kept = dense(result)[middle] != 0
        tell("weights", problem.path, score.__name__, scores[middle], kept)

    def of_leaf(self, path: str, leaf: Any, own: Mapping[str, Any]) -> Any:
        """The leaf that takes the place of a traced one, whatever the statistics."""
        stored = StoredMatrix.of(path, leaf, None)
        matrix = stored.matrix()
        check_floating(path, matrix)
        anything = {name: _no_statistics(name, matrix) for name in self.method.statistics}
        return stored.put_back(self._result(Problem(path, matrix, anything, own), None))

    def _result(self, problem: Problem, decided: Decided | None) -> Any:
        if decided is not None:
            return decided(problem.matrix, **problem.statistics)
        used, unused = self.method.accepted({**self.options, **problem.options})
        if unused:
            raise InputError(f"{problem.path}: no option {unused[0]!r} in this method")
        try:
            return self.method.function(problem.matrix, **problem.statistics, **used)
        except InputError as error:
            raise InputError(f"{problem.path}: {error}") from None


def _no_statistics(name: str, matrix: Any) -> Any:
    """Zeros in the shape of a statistic of a matrix `[*lead, N, K]`."""
    *lead, rows, features = matrix.shape
    if name in ACTIVATIONS:
        ends = [features, features] if name == "second_moment" else [features]
    else:
        ends = {"count": [], OUTPUT_MOMENT: [rows, rows]}.get(name, [rows, features])
    return jnp.zeros((*lead, *ends), jnp.float32)


def _signature(problem: Problem, decided: Decided | None) -> Any:
    """What problems must have in common to be solved as one batch."""
    given = (problem.matrix, dict(problem.statistics))
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), given)
    own = repr(sorted(problem.options.items()))
    return str(shapes), jax.tree.structure((given, decided)), own


def _stacked(
    problems: Sequence[Problem], decided: Sequence[Decided | None], mesh: Mesh
) -> tuple[Problem, Decided | None]:
    """The problems as one with a leading axis, split over all devices of the mesh."""
    values = [
        (problem.matrix, dict(problem.statistics), how)
        for problem, how in zip(problems, decided, strict=True)
    ]
    matrix, statistics, how = dealt(mesh, *jax.device_put(values, NamedSharding(mesh, P())))
    return Problem(problems[0].path, matrix, statistics, problems[0].options), how


def _check(problem: Problem) -> None:
    check_floating(problem.path, problem.matrix)
    check_finite(problem.path, problem.matrix)


def check_floating(path: str, matrix: Any) -> None:
    """Raise `InputError` where a matrix does not hold floating numbers."""
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise InputError(f"{path}: has dtype {matrix.dtype}, only floating weights are compressed")


def check_finite(path: str, matrix: Any) -> None:
    """Raise `InputError` where a matrix holds NaN or infinity."""
    if is_compressed(matrix):
        return
    if not bool(_all_finite(matrix)):
        bad = int(np.sum(~np.isfinite(np.asarray(matrix, np.float32))))
        raise InputError(f"{path}: {bad} weights are NaN or infinite; the checkpoint is damaged")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
