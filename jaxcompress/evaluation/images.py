"""Accuracy of an image classifier."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.model import Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.data.images import normalize
from jaxcompress.progress import progress


def accuracy(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch: int = 250,
    against: Model | None = None,
) -> dict[str, Any]:
    """Share of images whose most likely class is the label.

    Args:
      model: normalized float32 images `[batch, height, width, 3]` to logits `[batch, classes]`.
      images: uint8 `[images, height, width, 3]`.
      labels: int `[images]`.
      batch: images at a time.
      against: the dense model; adds `agreement`, the share of equal predictions.

    Returns:
      `accuracy` in 0..1, `images`, and with `against` `agreement`.
    """
    models = [model] + ([against] if against is not None else [])
    found = []
    for one in models:
        apply = lift(one.apply)
        parts = []
        for at in progress(range(0, len(images), batch), "evaluate", unit="batch"):
            chunk = images[at : at + batch]
            padded = np.pad(chunk, ((0, batch - len(chunk)), (0, 0), (0, 0), (0, 0)))
            parts.append(np.asarray(_classes(apply, one.params, normalize(padded)))[: len(chunk)])
        found.append(np.concatenate(parts))
    out = {"accuracy": float((found[0] == labels).mean()), "images": len(labels)}
    if against is not None:
        out["agreement"] = float((found[0] == found[1]).mean())
    return out


@partial(jax.jit, static_argnums=0)
def _classes(apply: Any, params: Any, images: Any) -> jax.Array:
    return jnp.argmax(apply(params, images), axis=-1)
