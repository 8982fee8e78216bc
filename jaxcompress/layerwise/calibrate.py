"""Calibration data, and methods of matrices that need them run over a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.core.readers.contractions import ContractedAxes, contractions
from jaxcompress.data.text import calibration_batch
from jaxcompress.layerwise.gradients import GRADIENTS, gradient_statistics
from jaxcompress.layerwise.losses import loss_of, mean_loss
from jaxcompress.layerwise.observe import activation_names
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT, obstacle, output_moments
from jaxcompress.layerwise.pieces import shapes_by_path, with_leaves
from jaxcompress.layerwise.problem import Problem, StoredMatrix
from jaxcompress.layerwise.run import Run
from jaxcompress.layerwise.walk import Journal, Settings, Walked, walk
from jaxcompress.progress import progress

BATCHES = 4  # at least so many, where gradients are taken
TOKENS_TOGETHER = 4096  # at most, in one of them


@dataclass(frozen=True)
class Calibration:
    """Calibration data in memory.

    Attributes:
      inputs: of the model, `[samples, ...]` each.
      labels: int `[samples]`, where a loss needs them.
    """

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray | None = None

    @classmethod
    def of(cls, given: Any, model: Model, *, samples: int, ctx: int, seed: int) -> Calibration:
        """From what a person gives.

        Args:
          given: a text file, a text or one row of token ids, of which windows are drawn; token ids
            `[samples, ctx]`; any other array of inputs; a tuple of such, of which the last may be
            labels, int `[samples]`; or an iterable of batches of any of these.
          model: its tokenizer reads texts.
          samples: windows drawn.
          ctx: tokens in a window.
          seed: of the draw.

        Raises:
          InputError: too short a text, or arrays that do not go together.
        """
        if isinstance(given, tuple):
            arrays = tuple(map(np.asarray, given))
        elif isinstance(given, (str, os.PathLike)) or hasattr(given, "ndim") or _is_ids(given):
            if not hasattr(given, "ndim") or given.ndim == 1:
                given = calibration_batch(
                    given, model.tokenizer, samples=samples, ctx=ctx, seed=seed
                )
            arrays = (np.asarray(given),)
        else:
            batches = [b if isinstance(b, tuple) else (b,) for b in given]
            arrays = tuple(
                np.concatenate(list(map(np.asarray, column))) for column in zip(*batches)
            )
        if not arrays or not len(arrays[0]) or len({len(array) for array in arrays}) > 1:
            raise InputError(
                "calibration: every array needs the same number of samples, at least one"
            )
        last = arrays[-1]
        if len(arrays) > 1 and last.ndim == 1 and np.issubdtype(last.dtype, np.integer):
            return cls(arrays[:-1], last)
        return cls(arrays)

    def all(self) -> Any:
        """Inputs and labels, an array or a tuple of several: what methods of whole models take."""
        given = self.inputs if self.labels is None else (*self.inputs, self.labels)
        return given[0] if len(given) == 1 else given

    def batches(self) -> list[Any]:
        """As losses take them: token ids, or (images, labels)."""
        given = self.inputs[0] if self.labels is None else (self.inputs[0], self.labels)
        count = len(self.inputs[0])
        tokens = self.inputs[0].shape[1] if self.inputs[0].ndim == 2 else 1
        most = max(1, min(count // BATCHES, TOKENS_TOGETHER // tokens))
        size = max(c for c in range(1, most + 1) if count % c == 0)
        return [
            jax.tree.map(lambda x, at=at: x[at : at + size], given) for at in range(0, count, size)
        ]


def contracted_axes(model: Model, data: Calibration) -> dict[str, ContractedAxes]:
    """Contracted axes of the model's parameters, by path, read off its function."""
    one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in data.inputs]
    return contractions(model.apply)(model.params, *one)


def _is_ids(given: Any) -> bool:
    return isinstance(given, Sequence) and bool(given) and np.isscalar(given[0])


def compress_calibrated(
    model: Model,
    run: Run,
    chosen: Mapping[str, Mapping[str, Any]],
    data: Calibration,
    settings: Settings,
    *,
    journal: Journal | None = None,
    what: str = "compress",
) -> Walked:
    """The chosen matrices of a model run through a method that needs statistics.

    Args:
      model: what is compressed.
      run: the method with its options.
      chosen: paths of the matrices, with options of their own.
      data: what the statistics are taken of.
      settings: of the walk, where activations are asked for.
      journal: keeps results.
      what: name of the work, for the progress.
    """
    gradients = [name for name in settings.statistics if name in GRADIENTS]
    known: dict[str, dict[str, Any]] = {}
    if gradients:
        known = gradient_statistics(model, list(chosen), gradients, data.batches())
    notes = []
    if OUTPUT_MOMENT in settings.statistics:
        moments: dict[str, Any] = {}
        batches = data.batches()
        if data.labels is None and len(data.inputs) > 1:
            why: str | None = "of several inputs, none is a label"
        else:
            why = obstacle(model, list(chosen), batches[0])
        if why is None:
            moments = output_moments(model, list(chosen), batches)
        else:
            notes.append(f"no curvature of the outputs, which count alike: {why}")
        for path in chosen:
            known.setdefault(path, {})[OUTPUT_MOMENT] = moments.get(path)
    measure = _Measure(model, data)
    if not activation_names(settings.statistics):
        problems = _problems(model, chosen, data, known)
        run.survey(lambda: _told(problems), chosen, measure.over(problems))
        done = _each(run, problems, journal, what)
        return Walked(with_leaves(model.params, done), notes + run.notes)
    seen: dict[str, tuple[StoredMatrix, Problem]] = {}

    def surveyed() -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
        if not seen:
            seen.update(_dense_problems(model, chosen, data, settings, known))
        return _told(seen)

    run.survey(surveyed, chosen, measure.over(seen))
    seen.clear()

    def solve(problems: list[Problem]) -> list[Any]:
        if settings.mesh is not None:
            return run.side_by_side(problems, settings.mesh)
        return [run(problem) for problem in problems]

    found = walk(
        model,
        chosen,
        data.inputs,
        solve,
        settings,
        known=known,
        journal=journal,
        told=run.told,
        what=what,
    )
    return Walked(found.params, notes + found.notes + run.notes)


Problems = Mapping[str, tuple[StoredMatrix, Problem]]


def _told(problems: Problems) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    for path, (stored, problem) in problems.items():
        yield path, problem.matrix, {**problem.statistics, "window": stored.window}


def _problems(
    model: Model,
    chosen: Mapping[str, Mapping[str, Any]],
    data: Calibration,
    known: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[StoredMatrix, Problem]]:
    """The matrices with statistics that no walk has to gather."""
    leaves = shapes_by_path(model.params)
    axes = contracted_axes(model, data)
    made = {}
    for path, own in chosen.items():
        stored = StoredMatrix.of(path, leaves[path], {p: axes[p] for p in (path,) if p in axes})
        statistics = {
            name: StoredMatrix(value, stored.dims).matrix()
            for name, value in known.get(path, {}).items()
        }
        made[path] = stored, Problem(path, stored.matrix(), statistics, own)
    return made


def _each(run: Run, problems: Problems, journal: Journal | None, what: str) -> dict[str, Any]:
    """Results by path."""
    done: dict[str, Any] = {}
    for path, (stored, problem) in progress(problems.items(), what, unit="matrix"):
        done[path] = None if journal is None else journal.get(path)
        if done[path] is None:
            start = time.perf_counter()
            done[path] = jax.block_until_ready(stored.put_back(run(problem)))
            if journal is not None:
                journal.put(path, done[path], time.perf_counter() - start, **run.told[path])
    return done


def _dense_problems(
    model: Model,
    chosen: Mapping[str, Mapping[str, Any]],
    data: Calibration,
    settings: Settings,
    known: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[StoredMatrix, Problem]]:
    """Every chosen matrix with its statistics in the dense model."""
    seen: dict[str, tuple[StoredMatrix, Problem]] = {}

    def look(problems: list[tuple[StoredMatrix, Problem]]) -> None:
        seen.update((problem.path, (stored, problem)) for stored, problem in problems)

    plain = replace(settings, sequential="none", dense_target=0.0, mesh=None)
    walk(
        model,
        chosen,
        data.inputs,
        lambda problems: [problem.matrix for problem in problems],
        plain,
        known=known,
        look=look,
        what="survey",
    )
    return seen


class _Measure:
    """By how much the loss grows where one matrix alone is replaced."""

    def __init__(self, model: Model, data: Calibration) -> None:
        self.model, self.data = model, data

    def over(self, problems: Problems) -> Callable[[int, Callable[..., Any]], float]:
        """`measure(index, function)`: the matrix of that index through `function`."""
        state: dict[str, Any] = {}

        def measure(index: int, function: Callable[..., Any]) -> float:
            if not state:
                state["batches"] = self.data.batches()
                state["loss"] = jax.jit(loss_of(self.model, state["batches"][0]))
                state["start"] = mean_loss(state["loss"], self.model.params, state["batches"])
            stored, problem = list(problems.values())[index]
            leaf = stored.put_back(function(problem.matrix, **problem.statistics))
            params = self._with(problem.path, dense(leaf))
            return mean_loss(state["loss"], params, state["batches"]) - state["start"]

        return measure

    def _with(self, path: str, leaf: Any) -> Any:
        """The parameters with one leaf, or one index of a stacked one, replaced."""
        path, _, index = path.partition("[")
        if index:
            whole = dense(dict(leaves_with_paths(self.model.params))[path])
            leaf = jnp.asarray(whole).at[int(index[:-1])].set(leaf)
        return with_leaves(self.model.params, {path: leaf})
