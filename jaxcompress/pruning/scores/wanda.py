"""Wanda: weights and activations."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def wanda(weight: Array, sum_squares: Array) -> Array:
    """Wanda: the smallest |w| times the norm of the input that it multiplies go, row by row.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, equation 1.

    Args:
      weight: `[*lead, N, K]`.
      sum_squares: of each input over the tokens, `[*lead, K]`.
    """
    return jnp.abs(weight) * jnp.sqrt(sum_squares)[..., None, :]
