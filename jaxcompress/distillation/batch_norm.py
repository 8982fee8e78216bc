"""Batch norm while a convolutional student trains.

The running statistics of a fresh network are those of nothing, and statistics are no parameters
that a gradient should move. So a convolutional network trains by the statistics of each batch (of
the whole batch, on however many devices, since sums run over the mesh; of each micro-batch where
gradients are accumulated). The running statistics take no part in that: their gradient is 0.
Afterwards `recalibrate` measures them on training images. The teacher uses its running statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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

    Mean and variance over all images, from the moments of each batch, its earlier layers
    normalized by the batch's own statistics, as in training.

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
    total: Any = None
    count = 0
    for batch in batches:
        sums = _sums(apply, model.params, batch["images"])
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        count += len(batch["images"])
    if not count:
        raise InputError("recalibrate: no images; give at least one batch")
    averages = jax.tree.map(lambda x: x / count, total)
    measured = _each_norm(
        lambda norm: {"mean": norm["mean"], "var": norm["square"] - jnp.square(norm["mean"])},
        averages,
    )
    return model.replace(params={**model.params, STATISTICS: measured})


@partial(jax.jit, static_argnums=0)
def _sums(apply: Callable[..., Any], variables: Any, images: Array) -> Any:
    """Mean and mean square of each batch norm's inputs, times the number of images."""
    count = len(images)
    fresh = {**variables, STATISTICS: jax.tree.map(jnp.zeros_like, variables[STATISTICS])}
    _, updates = lift(apply)(fresh, images, train=True, mutable=[STATISTICS])
    return _each_norm(
        lambda norm: {
            "mean": count * norm["mean"],
            "square": count * (norm["var"] + jnp.square(norm["mean"])),
        },
        updates[STATISTICS],
    )


def _each_norm(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` on the statistics of every batch norm."""
    return jax.tree.map(function, tree, is_leaf=lambda x: "mean" in x)
