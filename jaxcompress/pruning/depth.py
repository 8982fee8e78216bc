"""Depth pruning: the layers that matter least go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.decisions import tell
from jaxcompress.core.errors import InputError
from jaxcompress.core.losses import sum_over_chunks
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.models import take_layers
from jaxcompress.pruning.patterns import removed_count

BATCH = 8  # windows that walk through the blocks together

Score = Literal["block_influence", "mean_change", "angular", "perplexity"]


def depth(
    model: Model,
    *,
    calibration: Any,
    drop: int = 1,
    sparsity: float = 0.0,
    score: Score = "block_influence",
) -> Model:
    """Depth pruning: drop the layers that change the hidden state, or the loss, least.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, equation 1 (block influence); Gromov et al.,
    "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887, equation 7
    (angular); Song et al., "SLEB", arXiv:2402.09025, algorithm 1 (perplexity).

    Args:
      model: a model with `blocks`.
      calibration: int `[samples, ctx]` token ids (or the model's own inputs).
      drop: number of layers that go.
      sparsity: fraction of the layers that go, floor(sparsity * layers), in the place of `drop`.
      score: "block_influence" (1 - mean cosine of a layer's input and output); "mean_change" (mean
        |out - in|); "angular" (a run of `drop` consecutive layers goes, over which the hidden
        state of the last position turns least); "perplexity" (one layer after another goes,
        each time the one without which the loss is lowest).

    Returns:
      The model with the other layers, its config rewritten.

    Raises:
      InputError: the model has no blocks, or `drop` leaves none.
    """
    walk = _walk(model)
    count = len(walk.of(model.params))
    drop = _count(count, drop, sparsity)
    inputs = _arrays(calibration)
    if score == "angular":
        turns = angular_distances(model, inputs, drop)
        start = int(np.argmin(turns))
        gone, told = list(range(start, start + drop)), _told("angle of runs / pi", turns)
        least = [turns[max(i - drop + 1, 0) : i + 1].min() for i in range(count)]
        _tell(score, least, gone)
    elif score == "perplexity":
        gone, losses = greedy_by_loss(model, inputs, drop)
        told = _told("loss after each", losses)
    else:
        scores = layer_scores(model, inputs, score)
        gone = sorted(np.argsort(scores, kind="stable")[:drop].tolist())
        told = _told(f"{score} per layer", scores)
        _tell(score, scores, gone)
    kept = [i for i in range(count) if i not in gone]
    note = f"depth: dropped layers {gone}, {told}"
    return take_layers(model, kept).replace(notes=(*model.notes, note))


def depth_shapes(model: Model, *, drop: int = 1, sparsity: float = 0.0, **_: Any) -> Model:
    """A model of the shapes that `depth` gives: whichever layers go, those that stay are alike."""
    count = len(_walk(model).of(model.params))
    return take_layers(model, range(count - _count(count, drop, sparsity)))


def _told(what: str, numbers: Sequence[float] | np.ndarray) -> str:
    return f"{what}: " + ", ".join(f"{x:.4f}" for x in numbers)


def _tell(score: str, of_layers: Sequence[float] | np.ndarray, gone: Sequence[int]) -> None:
    tell("layers", "layers", score, of_layers, [i not in gone for i in range(len(of_layers))])


def _count(layers: int, drop: int, sparsity: float) -> int:
    if sparsity:
        drop = removed_count(layers, sparsity)
    if not 0 < drop < layers:
        raise InputError(f"drop {drop}: the model has {layers} layers, drop 1 to {layers - 1}")
    return drop


def _walk(model: Model) -> Blocks:
    if model.blocks is None:
        raise InputError("depth: the model has no Blocks, so its layers cannot be walked")
    return model.blocks


def _arrays(calibration: Any) -> tuple[np.ndarray, ...]:
    several = isinstance(calibration, tuple)
    return tuple(map(np.asarray, calibration)) if several else (np.asarray(calibration),)


def _batches(inputs: tuple[np.ndarray, ...]) -> Iterator[tuple[np.ndarray, ...]]:
    for at in range(0, len(inputs[0]), BATCH):
        yield tuple(x[at : at + BATCH] for x in inputs)


# ---------------------------------------------------------------------------- one layer at a time


def layer_scores(model: Model, calibration: Any, score: str = "block_influence") -> np.ndarray:
    """How much each block changes the hidden state, float64 `[layers]`. See `depth`."""
    walk = _walk(model)
    layers = walk.of(model.params)
    embed, block = jax.jit(lift(walk.embed)), lift(walk.block)
    totals = np.zeros(len(layers))
    count = 0
    for batch in _batches(_arrays(calibration)):
        hidden = embed(model.params, *batch)
        for i, layer in enumerate(layers):
            hidden, change, size = _step(block, layer, hidden, score)
            totals[i] += float(change)
        count += int(size)
    return totals / max(count, 1)


@partial(jax.jit, static_argnums=(0, 3))
def _step(block: Any, layer: Any, hidden: Any, score: str) -> tuple[Any, jax.Array, jax.Array]:
    out = block(layer, hidden)
    before, after = (_stream(h).astype(jnp.float32) for h in (hidden, out))
    if score == "mean_change":
        return out, jnp.abs(after - before).sum(), jnp.asarray(before.size)
    cosine = _cosine(before, after)
    return out, (1 - cosine).sum(), jnp.asarray(cosine.size)


def _stream(hidden: Any) -> jax.Array:
    """The hidden state; a block may carry more (positions, a mask): the first leaf is it."""
    return jax.tree.leaves(hidden)[0]


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


# ---------------------------------------------------------------------------- runs of layers


def angular_distances(model: Model, calibration: Any, run: int) -> np.ndarray:
    """By how much each run of `run` layers turns the last position's hidden state.

    arccos(cosine of a run's input and output) / pi, in [0, 1], mean over the samples: float64
    `[layers - run + 1]`.

    Source: Gromov et al., arXiv:2403.17887, section 3.2, equation 7.
    """
    walk = _walk(model)
    layers = walk.of(model.params)
    embed, block = jax.jit(lift(walk.embed)), jax.jit(lift(walk.block))
    totals, count = np.zeros(len(layers) - run + 1), 0
    for batch in _batches(_arrays(calibration)):
        hidden = embed(model.params, *batch)
        ends = [_last(hidden)]
        for layer in layers:
            hidden = block(layer, hidden)
            ends.append(_last(hidden))
        for start in range(len(totals)):
            cosine = np.clip(np.asarray(_cosine(ends[start], ends[start + run])), -1, 1)
            totals[start] += float((np.arccos(cosine.astype(np.float64)) / np.pi).sum())
        count += len(batch[0])
    return totals / count


@jax.jit
def _last(hidden: Any) -> jax.Array:
    return _stream(hidden)[:, -1].astype(jnp.float32)


# ---------------------------------------------------------------------------- greedy by the loss


class Walker:
    """The loss of a language model block by block, any of them left out; nothing compiles twice.

    Args:
      model: with `blocks`.
    """

    def __init__(self, model: Model) -> None:
        self.walk = _walk(model)
        self.embed, self.block = jax.jit(lift(self.walk.embed)), jax.jit(lift(self.walk.block))
        self._loss = jax.jit(partial(_next_token, lift(self.walk.head)))

    def through(self, layers: Sequence[Any], hidden: Any) -> Any:
        """The hidden state behind these layers."""
        for layer in layers:
            hidden = self.block(layer, hidden)
        return hidden

    def loss(self, params: Any, hidden: Any, labels: Any) -> float:
        """Summed cross entropy of the labels, given the last hidden state."""
        return float(self._loss(params, hidden, labels))

    def mean_loss(self, params: Any, kept: Sequence[int], ids: np.ndarray) -> float:
        """Mean cross entropy of the next token with these layers, in nats."""
        layers = self.walk.of(params)
        total = 0.0
        for (batch,) in _batches((ids,)):
            hidden = self.through([layers[i] for i in kept], self.embed(params, batch[:, :-1]))
            total += self.loss(params, hidden, batch[:, 1:])
        return total / ids[:, 1:].size


def greedy_by_loss(model: Model, calibration: Any, drop: int) -> tuple[list[int], list[float]]:
    """The layers that go one after another, each the one without which the loss is lowest.

    Source: Song et al., arXiv:2402.09025, algorithm 1.

    Args:
      model: a language model with `blocks`.
      calibration: int `[samples, ctx]` token ids.
      drop: how many layers go.

    Returns:
      (layers that go, sorted; mean loss per token in nats after each removal).

    Raises:
      InputError: the data are no token ids, whose next one could be predicted.
    """
    ids = token_ids_of(calibration)
    walker = Walker(model)
    layers = walker.walk.of(model.params)
    left, losses = list(range(len(layers))), []
    first: np.ndarray | None = None
    for _ in range(drop):
        without = np.zeros(len(left))
        for (batch,) in _batches((ids,)):
            before = walker.embed(model.params, batch[:, :-1])
            for place, skipped in enumerate(left):
                hidden = walker.through([layers[i] for i in left[place + 1 :]], before)
                without[place] += walker.loss(model.params, hidden, batch[:, 1:])
                before = walker.block(layers[skipped], before)
        first = without / ids[:, 1:].size if first is None else first
        best = int(np.argmin(without))
        left.pop(best)
        losses.append(float(without[best]) / ids[:, 1:].size)
    gone = [i for i in range(len(layers)) if i not in left]
    if first is not None:
        _tell("loss without it", first, gone)
    return gone, losses


def token_ids_of(calibration: Any) -> np.ndarray:
    """The token ids `[samples, ctx]` of calibration data. Raises `InputError` for others."""
    ids = _arrays(calibration)[0]
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise InputError("calibration: the loss of the next token needs token ids [samples, ctx]")
    return ids


def _next_token(head: Any, params: Any, hidden: Any, labels: jax.Array) -> jax.Array:
    """Summed cross entropy of the labels, logits of some positions at a time."""
    leaves, tree = jax.tree.flatten(hidden)

    def of_chunk(params: Any, *given: jax.Array) -> jax.Array:
        *states, labels = given
        logits = head(params, jax.tree.unflatten(tree, states)).astype(jnp.float32)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        return -found.sum()

    if len(leaves) > 1:  # more than the hidden state goes along: all positions at once
        return of_chunk(params, *leaves, labels)
    return sum_over_chunks(of_chunk, params, (*leaves, labels))
