"""Scales of a quantized model trained on calibration data, towards the dense model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.core.losses import in_float32, sum_over_chunks
from jaxcompress.core.model import Model
from jaxcompress.core.partition import merge, split
from jaxcompress.core.readers.lift import lift
from jaxcompress.progress import progress


def tune(
    model: Model,
    *,
    calibration: Any,
    dense: Model,
    steps: int = 100,
    learning_rate: float = 2e-3,
    batch: int = 4,
    next_token: float = 0.0,
    random_seed: int = 0,
) -> Model:
    """Train the scales of a quantized model, codes fixed, towards the dense model's predictions.

    Every scale is multiplied by e^t, and Adam finds t: the second stage of EfficientQAT (Chen et
    al., arXiv:2407.11062, section 3.3), with the divergence from the dense model as the loss
    instead of the text's own next tokens, or beside it. Size and format stay.

    Args:
      model: with quantized leaves that have scales.
      calibration: inputs `[samples, ...]`, or a tuple of such.
      dense: the model to come near to.
      steps: of Adam, the rate falling along a cosine.
      learning_rate: of t, at first.
      batch: samples of a step.
      next_token: share of the loss that is the text's own. It lowers the perplexity of such text,
        below the dense model's too, and leads away from what the dense model predicts.
      random_seed: of the order of the samples.

    Returns:
      The model with other scales.

    Raises:
      InputError: nothing to train, or numbers out of range.
    """
    if steps < 1 or batch < 1 or not learning_rate > 0:
        raise InputError("tune: steps and batch must be 1 or more, learning_rate above 0")
    if not 0 <= next_token <= 1:
        raise InputError(f"next_token {next_token}: must lie in [0, 1]")
    if next_token and not _gives_logits(model):
        raise InputError("next_token: of language models alone; leave it out")
    inputs = calibration if isinstance(calibration, tuple) else (calibration,)
    inputs = tuple(map(np.asarray, inputs))
    scales, rest = split(model.params, "scales")
    exponents = jax.tree.map(lambda scale: jnp.zeros(scale.shape, jnp.float32), scales)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    step = _step(_divergence(model, dense, next_token), optimizer)
    state = optimizer.init(exponents)
    order = _samples(len(inputs[0]), min(batch, len(inputs[0])), steps, random_seed)
    for chosen in progress(order, "tune", unit="step"):
        given = tuple(jnp.asarray(array[chosen]) for array in inputs)
        exponents, state = step(exponents, state, scales, rest, dense.params, given)
    return model.replace(params=merge(_scaled(scales, exponents), rest))


def _step(divergence: Callable[..., Array], optimizer: Any) -> Callable[..., tuple[Any, Any]]:
    @jax.jit
    def step(
        exponents: Any, state: Any, scales: Any, rest: Any, dense: Any, given: Any
    ) -> tuple[Any, Any]:
        def loss(exponents: Any) -> Array:
            return divergence(merge(_scaled(scales, exponents), rest), dense, given)

        updates, state = optimizer.update(jax.grad(loss)(exponents), state)
        return optax.apply_updates(exponents, updates), state

    return step


def _scaled(scales: Any, exponents: Any) -> Any:
    return jax.tree.map(lambda s, t: (s * jnp.exp(t)).astype(s.dtype), scales, exponents)


def _samples(count: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """The samples of every step: all of them before any comes again."""
    random = np.random.default_rng(seed)
    rounds = -(-steps * batch // count)
    drawn = np.concatenate([random.permutation(count) for _ in range(rounds)])
    return list(drawn[: steps * batch].reshape(steps, batch))


def _gives_logits(model: Model) -> bool:
    return getattr(model.config, "gives_logits", True)


def _divergence(model: Model, dense: Model, next_token: float) -> Callable[[Any, Any, Any], Array]:
    """`loss(params, dense params, inputs)`, the mean over positions.

    Of logits the Kullback-Leibler divergence from the dense model's, and the cross entropy of the
    next tokens as far as asked; of other outputs the squared distance relative to theirs. With
    blocks, logits of some positions exist at a time.
    """
    compare: Any = partial(_divergences, next_token) if _gives_logits(model) else _distances
    ours, theirs = model.blocks, dense.blocks
    if ours is None or theirs is None:
        apply, wanted = lift(model.apply), lift(dense.apply)
        return lambda params, frozen, given: _mean(
            compare(
                apply(params, *given),
                jax.lax.stop_gradient(wanted(frozen, *given)),
                *_following(given, next_token),
            )
        )
    hidden, head = lift(ours.hidden), lift(ours.head)
    wanted_hidden, wanted_head = lift(theirs.hidden), lift(theirs.head)

    def in_chunks(params: Any, frozen: Any, given: Any) -> Array:
        def of_chunk(
            params: Any, states: Array, wanted: Array, *following: Array
        ) -> tuple[Array, Array]:
            target = jax.lax.stop_gradient(wanted_head(frozen, wanted))
            return compare(head(params, states), target, *following)

        states = hidden(params, *given)
        wanted = jax.lax.stop_gradient(wanted_hidden(frozen, *given))
        if not hasattr(states, "ndim") or states.ndim != 3:
            return _mean(of_chunk(params, states, wanted, *_following(given, next_token)))
        trained, wide = in_float32(of_chunk, params)
        sequences = (states, wanted, *_following(given, next_token))
        return _mean(sum_over_chunks(trained, wide, sequences))

    return in_chunks


def _mean(sums: tuple[Array, Array]) -> Array:
    return sums[0] / sums[1]


def _following(given: Any, next_token: float) -> tuple[Array, ...]:
    """The next token of every position `[batch, seq]`, -1 behind the last; if it is asked for."""
    if not next_token:
        return ()
    return (jnp.pad(given[0][:, 1:], ((0, 0), (0, 1)), constant_values=-1),)


def _divergences(
    next_token: float, logits: Array, wanted: Array, following: Array | None = None
) -> tuple[Array, Array]:
    """Sum over positions, and their number."""
    logp, wanted_logp = _log_softmax(logits), _log_softmax(wanted)
    each = (jnp.exp(wanted_logp) * (wanted_logp - logp)).sum(-1)
    if following is not None:
        chosen = jnp.take_along_axis(logp, jnp.maximum(following, 0)[..., None], -1)[..., 0]
        text = jnp.where(following >= 0, -chosen, 0)
        each = (1 - next_token) * each + next_token * text
    return each.sum(), jnp.float32(each.size)


def _distances(outputs: Array, wanted: Array) -> tuple[Array, Array]:
    """Sum over positions, and their number."""
    outputs, wanted = outputs.astype(jnp.float32), wanted.astype(jnp.float32)
    each = jnp.square(outputs - wanted).sum(-1) / jnp.maximum(jnp.square(wanted).sum(-1), 1e-12)
    return each.sum(), jnp.float32(each.size)


def _log_softmax(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32))
