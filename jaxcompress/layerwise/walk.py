"""The walk: a model compressed piece by piece, each from what the calibration data do in it.

embed -> blocks -> head. Each block's programs are compiled once and serve every layer; memory is
one block, its statistics and the hidden state of the calibration data. Inputs of a block come from
the blocks compressed before it (Frantar et al., arXiv:2210.17323, section 4).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.core.activations import BATCH_AXES
from jaxcompress.core.arrays.base import dense
from jaxcompress.core.arrays.sharding import fitting_spec, place
from jaxcompress.core.deferred import (
    Deferred,
    in_memory,
    is_deferred,
    parameters_read,
    return_freed_memory,
)
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.paths import leaves_with_paths, map_with_paths
from jaxcompress.core.readers.lift import lift
from jaxcompress.core.readers.scan_blocks import scan_blocks
from jaxcompress.layerwise.observe import Observer, activation_names, first
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT
from jaxcompress.layerwise.pieces import Cutter, Piece, Pieces, shapes_by_path, with_leaves
from jaxcompress.layerwise.problem import Problem, StoredMatrix
from jaxcompress.layerwise.target import dense_target
from jaxcompress.progress import progress

Sequential = Literal["none", "block", "matrix"]
Solve = Callable[[list[Problem]], list[Any]]

TOKENS_TOGETHER = 1024  # of calibration data that pass through a block at a time


class Journal(Protocol):
    """Keeps results of single matrices between two runs of the same command."""

    def get(self, path: str) -> Any:
        """The result kept for a path, None where there is none."""

    def put(self, path: str, leaf: Any, seconds: float, **figures: float) -> None:
        """Keep a result, how long it took, and other figures of it."""

    def flush(self) -> None:
        """Make sure of what was put."""


@dataclass(frozen=True)
class Settings:
    """How a walk goes.

    Attributes:
      statistics: names that the solver wants; see `layerwise.observe`.
      sequential: where the inputs of a matrix come from: "none": the dense model; "block": the
        blocks compressed before; "matrix": also the matrices compressed before it in its block.
      dense_target: 0: a matrix is to do what it did to the inputs it gets now; 1: to give what the
        dense model's matrix gives at the same place; between them, a mix.
      damp: ridge of the dense target, as a share of the mean diagonal of X'X.
      mesh: devices over whose axes "data" and "fsdp" the calibration data are split; None: where
        everything lies.
    """

    statistics: tuple[str, ...]
    sequential: Sequential = "block"
    dense_target: float = 0.0
    damp: float = 0.01
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None:  # of which the compiler decides how values are split
            mesh = Mesh(self.mesh.devices, self.mesh.axis_names)
            object.__setattr__(self, "mesh", mesh)
        if not 0 <= self.dense_target <= 1:
            raise InputError(f"dense_target {self.dense_target}: must lie in [0, 1]")
        if self.dense_target and self.sequential == "none":
            raise InputError("dense_target: without effect where sequential is none; use matrix")

    @property
    def activations(self) -> list[str]:
        """Which activation statistics have to be gathered."""
        names = activation_names(self.statistics)
        return names if "second_moment" in names or not self.dense_target else [
            *names, "second_moment"
        ]  # fmt: skip


@dataclass
class Walked:
    """What a walk gives.

    Attributes:
      params: the compressed parameters.
      notes: what a person ought to know, a line each.
    """

    params: Any
    notes: list[str] = field(default_factory=list)


def walk(
    model: Model,
    chosen: Mapping[str, Mapping[str, Any]],
    inputs: Any,
    solve: Solve,
    settings: Settings,
    *,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    journal: Journal | None = None,
    told: Mapping[str, Mapping[str, float]] | None = None,
    look: Callable[[list[tuple[StoredMatrix, Problem]]], None] | None = None,
    what: str = "compress",
) -> Walked:
    """`model` with the chosen matrices replaced, piece by piece.

    Args:
      model: taken apart by its `blocks`, or by its one top-level scan; else captured whole. Of
        `Deferred` parameters those of one piece are read at a time; and with a journal, what is
        compressed comes back `Deferred` too.
      chosen: paths of the matrices, with options of their own.
      inputs: the model's inputs, `[samples, ...]` each: token ids, or a tuple of arrays.
      solve: gives the compressed matrices of several problems.
      settings: of the walk.
      known: further statistics by path: in the shape of the leaf, such as gradients; and moments
        of the outputs, or None.
      journal: keeps results, so that a killed run goes on behind the last block that was done.
      told: figures by path that `solve` leaves there, for the journal.
      look: is shown the problems before they are solved.
      what: name of the work, for the progress.

    Raises:
      InputError: a chosen matrix that nothing reads, or inputs that do not divide over the mesh.
    """
    chunks = _chunks(inputs, settings.mesh)
    if model.blocks is None:
        model = model.replace(blocks=scan_blocks(model.apply, model.params, *first(chunks)))
    run = _Walk(model, chosen, settings, solve, known or {}, journal, told, look)
    run.go(chunks, what)
    return Walked(run.pieces.assemble(run.done), run.notes)


class _Walk:
    def __init__(
        self,
        model: Model,
        chosen: Mapping[str, Mapping[str, Any]],
        settings: Settings,
        solve: Solve,
        known: Mapping[str, Mapping[str, Any]],
        journal: Journal | None,
        told: Mapping[str, Mapping[str, float]] | None,
        look: Callable[[list[tuple[StoredMatrix, Problem]]], None] | None,
    ) -> None:
        self.look, self.told = look, {} if told is None else told
        self.pieces, self.options = Pieces(model, chosen), chosen
        self.settings, self.solve, self.known, self.journal = settings, solve, known, journal
        self.done: dict[str, Any] = {}
        self.deferred = is_deferred(model.params)
        self.notes: list[str] = []
        self.dead: dict[str, int] = {}  # inputs that are always 0, by path
        if model.blocks is None and settings.sequential != "matrix":
            self.notes.append("the model has no blocks: captured whole, every input a dense one")
        self._observers: dict[tuple[int, tuple[str, ...]], Observer] = {}
        self._lifted: dict[int, Any] = {}
        self._cutter = Cutter()

    def go(self, hidden: Any, what: str) -> None:
        pieces = self.pieces.pieces
        last = max(i for i, piece in enumerate(pieces) if piece.selected)
        dense_hidden = hidden
        for i, piece in progress(list(enumerate(pieces[: last + 1])), what, unit="block"):
            hidden, dense_hidden = self._through(piece, hidden, dense_hidden, i == last)
            if self.deferred:
                return_freed_memory()

    def _through(self, piece: Piece, hidden: Any, dense_hidden: Any, last: bool) -> tuple[Any, Any]:
        """What the next piece is given, behind this one compressed and behind the dense one."""
        piece = self._in_memory(piece, hidden)
        params = piece.params
        cut = self._parts(piece, hidden)
        for part in cut:
            if part.selected:
                params = self._compressed(part, params, hidden, dense_hidden)
            if last and part is cut[-1]:
                break
            if self.settings.dense_target:
                dense_hidden = self._advanced(part, piece.params, dense_hidden)
            forward = piece.params if self.settings.sequential == "none" else params
            hidden = self._advanced(part, forward, hidden)
        return hidden, dense_hidden

    def _parts(self, piece: Piece, hidden: Any) -> list[Piece]:
        """The piece, in matrix mode cut between the groups of matrices that read the same values.

        Run one after the other, the parts pass each matrix once; their statistics come from the
        matrices compressed before.
        """
        if self.settings.sequential != "matrix" or len(piece.selected) < 2:
            return [piece]

        def groups() -> list[tuple[str, ...]]:
            paths = [group.paths for group in self._observer(piece).groups(piece.params, hidden)]
            self._refuse_unread(piece, paths)
            return paths

        return self._cutter(piece, first(hidden), groups)

    def _refuse_unread(self, piece: Piece, groups: Sequence[Sequence[str]]) -> None:
        unread = set(piece.selected) - {path for paths in groups for path in paths}
        if unread:
            raise InputError(f"{piece.selected[min(unread)]}: no product reads it; exclude it")

    def _in_memory(self, piece: Piece, hidden: Any) -> Piece:
        """The piece with the parameters that it reads; None stands for others of the model."""
        if not self.deferred:
            return piece
        paths = [path for path, _ in leaves_with_paths(piece.params)]
        needed = set(paths)
        if piece.params is self.pieces.model.params:
            read = parameters_read(piece.function, piece.params, first(hidden))
            needed = {path for path, here in zip(paths, read) if here}
            needed |= set(piece.selected)
        params = map_with_paths(
            lambda path, leaf: in_memory(leaf) if path in needed else None, piece.params
        )
        return replace(piece, params=params)

    def _compressed(self, piece: Piece, params: Any, hidden: Any, dense_hidden: Any) -> Any:
        """`params`, of which some may be compressed, with the piece's selected ones compressed."""
        kept = {path: self._kept(full) for path, full in piece.selected.items()}
        params = with_leaves(params, {p: leaf for p, leaf in kept.items() if leaf is not None})
        todo = [path for path in piece.selected if kept[path] is None]
        if todo:
            observer = self._observer(piece)
            axes = observer.axes(piece.params, hidden)
            groups = [group.paths for group in observer.groups(piece.params, hidden)]
            self._refuse_unread(piece, groups)
            if self.settings.sequential != "matrix":
                groups = [tuple(path for paths in groups for path in paths)]
            for paths in groups:
                left = [path for path in paths if path in todo]
                if left:
                    problems = self._problems(piece, left, params, hidden, dense_hidden, axes)
                    params = with_leaves(params, self._solved(piece, left, problems))
        leaves = shapes_by_path(params)
        self.done |= {full: leaves[path] for path, full in piece.selected.items()}
        if self.journal is not None:
            self.journal.flush()
            if self.deferred:
                again = self.journal.get
                for full in piece.selected.values():
                    self.done[full] = Deferred.of(self.done[full], partial(again, full))
        return params

    def _kept(self, full: str) -> Any:
        return None if self.journal is None else self.journal.get(full)

    def _problems(
        self,
        piece: Piece,
        paths: Sequence[str],
        params: Any,
        hidden: Any,
        dense_hidden: Any,
        axes: Mapping[str, tuple[int, ...]],
    ) -> list[tuple[StoredMatrix, Problem]]:
        """The matrices to solve, with the statistics that they see now."""
        observer, settings = self._observer(piece), self.settings
        found = observer.statistics(paths, params, hidden)
        crossed = {}
        if settings.dense_target:
            given = (params, hidden, piece.params, dense_hidden)
            crossed = observer.cross_moments(paths, *given)
        leaves = shapes_by_path(piece.params)
        problems = []
        for path in paths:
            full, statistics = piece.selected[path], found[path]
            self._look_at(full, statistics)
            stored = StoredMatrix.of(full, leaves[path], {full: axes[path]})
            matrix = stored.matrix()
            if crossed:
                wanted = dense_target(
                    dense(matrix),
                    statistics["second_moment"],
                    crossed[path],
                    fraction=settings.dense_target,
                    damp=settings.damp,
                )
                matrix = wanted.astype(matrix.dtype)
            statistics = {**statistics, **self._known(full, stored)}
            wanted_only = {name: statistics[name] for name in settings.statistics}
            own = self.options[full.split("[")[0]]
            problems.append((stored, Problem(full, matrix, wanted_only, own)))
        if self.look is not None:
            self.look(problems)
        return problems

    def _known(self, full: str, stored: StoredMatrix) -> dict[str, Any]:
        """Statistics that were there before the walk, of one matrix."""
        path, _, index = full.partition("[")
        leaves: Any = dict(self.known.get(path, {}))
        if index:
            leaves = jax.tree.map(lambda leaf: leaf[int(index[:-1])], leaves)
        return {
            # Moments of the outputs are no entries of the matrix.
            n: leaf if n == OUTPUT_MOMENT else StoredMatrix(leaf, stored.dims).matrix()
            for n, leaf in leaves.items()
        }

    def _solved(
        self, piece: Piece, paths: Sequence[str], problems: list[tuple[StoredMatrix, Problem]]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        results = self.solve([problem for _, problem in problems])
        leaves = {}
        for path, (stored, _), result in zip(paths, problems, results, strict=True):
            leaves[path] = _lying_like(stored.leaf, stored.put_back(result))
        jax.block_until_ready(leaves)
        seconds = (time.perf_counter() - start) / len(problems)
        if self.journal is not None:
            for path, leaf in leaves.items():
                full = piece.selected[path]
                dead = {"dead_inputs": float(self.dead[full])} if full in self.dead else {}
                self.journal.put(full, leaf, seconds, **dead, **self.told.get(full, {}))
        return leaves

    def _observer(self, piece: Piece) -> Observer:
        key = (id(piece.function), tuple(piece.selected))
        if key not in self._observers:
            self._observers[key] = Observer(
                piece.function, list(piece.selected), self.settings.activations
            )
        return self._observers[key]

    def _advanced(self, piece: Piece, params: Any, hidden: Any) -> Any:
        lifted = self._lifted.setdefault(id(piece.function), lift(piece.function))
        return advance(lifted, params, hidden)

    def _look_at(self, path: str, statistics: Mapping[str, Any]) -> None:
        """Note what makes the statistics of a matrix thin."""
        if "second_moment" not in statistics:
            return
        second = statistics["second_moment"]
        rows, dead = map(int, _rows_and_dead(statistics["count"], second))
        features = second.shape[-1]
        if rows < features:
            self.notes.append(f"{path}: {rows} calibration tokens for {features} inputs")
        if dead:
            self.notes.append(f"{path}: {dead} inputs are always 0 in the calibration data")
        self.dead[path] = dead


@jax.jit
def _rows_and_dead(count: Any, second: Any) -> tuple[Any, Any]:
    """The fewest rows that a matrix saw, and how many inputs are always 0."""
    return jnp.min(count), (jnp.diagonal(second, axis1=-2, axis2=-1) == 0).sum()


@partial(jax.jit, static_argnums=0)
def advance(function: Any, params: Any, hidden: Any) -> Any:
    """The next hidden state, `[chunks, ...]`."""
    return jax.lax.map(lambda chunk: function(params, chunk), hidden)


def _lying_like(given: Any, made: Any) -> Any:
    """`made` split over a mesh as the leaf is in whose place it comes, as far as it can be."""
    sharding = getattr(given, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return made
    spec = fitting_spec(made, sharding.spec, sharding.mesh)
    batch = [name for name in BATCH_AXES if name in sharding.mesh.shape]
    return place(made, NamedSharding(sharding.mesh, spec), batch=batch)


def samples_together(samples: int, tokens: int, split: int) -> int:
    """How many samples pass through a block at a time: a multiple of `split` that divides them."""
    most = max(split, min(samples, TOKENS_TOGETHER // max(tokens, 1)))
    return max(c for c in range(split, most + 1, split) if samples % c == 0)


def _chunks(inputs: Any, mesh: Mesh | None) -> tuple[Any, ...]:
    """Inputs `[samples, ...]` as `[chunks, together, ...]`, split over the mesh."""
    arrays = tuple(map(np.asarray, inputs)) if isinstance(inputs, (tuple, list)) else (
        np.asarray(inputs),
    )  # fmt: skip
    samples = len(arrays[0])
    if not samples or any(len(array) != samples for array in arrays):
        raise InputError("calibration: every input needs the same number of samples, at least one")
    split = 1
    if mesh is not None:
        names = [name for name in BATCH_AXES if name in mesh.shape]
        split = int(np.prod([mesh.shape[name] for name in names], dtype=int))
    if samples % split:
        raise InputError(
            f"calibration: {samples} samples do not divide over {split} devices; "
            f"use {max(samples // split, 1) * split}"
        )
    tokens = arrays[0].shape[1] if arrays[0].ndim == 2 else 1
    together = samples_together(samples, tokens, split)
    cut = tuple(array.reshape(-1, together, *array.shape[1:]) for array in arrays)
    if mesh is None:
        return tuple(map(jnp.asarray, cut))
    sharding = NamedSharding(mesh, P(None, tuple(names)))
    return tuple(jax.device_put(array, sharding) for array in cut)
