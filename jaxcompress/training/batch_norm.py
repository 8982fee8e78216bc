"""Batch norm while a convolutional network trains that has no running statistics yet.

Those of a fresh network are those of nothing, and statistics are no parameters that a gradient
should move. So a convolutional network trains by the statistics of each batch (of the
whole batch, on however many devices, since sums run over the mesh; of each micro-batch where
gradients are accumulated; of each device's part under `pmap`). The running statistics take no part
in that: their gradient is 0. Afterwards `recalibrate` measures them on training images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.models import ConvNetConfig, functions_of

STATISTICS = "batch_stats"


def training_apply(model: Model) -> Callable[..., Any]:
    """`apply` as it is to be trained: batch norm by the statistics of the batch."""
    if not isinstance(model.config, ConvNetConfig):
        return model.apply

    def apply(variables: Any, images: Array) -> Array:
        return model.apply(variables, images, train=True, mutable=[STATISTICS])[0]

    return apply


def recalibrate(model: Model, batches: Iterable[Mapping[str, Any]]) -> Model:
    """The model with the running statistics of its batch norms measured on images.

    Mean and variance over all images, from those of each batch, its earlier layers normalized by
    the batch's own statistics, as in training.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.1.

    Args:
      model: a convolutional reference model; leaves may be compressed.
      batches: `{"images": float32 [batch, height, width, channels]}`; a few hundred images do.

    Raises:
      InputError: another model, or no batch.
    """
    if not isinstance(model.config, ConvNetConfig):
        raise InputError("recalibrate: only a convolutional model has the norms that this measures")
    # With momentum 1 the update of the statistics is the batch's own.
    config = dataclasses.replace(model.config, batch_norm_momentum=1.0)
    apply = functions_of(config).apply
    found, counts = [], []
    for batch in batches:
        found.append(jax.device_get(_statistics(apply, model.params, batch["images"])))
        counts.append(len(batch["images"]))
    if not sum(counts):
        raise InputError("recalibrate: no images; give at least one batch")

    def combined(*norms: Any) -> dict[str, Array]:
        """Of one batch norm: the variances in the batches, and that of their means."""
        means, variances = (
            np.stack([norm[name] for norm in norms]).astype(np.float64) for name in ("mean", "var")
        )
        mean = np.average(means, axis=0, weights=counts)
        var = np.average(variances + np.square(means - mean), axis=0, weights=counts)
        return {"mean": jnp.float32(mean), "var": jnp.float32(var)}

    measured = jax.tree.map(combined, *found, is_leaf=lambda x: "mean" in x)
    return model.replace(params={**model.params, STATISTICS: measured})


@partial(jax.jit, static_argnums=0)
def _statistics(apply: Callable[..., Any], variables: Any, images: Array) -> Any:
    """Mean and variance of each batch norm's inputs."""
    fresh = {**variables, STATISTICS: jax.tree.map(jnp.zeros_like, variables[STATISTICS])}
    _, updates = lift(apply)(fresh, images, train=True, mutable=[STATISTICS])
    return updates[STATISTICS]
