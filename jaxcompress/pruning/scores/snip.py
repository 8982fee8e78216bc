"""SNIP: connection sensitivity."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def snip(weight: Array, gradient: Array) -> Array:
    """SNIP: the connections go to whose strength the loss is least sensitive, over all layers.

    The derivative of the loss by a factor c in front of each weight, at c = 1, is w dL/dw; the
    paper divides by the sum over all weights, which orders nothing. Meant for networks before they
    are trained.

    Source: Lee et al., "SNIP: Single-shot Network Pruning", arXiv:1810.02340, section 4.

    Args:
      weight: `[*lead, N, K]`.
      gradient: of the mean loss, `[*lead, N, K]`.
    """
    return jnp.abs(weight * gradient)
