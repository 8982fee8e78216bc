"""The walk with gradients: block after block is trained to give what the dense model gives there.

embed -> blocks -> head, as in `walk`. A block gets the inputs that the blocks trained before it
give, and its aim is the hidden state of the dense model behind it. All steps of a block are one
compiled program, which serves every block of equal structure; memory is one block with its
gradients, and the hidden states of the calibration data, the model's own and the dense one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import CompressedArray, densify
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.partition import merge, split
from jaxcompress.core.readers.contractions import contractions
from jaxcompress.core.readers.lift import Lifted, lift
from jaxcompress.core.readers.scan_blocks import scan_blocks
from jaxcompress.layerwise.observe import first
from jaxcompress.layerwise.pieces import Piece, Pieces, shapes_by_path, with_leaves
from jaxcompress.layerwise.problem import StoredMatrix
from jaxcompress.layerwise.walk import Journal, Walked
from jaxcompress.progress import progress

Array = jax.Array
Leaves = dict[str, CompressedArray]  # by path within a piece

SAMPLES_TOGETHER = 4  # of calibration data that pass through a block at a time


@dataclass(frozen=True)
class BlockTraining:
    """How the leaves of a block are trained; static and hashable.

    Attributes:
      prepare: `prepare(matrix)`: what trains in the place of a stored matrix `[*lead, N, K]`: a
        compressed array of the dims `[N, K]`, whose `trains` says which of its buffers do.
      update: `update(leaves, gradients, progress)`: the leaves after a step. Both are trees
        `{path: leaf}` with None where nothing trains; progress runs from 0 to 1 in float32.
      finish: what is kept of a trained leaf; its dense array must be the same.
      steps: of a block.
      batch: samples in a step.
      seed: of the draw of the batches.
    """

    prepare: Callable[[Any], CompressedArray]
    update: Callable[[Any, Any, Array], Any]
    finish: Callable[[Any], CompressedArray]
    steps: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("steps", self.steps, 0), ("batch", self.batch, 1)):
            if value < least:
                raise InputError(f"{name} {value}: must be {least} or more")


def train_blocks(
    model: Model,
    chosen: Collection[str],
    inputs: Any,
    training: BlockTraining,
    *,
    journal: Journal | None = None,
    what: str = "train",
) -> Walked:
    """`model` with the chosen matrices trained piece by piece on the mean squared error.

    A piece whose training made its outputs worse, over all calibration data, keeps its start.

    Args:
      model: taken apart by its `blocks`, or by its one top-level scan; else trained whole.
      chosen: paths of the matrices.
      inputs: the model's inputs, `[samples, ...]` each: token ids, or a tuple of arrays.
      training: how.
      journal: keeps results, so that a killed run goes on behind the last block that was done.
      what: name of the work, for the progress.

    Raises:
      InputError: a chosen matrix that nothing reads, or inputs of different lengths.
    """
    hidden = _samples(inputs)
    if model.blocks is None:
        model = model.replace(blocks=scan_blocks(model.apply, model.params, *first(hidden)))
    run = _Training(model, chosen, training, journal)
    pieces = run.pieces.pieces
    last = max((i for i, piece in enumerate(pieces) if piece.selected), default=-1)
    dense_hidden: Any = hidden
    for i, piece in progress(list(enumerate(pieces[: last + 1])), what, unit="block"):
        hidden, dense_hidden = run.through(piece, hidden, dense_hidden, i == last)
    return Walked(run.pieces.assemble(run.done), run.notes)


class _Training:
    def __init__(
        self,
        model: Model,
        chosen: Collection[str],
        training: BlockTraining,
        journal: Journal | None,
    ) -> None:
        self.pieces, self.training, self.journal = Pieces(model, chosen), training, journal
        self.done: dict[str, Any] = {}
        self.notes: list[str] = []
        if model.blocks is None:
            self.notes.append("the model has no blocks: all its layers are trained together")
        self._lifted: dict[int, Lifted] = {}

    def through(self, piece: Piece, hidden: Any, dense_hidden: Any, last: bool) -> tuple[Any, Any]:
        """What the next piece is given, behind this one trained and behind the dense one."""
        function = self._lifted.setdefault(id(piece.function), lift(piece.function))
        kept = {path: self._kept(full) for path, full in piece.selected.items()}
        leaves = {path: leaf for path, leaf in kept.items() if leaf is not None}
        todo = len(leaves) < len(kept)
        if not todo and last:
            self.done |= {full: leaves[path] for path, full in piece.selected.items()}
            return hidden, dense_hidden
        target = _forward(function, piece.params, dense_hidden)
        if todo:
            leaves = self._trained(piece, function, hidden, target)
        self.done |= {full: leaves[path] for path, full in piece.selected.items()}
        if last:
            return hidden, target
        return _forward(function, with_leaves(piece.params, leaves), hidden), target

    def _kept(self, full: str) -> Any:
        return None if self.journal is None else self.journal.get(full)

    def _trained(
        self, piece: Piece, function: Lifted, hidden: Any, target: Any
    ) -> dict[str, CompressedArray]:
        begun = time.perf_counter()
        stored = self._matrices(piece, hidden)
        start: Leaves = {}
        for path, matrix in stored.items():
            made = matrix.put_back(self.training.prepare(matrix.matrix()))
            assert isinstance(made, CompressedArray)
            start[path] = made
        order = _batches(
            len(jax.tree.leaves(hidden)[0]), self.training.steps, self.training.batch,
            self.training.seed,
        )  # fmt: skip
        found, before, after = _train(
            function, self.training.update, start, piece.params, hidden, target, order
        )
        if not float(after) <= float(before):
            self.notes.append(
                f"{piece.name}: training raised the error from {before:.3g} to {after:.3g}; "
                "its start is kept"
            )
            found = start
        finish = jax.jit(self.training.finish)
        leaves = {path: finish(leaf) for path, leaf in found.items()}
        jax.block_until_ready(leaves)
        if self.journal is not None:
            seconds = (time.perf_counter() - begun) / len(leaves)
            for path, leaf in leaves.items():
                self.journal.put(piece.selected[path], leaf, seconds)
            self.journal.flush()
        return leaves

    def _matrices(self, piece: Piece, hidden: Any) -> dict[str, StoredMatrix]:
        known = shapes_by_path(piece.params)
        axes = contractions(piece.function)(piece.params, first(hidden))
        if unread := [full for path, full in piece.selected.items() if path not in axes]:
            raise InputError(f"{unread[0]}: no product reads it; exclude it")
        return {
            path: StoredMatrix.of(full, known[path], {full: axes[path]})
            for path, full in piece.selected.items()
        }


@partial(jax.jit, static_argnums=0)
def _forward(function: Lifted, params: Any, hidden: Any) -> Any:
    """The next hidden state of every sample."""
    return jax.lax.map(lambda h: function(params, h), hidden, batch_size=SAMPLES_TOGETHER)


@partial(jax.jit, static_argnums=(0, 1))
def _train(
    function: Lifted,
    update: Callable[[Any, Any, Array], Any],
    leaves: Leaves,
    params: Any,
    hidden: Any,
    target: Any,
    order: Array,
) -> tuple[Leaves, Array, Array]:
    """The leaves after a step for each row of `order` `[steps, batch]`; errors before and after."""
    trainable, frozen = split(leaves)
    steps = len(order)

    def given(trainable: Any) -> Any:
        return with_leaves(params, densify(merge(trainable, frozen)))

    def loss_of(trainable: Any, chosen: Array) -> Array:
        weights = given(trainable)
        h, wanted = jax.tree.map(lambda x: x[chosen], (hidden, target))
        return _error(jax.vmap(lambda one: function(weights, one))(h), wanted)

    def step(trainable: Any, given: tuple[Array, Array]) -> tuple[Any, None]:
        chosen, progress = given
        return update(trainable, jax.grad(loss_of)(trainable, chosen), progress), None

    def whole(trainable: Any) -> Array:
        weights = given(trainable)

        def one(pair: Any) -> Array:
            return _error(function(weights, pair[0]), pair[1])

        return jax.lax.map(one, (hidden, target), batch_size=SAMPLES_TOGETHER).mean()

    progress = jnp.arange(steps, dtype=jnp.float32) / max(steps, 1)
    trained, _ = jax.lax.scan(step, trainable, (order, progress))
    return merge(trained, frozen), whole(trainable), whole(trained)


def _error(output: Any, wanted: Any) -> Array:
    """The mean squared error, relative to each token's own size, over all floating leaves.

    Some tokens of language models carry hidden states a hundred times as large as the others, and
    would be all of a plain mean. What follows normalizes them all to one size.
    """
    total, count = jnp.float32(0), 0
    for x, y in zip(jax.tree.leaves(output), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
            size = jnp.square(y).mean(-1, keepdims=True)
            # The usual size bounds what a token of nothing weighs.
            usual = jnp.maximum(jnp.median(size), jnp.finfo(jnp.float32).tiny)
            total, count = total + (jnp.square(x - y) / (size + usual)).sum(), count + x.size
    return total / max(count, 1)


def _batches(samples: int, steps: int, batch: int, seed: int) -> Array:
    """Samples of each step, int32 `[steps, batch]`: all of them once before any comes again."""
    batch = min(batch, samples)
    draw = np.random.default_rng(seed)
    each = samples // batch
    epochs = [draw.permutation(samples)[: each * batch] for _ in range(-(-steps // each))]
    order = np.concatenate(epochs or [np.zeros(0, int)]).reshape(-1, batch)[:steps]
    return jnp.asarray(order, jnp.int32)


def _samples(inputs: Any) -> tuple[Array, ...]:
    """Inputs `[samples, ...]` as `[samples, 1, ...]`."""
    given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    arrays = tuple(map(jnp.asarray, given))
    if not len(arrays[0]) or any(len(array) != len(arrays[0]) for array in arrays):
        raise InputError("calibration: every input needs the same number of samples, at least one")
    return tuple(array[:, None] for array in arrays)
