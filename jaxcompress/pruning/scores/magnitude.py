"""Magnitude: |w|."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def magnitude(weight: Array) -> Array:
    """Magnitude pruning: the entries with the smallest absolute value go.

    L1 and L2 order single weights alike.

    Source: Han et al., "Learning both Weights and Connections", arXiv:1506.02626, section 3; the
    n:m pattern: Mishra et al., arXiv:2104.08378, section 2.

    Args:
      weight: `[*lead, N, K]`.
    """
    return jnp.abs(weight)
