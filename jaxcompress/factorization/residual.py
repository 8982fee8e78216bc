"""Low rank plus a quantized rest: each keeps what the other cannot."""

from __future__ import annotations

from functools import partial

from jaxcompress.core.arrays.base import Array, CompressedArray
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.layerwise.grid import grid_of, nearest
from jaxcompress.layerwise.low_rank import DAMP, cholesky_root, split


def loftq(
    weight: Array | CompressedArray,
    *,
    rank: int = 16,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    iterations: int = 1,
) -> Sum:
    """LoftQ: a quantized matrix plus a low rank one, made for each other in turns.

    Q = round(W - A B) and A B = SVD_r(W - Q), from A B = 0 on. Source: Li et al., "LoftQ",
    arXiv:2310.08659, algorithm 1.

    Args:
      weight: `[*lead, N, K]`.
      rank: of the low rank part.
      dtype: number format of Q, see `layerwise.grid_of`: int, fp8, nf4, ...
      bits: of an integer.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: of integers: fixed zero in the middle of the codes.
      iterations: turns. The error need not fall with each; one is what is mostly used.

    Returns:
      The sum of a `LowRank` and a quantized array.

    Raises:
      InputError: an unknown format, bits, rank or iterations out of range, or a group size that
        does not divide K.
    """
    grid = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    return split(weight, partial(nearest, grid), rank, iterations=iterations)


def qera(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    rank: int = 16,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    damp: float = DAMP,
) -> Sum:
    """QERA: a quantized matrix plus the low rank one that best mends its outputs.

    Q = round(W), and A B the best of its rank for W - Q in the outputs on calibration data. Source:
    Zhang et al., "QERA", arXiv:2410.06040, theorem 1 (with the Cholesky factor as the root of X'X).

    Args:
      weight: `[*lead, N, K]`.
      second_moment: X'X, the sum of x x' over the inputs, `[*lead, K, K]`.
      rank: of the low rank part.
      dtype: number format of Q, see `layerwise.grid_of`: int, fp8, nf4, ...
      bits: of an integer.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: of integers: fixed zero in the middle of the codes.
      damp: added to the diagonal of X'X, as a fraction of its mean.

    Returns:
      The sum of a `LowRank` and a quantized array.

    Raises:
      InputError: an unknown format, bits or rank out of range, or a group size that does not divide
        K.
    """
    grid = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    return split(weight, partial(nearest, grid), rank, cholesky_root(second_moment, damp=damp))
