"""Sensitivity: |dL/dw|."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def sensitivity(weight: Array, gradient: Array) -> Array:
    """Sensitivity pruning: the entries go to which the loss is least sensitive, by |dL/dw|.

    It asks how fast the loss changes around the weight and not how far away zero is: large weights
    may go, and weights that are zero already may stay. `taylor` weighs both.

    Source: the derivative in Mozer and Smolensky, "Skeletonization", NIPS 1988, section 2.

    Args:
      weight: `[*lead, N, K]`.
      gradient: of the mean loss, `[*lead, N, K]`.
    """
    return jnp.abs(gradient)
