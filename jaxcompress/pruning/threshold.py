"""Threshold: the weights below a multiple of their standard deviation go."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.sparsify import Store
from jaxcompress.core.arrays.sparsify import store as kept
from jaxcompress.core.errors import InputError


def threshold(
    weight: Array | CompressedArray, *, deviations: float = 1.0, store: Store = "zeros"
) -> Array | CompressedArray:
    """Threshold pruning: the weights below so many standard deviations of their layer go.

    How many those are is not asked but found: the command line, the report of a run and
    `sparsity` of `jaxcompress inspect` tell it, matrix by matrix.

    Source: Han et al., "Learning both Weights and Connections", arXiv:1506.02626, section 4: "a
    quality parameter multiplied by the standard deviation of a layer's weights".

    Args:
      weight: `[*lead, N, K]`.
      deviations: |w| < deviations * std goes, std over each `[N, K]` around its mean.
      store: "zeros" in a dense array, "masked" (to train on), or a sparse array: "sparse",
        "bitmask" or "csr".

    Returns:
      The pruned matrix in the dims `[N, K]`, dense or compressed as `store` says.

    Raises:
      InputError: `deviations` is negative.
    """
    if deviations < 0:
        raise InputError(f"deviations {deviations}: must be 0 or more")
    return kept(weight, _keep(dense(weight), deviations), store)


@jax.jit
def _keep(weight: Array, deviations: float) -> Array:
    weight = weight.astype(jnp.float32)
    return jnp.abs(weight) >= deviations * jnp.std(weight, axis=(-2, -1), keepdims=True)
