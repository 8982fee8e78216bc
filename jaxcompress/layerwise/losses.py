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
from jaxcompress.models import EncoderConfig

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
      InputError: the batch is neither, or the model an encoder, which predicts nothing.
    """
    if isinstance(model.config, EncoderConfig):
        raise InputError(
            f"{model.config.model_type}: an encoder predicts no tokens, so it has no loss to "
            "measure; use a score of weights, activations or gradients"
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return classification(model)
    if not isinstance(batch, (tuple, list, dict)) and jnp.issubdtype(batch.dtype, jnp.integer):
        return next_token(model)
    raise InputError("calibration: the loss needs token ids, or a tuple of images and labels")


def slope_of(model: Model, batch: Any) -> Loss:
    """What gradients are taken of for scores: the loss; of an encoder `projected_embedding`.

    Args:
      model: see `loss_of`.
      batch: as of `loss_of`; of an encoder token ids, or a tuple of token ids and their mask.
    """
    if isinstance(model.config, EncoderConfig):
        return projected_embedding(model)
    return loss_of(model, batch)


def projected_embedding(model: Model) -> Loss:
    """The mean of an encoder's hidden states, of unit length, along a random direction.

    Of a sequence that is v . e with v of entries +1 and -1, drawn from its ids. A squared gradient
    is then, on average over v, that of |e - e of the dense model|^2 / 2 to second order: the
    diagonal of its Gauss-Newton matrix (Bekas et al. 2007, "An estimator for the diagonal of a
    matrix", section 2).
    """
    apply = lift(model.apply)

    def projected(params: Any, batch: Any) -> tuple[Array, Array]:
        ids, *mask = batch if isinstance(batch, (tuple, list)) else (batch,)
        hidden = apply(params, ids, *mask).astype(jnp.float32)
        weights = mask[0] if mask else jnp.ones(ids.shape)
        pooled = (hidden * weights[..., None]).sum(1)  # over its length: the count cancels
        embedding = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
        places = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.uint32)
        drawn = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(0), n))(
            (ids.astype(jnp.uint32) * places).sum(1)
        )
        width = embedding.shape[1:]
        signs = jax.vmap(lambda key: jax.random.rademacher(key, width, jnp.float32))(drawn)
        return (signs * embedding).sum(), jnp.float32(len(ids))

    return projected


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
