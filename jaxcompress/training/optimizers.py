"""Optimizers and learning rate schedules by name, all from optax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import path_str
from jaxcompress.core.selection import nearest

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "adafactor": optax.adafactor,
    "lion": optax.lion,
    "sgd": optax.sgd,
}
SCHEDULES = ("cosine", "linear", "constant")


def make_optimizer(
    name: str = "adamw",
    *,
    steps: int,
    learning_rate: float = 1e-3,
    schedule: str = "cosine",
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    **options: Any,
) -> optax.GradientTransformation:
    """An optimizer with its schedule.

    Args:
      name: one of `OPTIMIZERS`.
      steps: of the whole training; the schedule ends at 0 there ("cosine", "linear").
      learning_rate: the highest.
      schedule: after the warmup: "cosine", "linear" or "constant".
      warmup: steps over which the rate rises linearly from 0.
      weight_decay: per step and learning rate, of what `decays` says; before the momentum of
        "sgd", decoupled from the gradient in the others.
      clip: largest global norm of the gradient; None: any.
      **options: the optimizer's own, such as `b2=0.95`.

    Raises:
      InputError: an unknown name, or a number out of range.
    """
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer {name!r}: unknown; {nearest(name, OPTIMIZERS)}")
    rate = learning_rate_schedule(schedule, steps=steps, learning_rate=learning_rate, warmup=warmup)
    if weight_decay < 0 or (clip is not None and clip <= 0):
        raise InputError(f"weight_decay {weight_decay}, clip {clip}: must be positive")
    transforms = [] if clip is None else [optax.clip_by_global_norm(clip)]
    if name == "sgd":
        if weight_decay:
            transforms.append(optax.add_decayed_weights(weight_decay, decays))
    elif name == "adafactor":
        # Its own decay knows nothing of the learning rate.
        decay = (lambda step: weight_decay * rate(step)) if weight_decay else None
        options |= {"weight_decay_rate": decay, "weight_decay_mask": decays}
    else:
        options |= {"weight_decay": weight_decay, "mask": decays}
    try:
        transforms.append(OPTIMIZERS[name](learning_rate=rate, **options))
    except TypeError as error:
        raise InputError(f"optimizer {name}: {error}") from None
    return optax.chain(*transforms)


def learning_rate_schedule(
    name: str, *, steps: int, learning_rate: float, warmup: int = 0
) -> optax.Schedule:
    """The learning rate of each step, see `make_optimizer`."""
    if name not in SCHEDULES:
        raise InputError(f"schedule {name!r}: unknown; {nearest(name, SCHEDULES)}")
    if learning_rate <= 0 or not 0 <= warmup < max(steps, 1):
        raise InputError(
            f"learning_rate {learning_rate}, warmup {warmup} of {steps} steps: the rate must be "
            "above 0, and the warmup shorter than the training"
        )
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, steps - warmup),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, steps - warmup),
        "constant": lambda: optax.constant_schedule(learning_rate),
    }[name]()
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, warmup), after], [warmup]
    )


def decays(params: Any) -> Any:
    """A tree of booleans: True for arrays of two axes or more that are no `scale` or `bias`.

    Scales and biases stay out by name because norms of stacked blocks, and the scales of quantized
    arrays, have two axes too.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim > 1 and path_str(path[-1:]) not in ("scale", "bias"), params
    )
