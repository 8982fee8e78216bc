"""Taylor: |w dL/dw|."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def taylor(weight: Array, gradient: Array) -> Array:
    """Taylor pruning: the entries go whose removal changes the loss least, to first order.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", arXiv:1611.06440, equation 7; of single weights: arXiv:1906.10771, equation 8,
    whose (w dL/dw)^2 is of the same order.

    Args:
      weight: `[*lead, N, K]`.
      gradient: of the mean loss, `[*lead, N, K]`.
    """
    return jnp.abs(weight * gradient)
