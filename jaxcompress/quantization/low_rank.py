"""Quantized weights whose error a low rank part makes good."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.combine import Sum
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.grid import Grid, grid_of, nearest, stored
from jaxcompress.layerwise.low_rank import cholesky_root, compensated, split
from jaxcompress.layerwise.solver import Solution, solve


def eora(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    rank: int = 16,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    rounding: Literal["gptq", "nearest"] = "gptq",
    damp: float = 0.01,
) -> Sum:
    """EoRA: a quantized matrix, plus the low rank one that best mends its outputs.

    Of the error D = W - Q, A B minimizes |X (D - A B)'|: the truncated SVD in the eigenspace of
    X'X. Source: Liu et al., "EoRA", arXiv:2410.21271, section 3.2 (with the Cholesky factor in the
    place of the eigenvectors, which has the same optimum). A rest by GPTQ (Frantar et al.,
    arXiv:2210.17323) leaves an error that is small in the same norm, and the low rank part what it
    could not.

    Args:
      weight: W, `[*lead, N, K]`.
      second_moment: X'X, the sum of x x' over the inputs, `[*lead, K, K]`.
      rank: of the low rank part.
      dtype: number format of Q, see `layerwise.grid_of`: int, fp8, nf4, ...
      bits: of an integer.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: of integers: fixed zero in the middle of the codes.
      rounding: how Q is found: "gptq", in the order of activation, or "nearest".
      damp: of GPTQ: added to the diagonal of X'X, as a fraction of its mean.

    Returns:
      The sum of a `LowRank` and a quantized array, in the dims `[N, K]`.

    Raises:
      InputError: an unknown format, bits or rank out of range, or a group size that does not divide
        K.
    """
    grid = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    if rounding == "nearest":
        rest = nearest(grid, dense(weight))
    else:
        found = over_lead(_Solver(grid, damp), dense(weight), second_moment)
        rest = stored(grid, found.weight, found.parameters, found.share, weight.dtype)
    return compensated(weight, rest, rank, cholesky_root(second_moment))


def svdquant(
    weight: Array | CompressedArray,
    *,
    rank: int = 16,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    iterations: int = 1,
) -> Sum:
    """SVDQuant: low rank first, which takes the outliers; what it leaves is quantized.

    A B = SVD_r(W) and Q = round(W - A B). Source: Li et al., "SVDQuant", arXiv:2411.05007, section
    4.2. The paper moves the outliers of the activations into the weights before: behind the fold
    `smoothquant`, this is its weights' part.

    Args:
      weight: W, `[*lead, N, K]`.
      rank: of the low rank part.
      dtype: number format of Q, see `layerwise.grid_of`: int, fp8, nf4, ...
      bits: of an integer.
      group_size: contracted columns that share a scale; must divide K; -1: one scale per row.
      symmetric: of integers: fixed zero in the middle of the codes.
      iterations: turns; in each but the first the low rank part is SVD_r(W - Q).

    Returns:
      The sum of a `LowRank` and a quantized array, in the dims `[N, K]`.

    Raises:
      InputError: an unknown format, bits, rank or iterations out of range, or a group size that
        does not divide K.
    """
    grid = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    encode = partial(nearest, grid)
    return split(weight, encode, rank, iterations=iterations, low_rank_first=True)


@dataclass(frozen=True)
class _Solver:
    """GPTQ of one matrix; equal options are one compiled program."""

    grid: Grid
    damp: float

    def __call__(self, weight: Array, second_moment: Array) -> Solution:
        return solve(weight, second_moment, grid=self.grid, act_order=True, damp=self.damp)
