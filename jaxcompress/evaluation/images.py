"""Accuracy of an image classifier, and its fidelity to a dense one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.data.images import normalize
from jaxcompress.evaluation.running import Placement, lifted
from jaxcompress.evaluation.slices import over_slices
from jaxcompress.progress import progress


def accuracy(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch: int = 250,
    against: Model | None = None,
    slices: int = 0,
) -> dict[str, Any]:
    """Share of images whose most likely class is the label.

    Parameters on a mesh: see `evaluation.language.perplexity`.

    Args:
      model: normalized float32 images `[batch, height, width, 3]` to logits `[batch, classes]`.
      images: uint8 `[images, height, width, 3]`, or float32 as the model takes them.
      labels: int `[images]`.
      batch: images at a time.
      against: the dense model; adds `kl` (mean KL(dense || model) per image, nats) and
        `agreement`, the share of equal predictions.
      slices: adds the accuracies of so many contiguous runs of images, from the same pass.

    Returns:
      `accuracy` in 0..1, `images`, with `against` `kl` and `agreement`, with `slices` `slices` (a
      list) and `spread` (their standard deviation).

    Raises:
      InputError: no images, not as many labels, or a dense model with other classes.
    """
    if len(images) != len(labels) or not len(images):
        raise InputError(f"accuracy: {len(images)} images and {len(labels)} labels")
    models = [model] if against is None else [model, against]
    place = Placement.of([one.params for one in models])
    batch = -(-batch // place.shards) * place.shards
    applies = tuple(lifted(one.apply) for one in models)
    params = tuple(place.put(one.params) for one in models)
    rows = []
    for at in progress(range(0, len(images), batch), "evaluate", unit="batch"):
        chunk = images[at : at + batch]
        if chunk.dtype == np.uint8:
            chunk = normalize(chunk)
        padded = np.pad(chunk, ((0, batch - len(chunk)), *((0, 0),) * (chunk.ndim - 1)))
        found = _program(place.everywhere)(applies, params, place.batch(padded))
        rows.append([np.asarray(x)[: len(chunk)] for x in found])
    classes, dense_classes, kl = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    right = classes == labels
    out = {"accuracy": float(right.mean()), "images": len(labels)}
    if against is not None:
        out["kl"] = float(kl.mean(dtype=np.float64))
        out["agreement"] = float((classes == dense_classes).mean())
    return out | over_slices(right, slices, np.mean)


@functools.cache
def _program(everywhere: Any) -> Any:
    return jax.jit(_predictions, static_argnums=0, out_shardings=everywhere)


def _predictions(
    applies: tuple[Any, ...], params: tuple[Any, ...], images: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Classes by the model and by the last of the models, and KL(last || model), each `[batch]`."""
    logits = [apply(p, images) for apply, p in zip(applies, params, strict=True)]
    sizes = [x.shape[-1] for x in logits]
    if sizes[0] != sizes[-1]:
        raise InputError(f"against: {sizes[-1]} classes, the model has {sizes[0]}")
    mine, dense = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits[0], logits[-1]))
    kl = (jnp.exp(dense) * (dense - mine)).sum(-1)
    return logits[0].argmax(-1), logits[-1].argmax(-1), kl
