"""Sharing layers: which neighbours can be one block, by what it does to the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.models import share_layers
from jaxcompress.models.sharing import blend

BATCH = 8  # samples at a time


class Run(NamedTuple):
    """Neighbouring layers that share a block: how many, and its parameters."""

    length: int
    block: Any


def share(
    model: Model,
    *,
    calibration: Any,
    layers: int = 1,
    weights: Literal["best", "mean", "first"] = "best",
    loss: Literal["kl", "mse"] = "kl",
) -> Model:
    """Weight sharing between layers: neighbours become one block, stored once.

    ALBERT (Lan et al., arXiv:1909.11942, section 3.1) shares all layers; here those share that can:
    greedily, one pair of neighbouring runs of layers after the other, always the one after which
    the outputs on the calibration data differ least from the dense model's.

    Args:
      model: a model with `blocks` of one shape.
      calibration: int `[samples, ctx]` token ids, or the model's own inputs.
      layers: distinct blocks that remain.
      weights: of a shared block: the "mean" of its layers' weights, those of the "first" of them,
        or the "best" of both and those of the last.
      loss: how outputs are compared: "kl" of their softmax, or "mse" for outputs that are no
        logits.

    Returns:
      The model with `layers` distinct blocks, as deep as before. Its notes tell which layers share
      and the loss after each step.

    Raises:
      InputError: no blocks, blocks that differ, or a number of layers out of range.
    """
    walk, runs = _runs(model, layers)
    measure = _measure(model, walk, calibration, loss)
    told = []
    while len(runs) > layers:
        least, runs = min(
            ((measure(_spread(choice)), choice) for choice in _choices(runs, weights)),
            key=lambda found: found[0],
        )
        told.append(f"{least:.4g}")
    layer_map = [i for i, run in enumerate(runs) for _ in range(run.length)]
    params = walk.put(model.params, _spread(runs))
    shared = share_layers(model.replace(params=params), layer_map, weights="first")
    note = f"share: layers {layer_map}, {loss} after each step: {', '.join(told)}"
    return shared.replace(notes=(*model.notes, note))


def share_shapes(model: Model, *, layers: int = 1, **options: Any) -> Model:
    """A model of the shapes that `share` gives: whichever layers share, the blocks are alike."""
    _, runs = _runs(model, layers)
    layer_map = [min(i, layers - 1) for i in range(len(runs))]
    return share_layers(model, layer_map, weights="first")


def _runs(model: Model, layers: int) -> tuple[Blocks, list[Run]]:
    if model.blocks is None:
        raise InputError("share: the model has no Blocks, so its layers cannot be told apart")
    runs = [Run(1, block) for block in model.blocks.of(model.params)]
    if not 1 <= layers <= len(runs):
        raise InputError(f"layers {layers}: the model has {len(runs)}; keep 1 to {len(runs)}")
    return model.blocks, runs


def _spread(runs: list[Run]) -> list[Any]:
    return [run.block for run in runs for _ in range(run.length)]


def _choices(runs: list[Run], weights: str) -> Iterator[list[Run]]:
    """Every way to make two neighbouring runs one."""
    for i, (one, other) in enumerate(itertools.pairwise(runs)):
        both = one.length + other.length
        blocks = []
        if weights in ("best", "mean"):
            blocks.append(blend([one.block] * one.length + [other.block] * other.length))
        if weights in ("best", "first"):
            blocks.append(one.block)
        if weights == "best":
            blocks.append(other.block)
        for block in blocks:
            yield [*runs[:i], Run(both, block), *runs[i + 2 :]]


def _measure(
    model: Model, walk: Blocks, calibration: Any, loss: str
) -> Callable[[list[Any]], float]:
    """`measure(blocks)`: mean loss of the outputs with these blocks against the dense model's."""
    given = calibration if isinstance(calibration, tuple) else (calibration,)
    inputs = [
        tuple(np.asarray(x)[at : at + BATCH] for x in given)
        for at in range(0, len(given[0]), BATCH)
    ]
    apply, head, hidden = lift(model.apply), lift(walk.head), jax.jit(lift(walk.hidden))
    # The dense model's hidden states are small beside its outputs, which are made anew.
    dense = [hidden(model.params, *batch) for batch in inputs]

    @jax.jit
    def sums(params: Any, dense_params: Any, states: Any, *batch: Any) -> tuple[Any, Any]:
        out = apply(params, *batch).astype(jnp.float32)
        want = head(dense_params, states).astype(jnp.float32)
        if loss == "mse":
            each = jnp.square(out - want).mean(-1)
        else:
            log_p, log_q = jax.nn.log_softmax(want), jax.nn.log_softmax(out)
            each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        return each.sum(), each.size

    def measure(blocks: list[Any]) -> float:
        params = walk.put(model.params, blocks)
        found = [sums(params, model.params, *both) for both in zip(dense, *zip(*inputs))]
        total, places = np.sum(np.asarray(found, np.float64), axis=0)
        return float(total / places)

    return measure
