"""The triangular factor that a column solver walks along, without any inverse of the whole.

GPTQ and SparseGPT take the upper U with inv(H) = U'U, H the damped second moment. With J the
reversal of order and J H J = L L' (Cholesky), H = R R' for the upper R = J L J, and U = inv(R),
exactly. U itself is never formed: its diagonal panels are the inverses of R's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array

# A moment that is singular in float32 needs some damping; each further attempt takes ten times
# more. At LARGEST a symmetric matrix has become diagonally dominant unless it holds NaN.
SMALLEST_DAMP = 1e-6
LARGEST_DAMP = 1e3


class Factor(NamedTuple):
    """R in panels of P columns, the last filled up with the unit matrix.

    Attributes:
      upper: R, float32 `[padded K, padded K]`, upper triangular, H = R R'.
      inverses: float32 `[panels, P, P]`, the inverses of R's diagonal panels: those of U.
      damp: float32 `[]`, the damping that was used, as a fraction of the mean of H's diagonal.
    """

    upper: Array
    inverses: Array
    damp: Array


def factor(moment: Array, damp: Array, panel: int) -> Factor:
    """Factors a second moment for a solver that goes through its columns in panels.

    Args:
      moment: H, float32 `[K, K]`, symmetric, positive semidefinite.
      damp: fraction of the mean of H's diagonal that is added to it, see `damped_cholesky`.
      panel: P, columns of a panel.
    """
    columns = moment.shape[0]
    lower, damp = damped_cholesky(moment[::-1, ::-1], damp)
    pad = -columns % panel
    upper = jnp.pad(lower[::-1, ::-1], ((0, pad), (0, pad)))
    upper = upper + jnp.diag(jnp.arange(columns + pad) >= columns)
    count = (columns + pad) // panel
    each = jnp.arange(count)
    diagonal = upper.reshape(count, panel, count, panel)[each, :, each]
    return Factor(upper, invert_upper(diagonal), damp)


def damped_cholesky(moment: Array, damp: Array) -> tuple[Array, Array]:
    """Cholesky factor of H + damp * mean(diag H) * I.

    Where that is not positive definite in float32 the damping grows tenfold (to 1e-6 at least)
    until it is.

    Args:
      moment: H, float32 `[K, K]`; only its lower triangle is read.
      damp: float32 `[]`.

    Returns:
      L, lower triangular, and the damping that was used; NaN where H is not finite.
    """
    mean = jnp.mean(jnp.diagonal(moment))
    unit = mean * jnp.eye(moment.shape[0], dtype=moment.dtype)
    damp = damp + jnp.zeros_like(mean)  # on a mesh it varies as the moment does

    def attempt(damp: Array) -> tuple[Array, Array]:
        return lax.linalg.cholesky(moment + damp * unit, symmetrize_input=False), damp

    def failed(state: tuple[Array, Array]) -> Array:
        lower, damp = state
        return ~jnp.isfinite(lower[-1, -1]) & (damp < LARGEST_DAMP)

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return attempt(jnp.maximum(state[1] * 10, SMALLEST_DAMP))

    return lax.while_loop(failed, again, attempt(damp))


def invert_upper(upper: Array) -> Array:
    """Inverses of upper triangular matrices `[..., P, P]` by doubling: 2 log2(P) products.

    With the inverses of the diagonal blocks of size s in X (zeros elsewhere), and B the blocks to
    their right within the blocks of size 2 s, X - X B X holds those of size 2 s.
    """
    size = upper.shape[-1]
    index = jnp.arange(size)
    diagonal = jnp.diagonal(upper, axis1=-2, axis2=-1)
    inverse = jnp.eye(size, dtype=upper.dtype) / diagonal[..., None]
    s = 1
    while s < size:
        block = index // s
        beside = (block[:, None] + 1 == block) & (block[:, None] // 2 == block // 2)
        inverse, s = inverse - inverse @ jnp.where(beside, upper, 0) @ inverse, 2 * s
    return inverse


def without_dead(moment: Array) -> tuple[Array, Array]:
    """A second moment in which inputs that were never active have the mean curvature.

    Args:
      moment: `[K, K]`; a dead input's row and column are zero.

    Returns:
      float32 `[K, K]`, and the dead inputs, bool `[K]`.
    """
    moment = moment.astype(jnp.float32)
    diagonal = jnp.diagonal(moment)
    dead = diagonal == 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(~dead), 1)
    unit = jnp.where(mean > 0, mean, 1)
    return moment + jnp.diag(jnp.where(dead, unit, 0)), dead
