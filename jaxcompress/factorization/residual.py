"""Low rank plus a quantized rest: each keeps what the other cannot."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from jaxcompress.core.arrays.affine import check_bits, encode_affine, groups_of, minmax_range
from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.core.errors import InputError
from jaxcompress.factorization.svd import nearest
from jaxcompress.factorization.whitened_svd import DAMP, cholesky_root

# `encode(matrix [*lead, N, K])`: a quantized array of the dims `[N, K]`.
Encode = Callable[[Array], CompressedArray]


def loftq(
    weight: Array | CompressedArray,
    *,
    rank: int = 16,
    bits: int = 4,
    group_size: int = 128,
    iterations: int = 1,
) -> Sum:
    """LoftQ: an integer matrix plus a low rank one, made for each other in turns.

    Q = round(W - A B) and A B = SVD_r(W - Q), from A B = 0 on. Source: Li et al., "LoftQ",
    arXiv:2310.08659, algorithm 1.

    Args:
      weight: `[*lead, N, K]`.
      rank: of the low rank part.
      bits: of an integer, 1 to 8.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      iterations: turns. The error need not fall with each; one is what is mostly used.

    Returns:
      The sum of a `LowRank` and an `Affine`.

    Raises:
      InputError: bits, rank or iterations out of range, or a group size that does not divide K.
    """
    if iterations < 1:
        raise InputError(f"iterations {iterations}: must be 1 or more")
    return split(weight, integers(bits, group_size), rank, iterations=iterations)


def qera(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    rank: int = 16,
    bits: int = 4,
    group_size: int = 128,
    damp: float = DAMP,
) -> Sum:
    """QERA: an integer matrix plus the low rank one that best mends its outputs.

    Q = round(W), and A B the best of its rank for W - Q in the outputs on calibration data. Source:
    Zhang et al., "QERA", arXiv:2410.06040, theorem 1 (with the Cholesky factor as the root of X'X).

    Args:
      weight: `[*lead, N, K]`.
      second_moment: X'X, the sum of x x' over the inputs, `[*lead, K, K]`.
      rank: of the low rank part.
      bits: of an integer, 1 to 8.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      damp: added to the diagonal of X'X, as a fraction of its mean.

    Returns:
      The sum of a `LowRank` and an `Affine`.

    Raises:
      InputError: bits or rank out of range, or a group size that does not divide K.
    """
    root = cholesky_root(second_moment, damp=damp)
    return split(weight, integers(bits, group_size), rank, root)


def split(
    weight: Array | CompressedArray,
    encode: Encode,
    rank: int,
    root: Array | None = None,
    *,
    iterations: int = 1,
) -> Sum:
    """A low rank part plus a rest in any format.

    Args:
      weight: `[*lead, N, K]`.
      encode: makes the rest: `encode(matrix) -> compressed array` of the dims `[N, K]`.
      rank: of the low rank part.
      root: of the norm in which that is nearest, see `svd.factorized`.
      iterations: how often the rest is encoded anew, given the low rank part.

    Raises:
      InputError: a rank out of range.
    """
    matrix = dense(weight)
    most = min(matrix.shape[-2:])
    if not 1 <= rank <= most:
        raise InputError(f"rank {rank}: 1 to {most} for a matrix of {matrix.shape[-2:]}")
    wide = matrix.astype(jnp.float32)
    rest = encode(matrix)
    low = nearest(wide - rest.matrix(), root, rank)
    for _ in range(iterations - 1):
        rest = encode((wide - low.matrix()).astype(matrix.dtype))
        low = nearest(wide - rest.matrix(), root, rank)
    dtype = matrix.dtype
    low = low.replace(a=low.a.astype(dtype), b=low.b.astype(dtype), casts=(str(dtype),))
    return Sum.of(low, rest)


def integers(bits: int, group_size: int) -> Encode:
    """Round to nearest with symmetric scales that just cover each group.

    Raises:
      InputError: bits outside of 1..8.
    """
    check_bits(bits)

    def encode(matrix: Array) -> CompressedArray:
        groups = groups_of(matrix.shape[-1], group_size)
        scale, zero = minmax_range(matrix, bits=bits, groups=groups, symmetric=True)
        return encode_affine(matrix, scale, zero, bits=bits, dims=STORED)

    return encode
