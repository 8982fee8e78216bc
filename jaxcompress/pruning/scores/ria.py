"""RIA: relative importance and activations."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array


def ria(weight: Array, sum_squares: Array, *, activation_power: float = 0.5) -> Array:
    """RIA: the smallest share of its row and its column, times the norm of the input, go.

    No row and no column can lose all its weights only because they are small.

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024, section 3 (RIA; its permutation of channels for n:m is left out).

    Args:
      weight: `[*lead, N, K]`.
      sum_squares: of each input over the tokens, `[*lead, K]`.
      activation_power: a of the paper: how much the norm of the input counts.
    """
    size = jnp.abs(weight)
    rows, columns = size.sum(-1, keepdims=True), size.sum(-2, keepdims=True)
    relative = size / jnp.where(columns > 0, columns, 1) + size / jnp.where(rows > 0, rows, 1)
    return relative * jnp.power(jnp.sqrt(sum_squares), activation_power)[..., None, :]
