"""SR-STE: n:m from scratch, by a straight-through gradient and a pull on what is masked."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.pruning.patterns import keep_n_of_m, parse_n_m
from jaxcompress.pruning.schedules.gates import seen_through
from jaxcompress.pruning.schedules.targets import (
    Targets,
    at_targets,
    matrices_of,
    with_matrices,
)
from jaxcompress.training.transform import Transform


class RefinedState(NamedTuple):
    """State of the optimizer underneath; the masks follow from the weights."""

    inner: Any


def sr_ste(where: Targets, *, pattern: str = "2:4", strength: float = 2e-4) -> Transform:
    """Forward with the n largest of every m; the gradient goes to all, and masked ones decay.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch", arXiv:2102.04010, equation 9: w <- w - rate (g(masked w) + strength (1 - mask) w).

    Args:
      where: what becomes n:m. Which entries are 0 is decided anew, whatever was 0 before.
      pattern: n:m.
      strength: lambda_W.

    Raises:
      InputError: another pattern, or a negative strength.
    """
    parsed = parse_n_m(pattern)
    if parsed is None or strength < 0:
        raise InputError(f"pattern {pattern!r}, strength {strength}: use n:m, and 0 or more")
    n, m = parsed

    def mask(weight: Array) -> Array:
        return keep_n_of_m(jnp.abs(weight), n, m)

    def open_leaf(weight: Array, key: Array) -> Array:
        sparse = jnp.where(mask(weight), weight, 0)
        return weight + jax.lax.stop_gradient(sparse - weight)

    def decayed(inner: optax.GradientTransformation) -> optax.GradientTransformation:
        def update(gradients: Any, state: RefinedState, params: Any = None) -> tuple[Any, Any]:
            weights = matrices_of(params, where)
            pulled = {
                path: gradient + jnp.where(mask(weights[path]), 0, strength * weights[path])
                for path, gradient in matrices_of(gradients, where).items()
            }
            gradients = with_matrices(gradients, where, pulled)
            updates, moments = inner.update(gradients, state.inner, params)
            return updates, RefinedState(moments)

        return optax.GradientTransformation(lambda p: RefinedState(inner.init(p)), update)

    return Transform(
        optimizer=decayed,
        objective=seen_through(where, open_leaf),
        end=lambda params: at_targets(params, where, lambda w: jnp.where(mask(w), w, 0)),
        paths=tuple(where),
    )
