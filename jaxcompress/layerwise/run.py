"""`Run`: a per-matrix method with its options, over the matrices of one model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import dense, is_compressed
from jaxcompress.core.decisions import is_wanted, tell
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Method
from jaxcompress.layerwise.observe import ACTIVATIONS
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT
from jaxcompress.layerwise.problem import Problem, StoredMatrix


class Run:
    """A per-matrix method with its options, over the matrices of one model.

    The same object serves parameters in memory and a checkpoint that streams by.
    """

    def __init__(self, method: Method, options: Mapping[str, Any]) -> None:
        self.method, self.options = method, dict(options)
        self.decided: dict[str, Callable[[Any], Any]] = {}
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
        self.decided = dict(zip(paths, each, strict=True))

    def __call__(self, problem: Problem) -> Any:
        """The method's result for one matrix."""
        path, matrix = problem.path, problem.matrix
        check_floating(path, matrix)
        check_finite(path, matrix)
        decided = self.decided.get(path)
        result = decided(matrix, **problem.statistics) if decided else self._result(problem)
        if self.method.produces == "sparse":
            self.zeros += int((dense(result) == 0).sum())
            self.entries += result.size
        if self.method.score is not None and is_wanted(path):
            self._tell(problem, result)
        return result

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
        return stored.put_back(self._result(Problem(path, matrix, anything, own)))

    def _result(self, problem: Problem) -> Any:
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
