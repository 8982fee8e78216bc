"""Random: what any other criterion must beat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array


def random(weight: Array, *, random_seed: int = 0) -> Array:
    """Random pruning: any entries go, evenly drawn; the baseline of every criterion.

    The draw is a function of the seed and of the matrix itself, so that matrices of one shape do
    not lose the same entries, and stacked layers lose what they would lose one by one.

    Args:
      weight: `[*lead, N, K]`.
      random_seed: of the draw.
    """
    *lead, n, k = weight.shape

    def draw(matrix: Array) -> Array:
        digest = lax.bitcast_convert_type(matrix, jnp.uint32).sum(dtype=jnp.uint32)
        key = jax.random.fold_in(jax.random.key(random_seed), digest)
        return jax.random.uniform(key, (n, k))

    return jax.vmap(draw)(weight.reshape(-1, n, k)).reshape(*lead, n, k)
