"""The objective of distillation: a student's loss against its teacher and against the labels.

A batch has, with B rows, one of:

- `ids` int `[B, seq]`, for language models. The hard loss is that of the next token; the last
  position, which has none, counts in neither.
- `images` float `[B, height, width, channels]`, for classifiers.
- `inputs`, what `apply` takes after the parameters (an array or a tuple of arrays), for others.

and besides

- `labels` int, with images or inputs: of the shape of the outputs without their last axis.
- `weights` float, where some do not count (padding): of the shape of `ids`, how much each counts
  as the token that is predicted; otherwise of the shape of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxcompress.core.errors import InputError
from jaxcompress.core.losses import CHUNK, in_float32, sum_over_chunks
from jaxcompress.core.model import Model
from jaxcompress.core.readers.lift import lift
from jaxcompress.core.selection import nearest
from jaxcompress.distillation.losses import LOSSES
from jaxcompress.distillation.losses.cross_entropy import cross_entropy
from jaxcompress.distillation.vocabulary import aligned_vocabulary, common_size
from jaxcompress.training.batch_norm import training_apply
from jaxcompress.training.objective import Objective, Sums

States = tuple[Array, ...]  # what a model knows of each position, each [batch, positions, ...]
Logits = Callable[[Any, States], Array]  # logits of some positions from parameters and states


def distill(
    student: Model,
    teacher: Model,
    *,
    loss: str = "kl",
    temperature: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    chunk: int = CHUNK,
) -> Objective:
    """alpha * soft + beta * hard: the loss against the teacher, and against the labels.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
    section 2.

    Where a model has blocks, its head runs over `chunk` positions at a time, forward and backward;
    where it has none, its logits exist whole, but in float32 those of a chunk only. A head must
    treat every position by itself.

    Batch norm of a CIFAR ResNet as the student: see `training.batch_norm`.

    Args:
      student: its function; the parameters come with every call.
      teacher: its parameters are the `constants` of the objective. They may be compressed, and
        lie elsewhere than the student's; no gradient goes through them.
      loss: the soft loss, a name of `LOSSES`.
      temperature: of "kl"; 2 unless given.
      alpha: weight of the soft loss, 0 to 1; "kl": 0.5 unless given, "mse": 1.
      beta: weight of the hard loss; 1 - alpha unless given.
      chunk: positions of which logits exist at the same time.

    Returns:
      An objective with the metrics `loss`, `soft` (times temperature^2), and `hard` where there is
      something to compare with; all means over rows, or tokens.

    Raises:
      InputError: an unknown loss, a number out of its range, or vocabularies that differ.
    """
    if loss not in LOSSES:
        raise InputError(f"distill: loss {loss!r} is unknown; {nearest(loss, LOSSES)}")
    alpha, beta = _weights(loss, alpha, beta)
    options = _options(loss, temperature)
    if chunk < 1:
        raise InputError(f"distill: chunk {chunk} must be 1 position or more")
    size = aligned_vocabulary(student, teacher)
    losses = partial(_losses, partial(LOSSES[loss].function, **options), alpha, beta)
    ours, theirs = _walk(student, training_apply(student)), _walk(teacher, teacher.apply)

    def function(params: Any, batch: dict[str, Any], key: Array, constants: Any) -> Sums:
        inputs, labels, weights = _read(batch, beta)
        frozen = jax.lax.stop_gradient(constants)
        states, logits_of = ours(params, inputs)
        teacher_states, teacher_logits_of = theirs(frozen, inputs)
        labels, weights = _rows(states, teacher_states, labels, weights)
        sequences, tree = jax.tree.flatten((states, teacher_states, labels, weights))

        def sums(params: Any, *pieces: Array) -> Sums:
            states, teacher_states, labels, weights = jax.tree.unflatten(tree, pieces)
            logits = logits_of(params, states)
            teacher_logits = jax.lax.stop_gradient(teacher_logits_of(frozen, teacher_states))
            pair = _without_padding(logits, teacher_logits, size, "ids" in batch)
            return _weighted(losses(*pair, labels), weights)

        return sum_over_chunks(*in_float32(sums, params), sequences, chunk=chunk)

    return Objective(function, teacher.params)


def _weights(loss: str, alpha: float | None, beta: float | None) -> tuple[float, float]:
    alpha = LOSSES[loss].alpha if alpha is None else alpha
    if not 0 <= alpha <= 1:
        raise InputError(f"distill: alpha {alpha:g} must be between 0 and 1")
    beta = 1 - alpha if beta is None else beta
    if not 0 <= beta < math.inf:
        raise InputError(f"distill: beta {beta:g} must be 0 or more")
    if not alpha and not beta:
        raise InputError("distill: alpha and beta are both 0, so there is no loss; raise one")
    return alpha, beta


def _options(loss: str, temperature: float | None) -> dict[str, float]:
    if temperature is None:
        return {}
    if "temperature" not in LOSSES[loss].options:
        raise InputError(f"distill: loss {loss!r} has no temperature; leave it out")
    if not 0 < temperature < math.inf:
        raise InputError(f"distill: temperature {temperature:g} must be above 0")
    return {"temperature": temperature}


def _losses(
    compare: Callable[[Array, Array], Array],
    alpha: float,
    beta: float,
    logits: Array,
    teacher_logits: Array,
    labels: Array | None,
) -> dict[str, Array]:
    """The losses of each position."""
    found = {"soft": compare(logits, teacher_logits)}
    if labels is not None:
        found["hard"] = cross_entropy(logits, labels)
    # What has no weight is told, but not led back through.
    terms = [w * found[name] for name, w in (("soft", alpha), ("hard", beta)) if w]
    return {**found, "loss": sum(terms[1:], terms[0])}


def _read(
    batch: dict[str, Any], beta: float
) -> tuple[tuple[Array, ...], Array | None, Array | None]:
    """What the models are given, labels, and how much each label counts."""
    weights = batch.get("weights")
    if "ids" in batch:
        ids = batch["ids"]
        weights = jnp.ones(ids.shape, jnp.float32) if weights is None else weights
        # All positions run, those without a next token too: a length that devices divide well.
        return (ids,), jnp.roll(ids, -1, 1), jnp.roll(weights, -1, 1).at[:, -1].set(0)
    name = "images" if "images" in batch else "inputs"
    if name not in batch:
        raise InputError(f"distill: a batch of {sorted(batch)} has no ids, images or inputs")
    labels = batch.get("labels")
    if labels is None and beta:
        raise InputError(
            f"distill: beta {beta:g} is the weight of the labels and the batch has none; add "
            "labels, or pass alpha=1"
        )
    inputs = batch[name]
    return inputs if isinstance(inputs, tuple) else (inputs,), labels, weights


def _walk(model: Model, apply: Callable[..., Any]) -> Callable[[Any, Any], tuple[States, Logits]]:
    """`walk(params, inputs)`: what is known of each position, and the way from it to logits."""
    whole = lift(apply)

    def without_blocks(params: Any, inputs: tuple[Array, ...]) -> tuple[States, Logits]:
        return _positions(whole(params, *inputs)), lambda params, states: states[0]

    if model.blocks is None:
        return without_blocks
    hidden, head = lift(model.blocks.hidden), lift(model.blocks.head)

    def by_blocks(params: Any, inputs: tuple[Array, ...]) -> tuple[States, Logits]:
        states, tree = jax.tree.flatten(hidden(params, *inputs))

        def logits(params: Any, states: States) -> Array:
            return head(params, jax.tree.unflatten(tree, states))

        shape = jax.eval_shape(logits, params, states).shape
        # Otherwise the head mixes positions (pools them), or needs more than their states.
        if len(shape) == 3 and all(x.shape[:2] == shape[:2] for x in states):
            return tuple(states), logits
        return without_blocks(params, inputs)

    return by_blocks


def _positions(outputs: Array) -> States:
    """Outputs `[batch, ..., classes]` as `[batch, positions, classes]`."""
    if not hasattr(outputs, "ndim") or outputs.ndim < 2:
        raise InputError("distill: the outputs of a model must be one array [batch, ..., classes]")
    return (outputs.reshape(outputs.shape[0], -1, outputs.shape[-1]),)


def _rows(
    states: States, teacher_states: States, labels: Array | None, weights: Array | None
) -> tuple[Array | None, Array]:
    """Labels and weights `[batch, positions]`."""
    shape, teacher_shape = states[0].shape[:2], teacher_states[0].shape[:2]
    if shape != teacher_shape:
        raise InputError(
            f"distill: the student's outputs have {shape[1]} positions a row and the teacher's "
            f"{teacher_shape[1]}"
        )
    for name, given in {"labels": labels, "weights": weights}.items():
        if given is not None and given.size != math.prod(shape):
            raise InputError(f"distill: {name} {given.shape} for outputs at {shape} positions")
    weights = jnp.ones(shape, jnp.float32) if weights is None else weights.reshape(shape)
    return None if labels is None else labels.reshape(shape), weights


def _weighted(losses: dict[str, Array], weights: Array) -> Sums:
    """Sums over the positions that count; at the others a loss may be NaN."""
    count = weights.sum(dtype=jnp.float32)
    return {
        name: (jnp.where(weights > 0, weights * loss, 0).sum(), count)
        for name, loss in losses.items()
    }


def _without_padding(
    logits: Array, teacher_logits: Array, size: int | None, is_text: bool
) -> tuple[Array, Array]:
    """Both over the classes that they have in common."""
    sizes = logits.shape[-1], teacher_logits.shape[-1]
    if sizes[0] == sizes[1]:
        return logits, teacher_logits
    if not is_text:
        raise InputError(f"distill: the student has {sizes[0]} outputs and the teacher {sizes[1]}")
    size = common_size(*sizes) if size is None else size
    return logits[..., :size], teacher_logits[..., :size]
