"""Low rank that errs little in what a matrix gives, not in what it holds."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array, CompressedArray
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.factorization.svd import factorized
from jaxcompress.layerwise.low_rank import DAMP, cholesky_root

SMALLEST_SCALE = 1e-6  # of the largest; an input that is always 0 has none


def svd_llm(
    weight: Array | CompressedArray,
    second_moment: Array,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    allocate: Literal["uniform", "global"] = "uniform",
    damp: float = DAMP,
) -> Array | LowRank:
    """SVD-LLM: low rank with the least squared error of the outputs on calibration data.

    With X'X = L L' (Cholesky) the error |X (W - W')'| is |(W - W') L|, so that the truncated SVD of
    W L is optimal. Source: Wang et al., "SVD-LLM", arXiv:2403.07378, section 3.1.

    Args:
      weight: `[*lead, N, K]`.
      second_moment: X'X, the sum of x x' over the inputs, `[*lead, K, K]`.
      rank: singular values that stay.
      ratio: instead: the numbers that both factors hold, as a share of the matrix's own (0.5 where
        none of the three is given).
      energy: instead: the share of the squared whitened singular values that stays.
      allocate: of a ratio: "uniform", the same in every matrix; "global", one budget for all of
        them, spent where a singular value earns the most for its numbers.
      damp: added to the diagonal of X'X, as a fraction of its mean; more where that is singular.

    Returns:
      As `svd`.

    Raises:
      InputError: as `svd`.
    """
    root = cholesky_root(second_moment, damp=damp)
    return factorized(weight, root, rank=rank, ratio=ratio, energy=energy)


def asvd(
    weight: Array | CompressedArray,
    sum_abs: Array,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    allocate: Literal["uniform", "global"] = "uniform",
    alpha: float = 0.5,
) -> Array | LowRank:
    """ASVD: low rank that gives the columns of large inputs more weight.

    The truncated SVD of W S with the diagonal S = (mean |x|)^alpha. Source: Yuan et al., "ASVD",
    arXiv:2312.05821, section 3.3.

    Args:
      weight: `[*lead, N, K]`.
      sum_abs: the sum of |x| over the inputs, `[*lead, K]`.
      rank: singular values that stay.
      ratio: instead: the numbers that both factors hold, as a share of the matrix's own (0.5 where
        none of the three is given).
      energy: instead: the share of the squared scaled singular values that stays.
      allocate: of a ratio: "uniform", the same in every matrix; "global", one budget for all of
        them, spent where a singular value earns the most for its numbers.
      alpha: how much the inputs count; 0 is `svd`.

    Returns:
      As `svd`.

    Raises:
      InputError: as `svd`.
    """
    root = diagonal_root(sum_abs, alpha=alpha)
    return factorized(weight, root, rank=rank, ratio=ratio, energy=energy)


def diagonal_root(sum_abs: Array, *, alpha: float = 0.5) -> Array:
    """(|x| / the largest |x|)^alpha, `[*lead, K]`: a common factor changes nothing."""
    largest = jnp.max(sum_abs, axis=-1, keepdims=True)
    share = jnp.where(largest > 0, sum_abs / jnp.where(largest > 0, largest, 1), 1)
    return jnp.power(jnp.maximum(share, SMALLEST_SCALE), alpha).astype(jnp.float32)
