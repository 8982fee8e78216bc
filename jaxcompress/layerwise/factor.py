"""The triangular factor that a column solver walks along, without any inverse of the whole.

GPTQ and SparseGPT take the upper U with inv(H) = U'U, H the damped second moment. With J the
reversal of order and J H J = L L' (Cholesky), H = R R' for the upper R = J L J, and U = inv(R),
exactly. U itself is never formed: its diagonal panels are the inverses of R's.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
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

    def failed(state: tuple[Array, Array, Array]) -> Array:
        lower, damp, attempts = state
        return (attempts == 0) | (~jnp.isfinite(lower[-1, -1]) & (damp < LARGEST_DAMP))

    def attempt(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, damp, attempts = state
        damp = jnp.where(attempts == 0, damp, jnp.maximum(damp * 10, SMALLEST_DAMP))
        return cholesky(moment + damp * unit), damp, attempts + 1

    zero = jnp.zeros_like(mean)  # on a mesh it varies as the moment does
    lower, damp, _ = lax.while_loop(failed, attempt, (moment, damp + zero, zero))
    return lower, damp


def cholesky(matrix: Array) -> Array:
    """Cholesky factor `[K, K]` of a positive definite matrix; NaN in its last row of others.

    The compiler for TPUs makes of its own factorization a program that grows with K.

    Args:
      matrix: float32 `[K, K]`; only its lower triangle is read.
    """
    return lax.platform_dependent(
        matrix,
        tpu=cholesky_by_panels,
        default=partial(lax.linalg.cholesky, symmetrize_input=False),
    )


def cholesky_by_panels(matrix: Array, panel: int = 256) -> Array:
    """`cholesky` as one loop over panels of columns, mostly products.

    Panel j is what L[:, :j] L[j, :j]' leaves of the matrix, times the inverse of the transposed
    factor of its topmost square.

    Args:
      matrix: float32 `[K, K]`; only its lower triangle is read.
      panel: columns of a panel.
    """
    size = matrix.shape[0]
    pad = -size % panel
    matrix = jnp.pad(matrix, ((0, pad), (0, pad))) + jnp.diag(jnp.arange(size + pad) >= size)
    row = jnp.arange(size + pad)[:, None]

    def columns(x: Array, j: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, j * panel, panel, 1)

    def square(x: Array, j: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, j * panel, panel)

    def step(j: Array, lower: Array) -> Array:
        def less(i: Array, left: Array) -> Array:
            before = columns(lower, i)
            return left - before @ square(before, j).T

        left = lax.fori_loop(0, j, less, columns(matrix, j))
        top = lax.linalg.cholesky(square(left, j), symmetrize_input=False)
        found = jnp.where(row >= j * panel, left @ invert_upper(top.T), 0)
        found = lax.dynamic_update_slice_in_dim(found, top, j * panel, 0)
        return lax.dynamic_update_slice_in_dim(lower, found, j * panel, 1)

    with jax.default_matmul_precision("highest"):
        lower = lax.fori_loop(0, (size + pad) // panel, step, jnp.zeros_like(matrix))
    return lower[:size, :size]


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
