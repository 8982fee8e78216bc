"""Outliers of activations moved into the weights, so that both can be rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.quantization.folds import Consumer, folded

SMALLEST = 1e-5  # of a maximum


def smoothquant(model: Model, *, calibration: Any, alpha: float = 0.5) -> Model:
    """Divide strong input channels by s and multiply the weights by it; fold it in.

    s = max|x|^alpha / max|w|^(1-alpha), per input channel, w the weights of all matrices that share
    the input. The function stays the same, and the model dense: what makes the input takes up 1/s,
    wherever the function allows that; the notes of the result name the matrices where not.

    Source: Xiao et al., "SmoothQuant", arXiv:2211.10438, equation 4.

    Args:
      model: any model.
      calibration: inputs `[samples, ...]`.
      alpha: how much of the difficulty goes to the weights, in [0, 1].

    Returns:
      The dense model of the same function, whose activations are easier to round.

    Raises:
      InputError: alpha outside of [0, 1], or calibration data of unequal lengths.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha}: must lie in [0, 1]")
    choose = partial(smooth_scale, alpha=alpha)
    return folded(model, calibration, ("max_abs",), choose, what="smoothquant")


def smooth_scale(consumers: Sequence[Consumer], size: int, *, alpha: float) -> Array:
    """s `[size]` for the matrices that share it.

    Args:
      consumers: with `max_abs`.
      size: entries of s.
      alpha: see `smoothquant`.
    """
    return _scale(list(consumers), size, alpha)


@partial(jax.jit, static_argnums=1)
def _scale(consumers: list[Consumer], size: int, alpha: float) -> Array:
    inputs = weights = jnp.zeros(size)
    for matrix, statistics, columns in consumers:
        inputs = _largest(inputs, statistics["max_abs"], columns)
        largest = jnp.abs(matrix.astype(jnp.float32)).max(-2)
        weights = _largest(weights, largest, columns)
    inputs, weights = jnp.maximum(inputs, SMALLEST), jnp.maximum(weights, SMALLEST)
    return jnp.maximum(inputs**alpha / weights ** (1 - alpha), SMALLEST)


def _largest(known: Array, values: Array, columns: Array) -> Array:
    """The largest of `known` `[size]` and of the values `[*lead, K]` of each entry."""
    values, columns = jnp.broadcast_arrays(values, columns)
    into = jnp.where(columns < 0, len(known), columns)
    return known.at[into].max(values, mode="drop")
