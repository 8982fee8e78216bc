"""Scales that can be folded into the weights: found in the function, chosen from calibration data.

Where the inputs of a matrix can be divided by s, channel by channel, and the matrix multiplied by
it, without the function noticing, some other parameters (a norm's gain, the rows of the matrix
before) take up the 1/s. Which ones they are is a diagonal symmetry that `coupling` derives from
the program; no name of a layer is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import Array, dense, is_compressed
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model, of_arrays
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.contractions import ContractedAxes, contractions
from jaxcompress.core.readers.coupling import Diagonal, Group, Groups, coupling
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.layerwise.observe import Observer
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT, obstacle, output_moments
from jaxcompress.layerwise.problem import Problem, StoredMatrix
from jaxcompress.layerwise.walk import Settings, walk
from jaxcompress.models import linear_paths

_EXAMPLE_TOKENS = 5


class Consumer(NamedTuple):
    """A matrix whose inputs a fold scales, as a solver sees it.

    Attributes:
      matrix: float `[*lead, N, K]`.
      statistics: of the dense model's calibration data, by name, `[*lead, ...]`; moments of the
        outputs may be None.
      columns: int `[*lead, K]`: the entry of s that scales each column; -1: none does.
    """

    matrix: Array
    statistics: Mapping[str, Array]
    columns: Array


# Gives s, positive `[size]`, for the matrices that share it.
Choose = Callable[[Sequence[Consumer], int], Array]


@dataclass(frozen=True)
class Fold:
    """Matrices whose input channels may be scaled by a common s.

    Attributes:
      diagonal: the symmetry.
      power: exponent of the matrices in it, so that d = s^(1 / power).
      columns: by path, the entry of s (flattened) of each contracted column, `[*lead, K]`, without
        the axis of a scan; -1: none.
    """

    diagonal: Diagonal
    power: Fraction
    columns: Mapping[str, np.ndarray]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of s."""
        return tuple(group.size for group in self.diagonal.groups)

    def apply(self, params: Any, scale: Any) -> Any:
        """Parameters with the matrices' columns multiplied by s `[*sizes]`, `[steps, *sizes]`.

        Raises:
          InputError: s has another shape.
        """
        return self.diagonal.apply(params, scale ** float(1 / self.power))


@dataclass
class Network:
    """A model with its symmetries.

    Attributes:
      model: without anything but dense arrays among its parameters.
      groups: its coupled axes.
      axes: contracted axes by path.
      targets: paths of the matrices that are to be quantized.
      inputs: shapes of its inputs.
    """

    model: Model
    groups: Groups
    axes: Mapping[str, ContractedAxes]
    targets: tuple[str, ...]
    inputs: tuple[Any, ...]
    _diagonals_of: dict[tuple[Group, ...], list[Diagonal]] = field(default_factory=dict)

    @cached_property
    def stacked(self) -> frozenset[str]:
        """Parameters of which a scan reads one entry of the first axis at a time."""
        scans = self.groups.program.scans
        return frozenset(value.name for scan in scans for value in scan.stacked)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by path."""
        return {path: leaf.shape for path, leaf in leaves_with_paths(self.groups.params)}

    def columns(self, path: str) -> int:
        """Contracted columns of a matrix."""
        return math.prod(self.shapes[path][axis] for axis in self.axes.get(path, ()))

    def entries(self, fold: Fold) -> int:
        """Weights of all matrices of a fold."""
        return sum(math.prod(self.shapes[path]) for path in fold.columns)

    @classmethod
    def of(cls, model: Model, inputs: Sequence[Any] | None) -> Network:
        """Read a model.

        Args:
          model: all of whose leaves are arrays.
          inputs: `[samples, ...]` each; None: of a reference model, what its config says.

        Raises:
          InputError: no inputs, and no config that says what they are.
        """
        model = model.replace(params=map_with_paths(lambda _, leaf: _plain(leaf), model.params))
        shapes = _example(model) if inputs is None else [_two_of(x) for x in inputs]
        groups = coupling(model.apply)(model.params, *shapes)
        axes = contractions(model.apply)(model.params, *shapes)
        targets = tuple(linear_paths(model)) or _products(model, axes, shapes)
        return cls(model, groups, axes, targets, tuple(shapes))

    def folds(self, paths: Iterable[str]) -> tuple[list[Fold], list[str]]:
        """The scales that can be folded, and the paths for which there is none."""
        found: list[Fold] = []
        left: list[str] = []
        wanted = tuple(paths)
        for path in wanted:
            if any(path in fold.columns for fold in found):
                continue
            fold = self._fold(path, wanted)
            if fold is None:
                left.append(path)
            else:
                found.append(fold)
        return found, left

    def _fold(self, path: str, wanted: Collection[str]) -> Fold | None:
        """The finest scaling of the input channels of one matrix."""
        axes = self.axes.get(path)
        if axes is None:
            return None
        inside = [g for axis in axes for g in self.groups.at(path, axis) if g.atom is not None]
        lead = range(1 if path in self.stacked else 0, axes.lead)
        outside = [g for axis in lead for g in self.groups.at(path, axis) if g.atom is not None]
        for some in _subsets(inside, outside):
            for diagonal in self._diagonals(some):
                fold = self._as_fold(diagonal, path, wanted)
                if fold is not None:
                    return fold
        return None

    def _diagonals(self, groups: tuple[Group, ...]) -> list[Diagonal]:
        if groups not in self._diagonals_of:
            self._diagonals_of[groups] = self.groups.diagonals(*groups)
        return self._diagonals_of[groups]

    def _as_fold(self, diagonal: Diagonal, path: str, wanted: Collection[str]) -> Fold | None:
        """A symmetry as a scaling of the inputs of `path`; None if it does something else to it."""
        powers: dict[str, set[Fraction]] = {}
        elsewhere: set[str] = set()  # scaled along other than contracted axes
        for members, exponent in diagonal.exponents.items():
            name = members[0].path
            powers.setdefault(name, set()).add(exponent)
            contracted = self.axes.get(name, ContractedAxes(()))
            inside = {*contracted, *range(getattr(contracted, "lead", 0))}
            if not {member.axis for member in members} <= inside:
                elsewhere.add(name)
        if path not in powers or path in elsewhere or len(powers[path]) > 1:
            return None
        (power,) = powers[path]
        consumers = [n for n in wanted if n not in elsewhere and powers.get(n) == {power}]
        return Fold(diagonal, power, {name: self._columns(diagonal, name) for name in consumers})

    def _columns(self, diagonal: Diagonal, path: str) -> np.ndarray:
        axes, shape = self.axes[path], self.shapes[path]
        kept = [*range(axes.lead), *axes]
        sizes = [group.size for group in diagonal.groups]
        index = np.full([shape[axis] for axis in kept], -1)
        for members in diagonal.exponents:
            if members[0].path != path:
                continue
            at: Any = 0
            present: Any = True
            for group, member, size in zip(diagonal.groups, members, sizes, strict=True):
                along = [-1 if axis == member.axis else 1 for axis in kept]
                own = group.labels(member).reshape(along)
                at, present = at * size + np.maximum(own, 0), present & (own >= 0)
            index = np.where(present, at, index)
        index = index.reshape(*index.shape[: axes.lead], -1)
        return index[0] if path in self.stacked else index


def folded(
    model: Model,
    calibration: Any,
    statistics: Sequence[str],
    choose: Choose,
    *,
    what: str,
    usable: Callable[[int], bool] = lambda columns: True,
) -> Model:
    """The dense model that computes the same function, with every s that can be folded.

    Args:
      model: any; compressed parameters become dense.
      calibration: its inputs, see `layerwise.calibrate.Calibration`.
      statistics: names of what `choose` needs, all of the dense model.
      choose: gives s for the matrices that share it.
      what: name of the method, for notes.
      usable: whether a matrix of so many contracted columns is to be quantized.
    """
    model, restored = of_arrays(model)
    data = Calibration.of(calibration, model, samples=1, ctx=1, seed=0)
    network = Network.of(model, data.inputs)
    odd = [path for path in network.targets if not usable(network.columns(path))]
    folds, left = network.folds([path for path in network.targets if path not in odd])
    notes = [f"{what}: no scale can be folded for {', '.join(left)}"] if left else []
    known: dict[str, dict[str, Any]] = {}
    if OUTPUT_MOMENT in statistics and folds:
        known, why = _output_moments(network.model, folds, data)
        notes += [f"{what}: no curvature of the outputs, which count alike: {why}"] if why else []
    params = network.model.params
    for fold, scale in _chosen(network, folds, data, statistics, known, choose):
        params = fold.apply(params, scale)
    if odd:
        notes.append(f"{what}: the group size does not divide the inputs of {', '.join(odd)}")
    return restored(network.model.replace(params=params, notes=(*model.notes, *notes)))


def _output_moments(
    model: Model, folds: Sequence[Fold], data: Calibration
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Moments of the output gradients by path, or None each and why."""
    paths, batches = [path for fold in folds for path in fold.columns], data.batches()
    if data.labels is None and len(data.inputs) > 1:
        why: str | None = "of several inputs, none is a label"
    else:
        why = obstacle(model, paths, batches[0])
    moments = output_moments(model, paths, batches) if why is None else {}
    return {path: {OUTPUT_MOMENT: moments.get(path)} for path in paths}, why


def _chosen(
    network: Network,
    folds: Sequence[Fold],
    data: Calibration,
    statistics: Sequence[str],
    known: Mapping[str, Mapping[str, Any]],
    choose: Choose,
) -> list[tuple[Fold, Array]]:
    """Every fold with its s, `[*sizes]` or `[steps, *sizes]`, from one walk through the model."""
    if not folds:
        return []
    owner = {path: number for number, fold in enumerate(folds) for path in fold.columns}
    waiting: dict[tuple[int, int], list[Consumer]] = {}
    scales: list[dict[int, Array]] = [{} for _ in folds]

    def look(problems: list[tuple[StoredMatrix, Problem]]) -> None:
        for _, problem in problems:
            number = owner[problem.path.partition("[")[0]]
            fold = folds[number]
            steps = fold.diagonal.steps
            for step, consumer in _consumers(fold, problem, network.stacked):
                key = number, step if steps else 0
                together = waiting.setdefault(key, [])
                together.append(consumer)
                if sum(c.matrix.size for c in together) * (steps or 1) == network.entries(fold):
                    scale = choose(waiting.pop(key), math.prod(fold.sizes))
                    scales[number][key[1]] = scale.reshape(fold.sizes)

    walk(
        network.model,
        {path: {} for path in owner},
        data.inputs,
        lambda problems: [problem.matrix for problem in problems],
        Settings(tuple(statistics), "none"),
        known=known,
        look=look,
        what="fold",
    )
    return [
        (fold, jnp.stack([s[i] for i in sorted(s)]) if fold.diagonal.steps else s[0])
        for fold, s in zip(folds, scales, strict=True)
    ]


def _consumers(
    fold: Fold, problem: Problem, stacked: Collection[str]
) -> Iterable[tuple[int, Consumer]]:
    """The matrices of a problem, one for each step of a scan, with the number of the step."""
    path, _, index = problem.path.partition("[")
    columns, step = jnp.asarray(fold.columns[path]), int(index[:-1] or 0) if index else 0
    matrix, statistics = dense(problem.matrix), dict(problem.statistics)
    if path not in stacked:
        yield step, Consumer(matrix, statistics, columns[step] if index else columns)
    elif index:
        yield step, Consumer(matrix, statistics, columns)
    else:
        for i in range(len(matrix)):
            own: dict[str, Any] = {n: s if s is None else s[i] for n, s in statistics.items()}
            yield i, Consumer(matrix[i], own, columns)


def by_entry(values: Array, columns: Array, size: int) -> Array:
    """Sums of values `[..., K]` over the columns that one entry of s scales, `[size]`.

    Args:
      values: of a matrix's columns.
      columns: see `Consumer`; broadcast against `values`.
      size: entries of s.
    """
    values, columns = jnp.broadcast_arrays(values, columns)
    into = jnp.where(columns < 0, size, columns)  # the last bin is dropped
    return jnp.zeros(size + 1, values.dtype).at[into].add(values)[:size]


def spread(scale: Array, columns: Array) -> Array:
    """s `[size]` for each column `[*lead, K]`; 1 where none scales it."""
    return jnp.where(columns < 0, 1.0, scale[columns])


def _subsets(inside: Sequence[Group], outside: Sequence[Group]) -> Iterable[tuple[Group, ...]]:
    """Sets of groups with at least one of `inside`, the finest first."""
    inside, outside = list(dict.fromkeys(inside)), list(dict.fromkeys(outside))
    for count in range(len(inside), 0, -1):
        for more in range(len(outside), -1, -1):
            for some in itertools.combinations(inside, count):
                for others in itertools.combinations(outside, more):
                    yield (*some, *others)


def _two_of(x: Any) -> jax.ShapeDtypeStruct:
    """Two samples: an axis of size 1 cannot be told from one that is broadcast."""
    dtype = jax.dtypes.canonicalize_dtype(np.asarray(x).dtype)
    return jax.ShapeDtypeStruct((2, *np.shape(x)[1:]), dtype)


def _plain(leaf: Any) -> Any:
    return dense(leaf) if is_compressed(leaf) else leaf


def _products(
    model: Model, axes: Mapping[str, ContractedAxes], shapes: Sequence[Any]
) -> tuple[str, ...]:
    """The floating matrices that a product reads, of a model that has no config."""
    leaves = dict(leaves_with_paths(model.params))
    paths = [p for p in axes if jnp.issubdtype(leaves[p].dtype, jnp.floating)]
    observer = Observer(lambda params, inputs: model.apply(params, *inputs), paths, ["sum_abs"])
    chunks = tuple(jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in shapes)
    read = {path for group in observer.groups(model.params, chunks) for path in group.paths}
    return tuple(path for path in paths if path in read)


def _example(model: Model) -> list[Any]:
    """Shapes of the inputs of a reference language model."""
    config = model.config
    if not hasattr(config, "vocab_size"):
        raise InputError(
            "model: it has no config that says what it reads; pass calibration=, some of its inputs"
        )
    length = min(_EXAMPLE_TOKENS, config.max_length or _EXAMPLE_TOKENS)
    return [jax.ShapeDtypeStruct((2, length), jnp.int32)]
