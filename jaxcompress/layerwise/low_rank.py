"""Low rank: the nearest matrix of a rank in a norm that the data give, and what it can mend.

The output error |X (W - W')'| is |(W - W') R| for any R with R R' = X'X: a triangular root
(Cholesky), or the eigenvectors times the roots of the eigenvalues. All of them have one optimum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.errors import InputError
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.factor import damped_cholesky, without_dead

DAMP = 1e-4  # ridge of a root, as a share of the mean diagonal

# `encode(matrix [*lead, N, K])`: a quantized array of the dims `[N, K]`.
Encode = Callable[[Array], CompressedArray]


def nearest_of_rank(matrix: Array, root: Array | None, rank: int) -> LowRank:
    """The nearest matrix of a rank in the norm |(W - W') root|, the values' roots in both factors.

    Args:
      matrix: W, float `[*lead, N, K]`.
      root: lower triangular `[*lead, K, K]`, or the diagonal of a diagonal one `[*lead, K]`; None:
        the identity.
      rank: 1 to min(N, K).
    """
    a, b = over_lead(_truncation(rank), matrix, root)
    return LowRank(a, b, STORED, (str(matrix.dtype),))


def compensated(
    weight: Array | CompressedArray,
    quantized: CompressedArray,
    rank: int,
    root: Array | None = None,
) -> Sum:
    """Any quantized matrix plus the low rank one that best mends its error.

    Args:
      weight: what was quantized, `[*lead, N, K]`.
      quantized: in the dims `[N, K]`, however it was made.
      rank: of the low rank part.
      root: of the norm in which the error is least, see `nearest_of_rank`.

    Returns:
      The sum of a `LowRank` in the dtype of `weight` and `quantized`.

    Raises:
      InputError: a rank out of range.
    """
    matrix = dense(weight)
    check_rank(rank, matrix)
    error = matrix.astype(jnp.float32) - quantized.matrix().astype(jnp.float32)
    return Sum.of(_in_dtype(nearest_of_rank(error, root, rank), matrix.dtype), quantized)


def split(
    weight: Array | CompressedArray,
    encode: Encode,
    rank: int,
    root: Array | None = None,
    *,
    iterations: int = 1,
    low_rank_first: bool = False,
) -> Sum:
    """A low rank part plus a rest in any format, each made for the other.

    Args:
      weight: `[*lead, N, K]`.
      encode: makes the rest: `encode(matrix) -> compressed array` of the dims `[N, K]`.
      rank: of the low rank part.
      root: of the norm in which that is nearest, see `nearest_of_rank`.
      iterations: how often the rest is encoded, each time but the first given the low rank part.
      low_rank_first: the low rank part is that of the weights, and the rest what it leaves;
        otherwise the rest begins, and the low rank part is that of its error.

    Raises:
      InputError: a rank or iterations out of range.
    """
    matrix = dense(weight)
    check_rank(rank, matrix)
    if iterations < 1:
        raise InputError(f"iterations {iterations}: must be 1 or more")
    wide, dtype = matrix.astype(jnp.float32), matrix.dtype
    if not low_rank_first:
        rest = encode(matrix)
        for _ in range(iterations - 1):
            low = nearest_of_rank(wide - rest.matrix(), root, rank)
            rest = encode((wide - low.matrix()).astype(dtype))
        return compensated(matrix, rest, rank, root)
    low = _in_dtype(nearest_of_rank(wide, root, rank), dtype)
    rest = encode((wide - low.matrix()).astype(dtype))
    for _ in range(iterations - 1):
        low = _in_dtype(nearest_of_rank(wide - rest.matrix(), root, rank), dtype)
        rest = encode((wide - low.matrix()).astype(dtype))
    return Sum.of(low, rest)


def check_rank(rank: int, matrix: Array) -> None:
    """Raise `InputError` unless a matrix `[*lead, N, K]` can have this rank."""
    most = min(matrix.shape[-2:])
    if not 1 <= rank <= most:
        raise InputError(f"rank {rank}: 1 to {most} for a matrix of {matrix.shape[-2:]}")


def _in_dtype(low: LowRank, dtype: Any) -> LowRank:
    return low.replace(a=low.a.astype(dtype), b=low.b.astype(dtype), casts=(str(dtype),))


@functools.cache
def _truncation(rank: int) -> Callable[..., tuple[Array, Array]]:
    """The same function for the same rank, so that it is compiled once."""

    def factors(matrix: Array, root: Array | None) -> tuple[Array, Array]:
        # With W R = U S V', the optimum is W' = U_r S_r V_r' R^-1.
        u, s, vt = jnp.linalg.svd(whitened(matrix, root), full_matrices=False)
        half = jnp.sqrt(s[:rank])
        a, b = u[:, :rank] * half, half[:, None] * vt[:rank]
        if root is not None and root.ndim == 1:
            b = b / root
        elif root is not None:
            b = solve_triangular(root, b.T, trans=1, lower=True).T
        return a.astype(matrix.dtype), b.astype(matrix.dtype)

    return factors


def whitened(matrix: Array, root: Array | None) -> Array:
    """`W root` in float32; see `nearest_of_rank`."""
    wide = matrix.astype(jnp.float32)
    if root is None:
        return wide
    if root.ndim == 1:
        return wide * root
    return jnp.matmul(wide, root, precision=jax.lax.Precision.HIGHEST)


def cholesky_root(second_moment: Array, *, damp: float = DAMP) -> Array:
    """L with L L' = X'X + damp * mean(diag X'X) * I, lower triangular `[*lead, K, K]`."""
    return over_lead(_cholesky(damp), second_moment)


@functools.cache
def _cholesky(damp: float) -> Callable[[Array], Array]:
    def root(second_moment: Array) -> Array:
        moment, _ = without_dead(second_moment)
        return damped_cholesky(moment, jnp.float32(damp))[0]

    return root
