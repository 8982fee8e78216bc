"""RigL: sparse from the start, by links that go where they are small and come where the gradient
is large."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.pruning.patterns import keep_highest
from jaxcompress.pruning.schedules.masked import Moment, every, masked
from jaxcompress.pruning.schedules.sparse_evolution import LARGEST, check_evolution, regrown
from jaxcompress.pruning.schedules.targets import Matrices, Targets


def rigl(
    inner: optax.GradientTransformation,
    where: Targets,
    *,
    fraction: float = 0.3,
    interval: int,
    end: int,
) -> optax.GradientTransformation:
    """The optimizer; now and then a step moves links instead of weights.

    Of every matrix the k smallest weights go, and the k removed ones with the largest gradients
    come, from 0; k is fraction / 2 (1 + cos(pi step / end)) of those that are there.

    Source: Evci et al., "Rigging the Lottery", arXiv:1911.11134, algorithm 1.

    Args:
      inner: the optimizer; a step that moves links leaves its state alone.
      where: what is sparse; begin with `sparse_start`.
      fraction: alpha.
      interval: delta T.
      end: T_end, the step (counted from 0) from which on links stay.

    Raises:
      InputError: a number out of range.
    """
    check_evolution(fraction, interval)

    def rule(now: Moment) -> Matrices:
        part = fraction / 2 * (1 + jnp.cos(jnp.pi * now.step / end))
        return {
            path: _moved(mask, now.weights[path], now.gradients[path], part)
            for path, mask in now.masks.items()
        }

    return masked(inner, where, rule, every(interval, end - 1, interval), instead=True)


def _moved(mask: Array, weight: Array, gradient: Array, part: Array) -> Array:
    """The mask with a part of its links elsewhere."""
    shape, flat = mask.shape, (*mask.shape[:-2], -1)
    mask, weight, gradient = mask.reshape(flat), weight.reshape(flat), gradient.reshape(flat)
    count = jnp.floor(part * mask.sum(-1)).astype(jnp.int32)
    stays = mask & keep_highest(jnp.where(mask, jnp.abs(weight), LARGEST), count)
    return regrown(mask, stays, jnp.abs(gradient)).reshape(shape)
