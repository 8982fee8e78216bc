"""What is minimized: sums over a batch, so that any split of it adds up to the same gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.losses import CHUNK, in_float32, sum_over_chunks
from jaxcompress.core.model import Model
from jaxcompress.core.readers.lift import lift

Sums = dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Objective:
    """A loss, and the further metrics of a batch.

    Attributes:
      function: `function(params, batch, key, constants) -> {metric: (sum, count)}`, both float32
        scalars. The sum of "loss" over all micro-batches and devices, divided by its count, is
        minimized: gradients are those of the whole batch however it is split.
      constants: pytree given to `function` as an argument and never trained, such as the
        parameters of a teacher under shardings of their own.
    """

    function: Callable[[Any, dict[str, Array], Array, Any], Sums]
    constants: Any = None


def next_token(model: Model, *, chunk: int = CHUNK) -> Objective:
    """Cross entropy of the next token, over batches `{"ids": [batch, seq]}`.

    Where the model has blocks, logits exist for `chunk` positions at a time only.
    """
    if model.blocks is None:
        apply = lift(model.apply)

        def whole(params: Any, batch: dict[str, Array], key: Array, constants: Any) -> Sums:
            ids = batch["ids"]
            return _cross_entropy(apply(params, ids[:, :-1]), ids[:, 1:])

        return Objective(whole)
    hidden, head = lift(model.blocks.hidden), lift(model.blocks.head)

    def chunked(params: Any, batch: dict[str, Array], key: Array, constants: Any) -> Sums:
        ids = batch["ids"]
        loss, wide = in_float32(
            lambda params, states, labels: _cross_entropy(head(params, states), labels), params
        )
        states = hidden(params, ids[:, :-1])
        return sum_over_chunks(loss, wide, (states, ids[:, 1:]), chunk=chunk)

    return Objective(chunked)


def classification(model: Model) -> Objective:
    """Cross entropy and accuracy, over batches `{"images": [batch, ...], "labels": [batch]}`."""
    apply = lift(model.apply)

    def function(params: Any, batch: dict[str, Array], key: Array, constants: Any) -> Sums:
        logits, labels = apply(params, batch["images"]), batch["labels"]
        sums = _cross_entropy(logits, labels)
        right = (logits.argmax(-1) == labels).sum(dtype=jnp.float32)
        return {**sums, "accuracy": (right, sums["loss"][1])}

    return Objective(function)


def _cross_entropy(logits: Array, labels: Array) -> Sums:
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    found = jnp.take_along_axis(logp, labels[..., None].astype(jnp.int32), axis=-1)
    return {"loss": (-found.sum(), jnp.float32(labels.size))}
