"""Reconstruction: the error that removing a weight makes in the output."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def reconstruction(weight: Array, sum_squares: Array) -> Array:
    """Reconstruction error: the weights go that leave the least squared error in the output.

    w^2 sum x^2: the error |X (w - w')|^2 if this weight alone goes and nothing makes up for it.
    The square of Wanda's score, so of its order; sums of blocks are errors. `obs` lets the other
    weights make up for it.

    Source: LeCun et al., "Optimal Brain Damage", NIPS 1989, section 2, for the layer's own error.

    Args:
      weight: `[*lead, N, K]`.
      sum_squares: of each input over the tokens, `[*lead, K]`.
    """
    return jnp.square(weight) * sum_squares[..., None, :]
