"""Depth pruning: the layers that change the hidden state least go."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Blocks, Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.models import take_layers

BATCH = 8  # windows that walk through the blocks together


def depth(
    model: Model,
    *,
    calibration: Any,
    drop: int = 1,
    score: Literal["block_influence", "mean_change"] = "block_influence",
) -> Model:
    """Depth pruning: drop the layers that change the hidden state least.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, equation 1 (block influence).

    Args:
      model: a model with `blocks`.
      calibration: int `[samples, ctx]` token ids (or the model's own inputs).
      drop: number of layers that go.
      score: "block_influence" (1 - mean cosine of a layer's input and output) or "mean_change"
        (mean |out - in|).

    Returns:
      The model with the other layers, its config rewritten.

    Raises:
      InputError: the model has no blocks, or `drop` leaves none.
    """
    scores = layer_scores(model, calibration, score)
    _check_drop(drop, len(scores))
    gone = set(np.argsort(scores, kind="stable")[:drop].tolist())
    kept = [i for i in range(len(scores)) if i not in gone]
    told = ", ".join(f"{s:.4f}" for s in scores)
    note = f"depth: dropped layers {sorted(gone)}, {score} per layer: {told}"
    return take_layers(model, kept).replace(notes=(*model.notes, note))


def depth_shapes(model: Model, *, drop: int = 1, score: str = "block_influence") -> Model:
    """A model of the shapes that `depth` gives: whichever layers go, those that stay are alike."""
    count = len(_walk(model).of(model.params))
    _check_drop(drop, count)
    return take_layers(model, range(count - drop))


def _check_drop(drop: int, count: int) -> None:
    if not 0 < drop < count:
        raise InputError(f"drop {drop}: the model has {count} layers, drop 1 to {count - 1}")


def _walk(model: Model) -> Blocks:
    if model.blocks is None:
        raise InputError("depth: the model has no Blocks, so its layers cannot be walked")
    return model.blocks


def layer_scores(model: Model, calibration: Any, score: str = "block_influence") -> np.ndarray:
    """How much each block changes the hidden state, float64 `[layers]`. See `depth`."""
    inputs = np.asarray(calibration)
    walk = _walk(model)
    layers = walk.of(model.params)
    embed, block = jax.jit(lift(walk.embed)), lift(walk.block)
    totals = np.zeros(len(layers))
    count = 0
    for at in range(0, len(inputs), BATCH):
        hidden = embed(model.params, inputs[at : at + BATCH])
        for i, layer in enumerate(layers):
            hidden, change, size = _step(block, layer, hidden, score)
            totals[i] += float(change)
        count += int(size)
    return totals / max(count, 1)


@partial(jax.jit, static_argnums=(0, 3))
def _step(block: Any, layer: Any, hidden: Any, score: str) -> tuple[Any, jax.Array, jax.Array]:
    out = block(layer, hidden)
    # A block may carry more than the hidden state (positions, a mask): the first leaf is it.
    before, after = (jax.tree.leaves(h)[0].astype(jnp.float32) for h in (hidden, out))
    if score == "mean_change":
        return out, jnp.abs(after - before).sum(), jnp.asarray(before.size)
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    cosine = (before * after).sum(-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    return out, (1 - cosine).sum(), jnp.asarray(cosine.size)
