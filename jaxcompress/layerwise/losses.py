"""Losses on calibration data: what gradients are taken of, and pruning is measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.errors import InputError
from jaxcompress.core.losses import in_float32, sum_over_chunks
from jaxcompress.core.model import Model
from jaxcompress.core.readers.lift import lift

Array = jax.Array

# `loss(params, batch) -> (sum, count)`, float32 scalars: over all batches, the sums over the
# counts are the mean loss. A batch is a pytree of arrays `[samples, ...]`.
Loss = Callable[[Any, Any], tuple[Array, Array]]


def loss_of(model: Model, batch: Any) -> Loss:
    """The loss that goes with a batch: of the next token, or of the class.

    Args:
      model: its leaves may be compressed.
      batch: token ids `[samples, seq]`, or a tuple of images `[samples, ...]` and labels
        `[samples]`.

    Raises:
      InputError: the batch is neither.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return classification(model)
    if not isinstance(batch, (tuple, list, dict)) and jnp.issubdtype(batch.dtype, jnp.integer):
        return next_token(model)
    raise InputError("calibration: the loss needs token ids, or a tuple of images and labels")


def next_token(model: Model) -> Loss:
    """Cross entropy of the next token; with blocks, logits of some positions at a time."""
    if model.blocks is None:
        apply = lift(model.apply)
        return lambda params, ids: _cross_entropy(apply(params, ids[:, :-1]), ids[:, 1:])
    hidden, head = lift(model.blocks.hidden), lift(model.blocks.head)

    def chunked(params: Any, ids: Array) -> tuple[Array, Array]:
        of_chunk, wide = in_float32(
            lambda params, states, labels: _cross_entropy(head(params, states), labels), params
        )
        return sum_over_chunks(of_chunk, wide, (hidden(params, ids[:, :-1]), ids[:, 1:]))

    return chunked


def classification(model: Model) -> Loss:
    """Cross entropy of the class, over batches (images, labels)."""
    apply = lift(model.apply)
    return lambda params, batch: _cross_entropy(apply(params, batch[0]), batch[1])


def mean_loss(loss: Loss, params: Any, batches: Iterable[Any]) -> float:
    """The mean of `loss` over all batches; pass a jitted `loss`."""
    pairs = [loss(params, batch) for batch in batches]
    return float(sum(total for total, _ in pairs) / sum(count for _, count in pairs))


def _cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    found = jnp.take_along_axis(logp, labels[..., None].astype(jnp.int32), axis=-1)
    return -found.sum(), jnp.float32(labels.size)
