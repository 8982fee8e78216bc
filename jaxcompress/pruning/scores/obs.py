"""OBS: the error that is left when the other weights make up for a removed one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxcompress.core.arrays.base import Array
from jaxcompress.layerwise.factor import damped_cholesky, without_dead


def obs(weight: Array, second_moment: Array, *, damp: float = 0.01) -> Array:
    """Optimal Brain Surgeon: the least error in the output once the row's others make up for it.

    w^2 / [H^-1]_jj with H = X'X: never more than `reconstruction`'s w^2 H_jj, and much less for an
    input that the others can tell. Only the choice is made here; `sparsegpt` and `refit` also move
    the weights.

    Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain
    Surgeon", NIPS 1992, equation 5, of the layer's own error: Frantar and Alistarh,
    arXiv:2208.11580, equation 3.

    Args:
      weight: `[*lead, N, K]`.
      second_moment: X'X `[*lead, K, K]` of the inputs.
      damp: added to X'X, as a share of its mean diagonal.
    """

    def inverse_diagonal(moment: Array) -> Array:
        alive, _ = without_dead(moment)
        lower, _ = damped_cholesky(alive, jnp.float32(damp))
        inverse = solve_triangular(lower, jnp.eye(len(lower), dtype=lower.dtype), lower=True)
        return jnp.square(inverse).sum(0)

    columns = second_moment.shape[-1]
    lead = second_moment.shape[:-2]
    with jax.default_matmul_precision("highest"):
        diagonal = jax.vmap(inverse_diagonal)(second_moment.reshape(-1, columns, columns))
    active = jnp.diagonal(second_moment, axis1=-2, axis2=-1) > 0
    error = jnp.square(weight) / diagonal.reshape(*lead, 1, columns)
    return jnp.where(active[..., None, :], error, 0)
