"""LAMP: layer-adaptive magnitude."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def lamp(weight: Array) -> Array:
    """LAMP: w^2 over the sum of all w^2 of its layer that are not smaller, over all layers.

    Within a layer the order is that of the magnitude; between layers the score decides how much
    each loses. The largest weight of every layer has the score 1, so no layer goes whole.

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning",
    arXiv:2010.07611, section 2.

    Args:
      weight: `[*lead, N, K]`.
    """
    *lead, n, k = weight.shape

    def of_layer(squares: Array) -> Array:
        order = jnp.argsort(squares, stable=True)
        ascending = squares[order]
        not_smaller = jnp.cumsum(ascending[::-1])[::-1]
        scores = jnp.where(ascending > 0, ascending / not_smaller, 0)
        return jnp.zeros_like(squares).at[order].set(scores)

    squares = jnp.square(weight).reshape(-1, n * k)
    return jax.vmap(of_layer)(squares).reshape(*lead, n, k)
