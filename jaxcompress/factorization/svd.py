"""Low rank by truncated singular value decomposition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import Array, CompressedArray, dense
from jaxcompress.core.arrays.low_rank import LowRank
from jaxcompress.core.errors import InputError
from jaxcompress.core.method import Matrices
from jaxcompress.factorization import ranks
from jaxcompress.layerwise.batch import over_lead
from jaxcompress.layerwise.low_rank import nearest_of_rank, whitened

RATIO = 0.5  # of the entries, where nothing is asked for
TOLD = ("path", "window")  # what a survey is told of a matrix besides its statistics


def svd(
    weight: Array | CompressedArray,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    allocate: Literal["uniform", "global"] = "uniform",
) -> Array | LowRank:
    """Low rank: the nearest matrix of a smaller rank, kept as two thin factors.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank",
    Psychometrika 1936.

    Args:
      weight: `[*lead, N, K]`.
      rank: singular values that stay.
      ratio: instead: the numbers that both factors hold, as a share of the matrix's own (0.5 where
        none of the three is given).
      energy: instead: the share of the squared singular values that stays.
      allocate: of a ratio: "uniform", the same in every matrix; "global", one budget for all of
        them, spent where a singular value earns the most for its numbers.

    Returns:
      The factors, the root of each singular value in both; `weight` as it was where its factors
      would hold no fewer numbers.

    Raises:
      InputError: more than one of rank, ratio and energy, or one out of its range.
    """
    return factorized(weight, None, rank=rank, ratio=ratio, energy=energy)


def factorized(
    weight: Array | CompressedArray,
    root: Array | None,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
) -> Array | LowRank:
    """The nearest matrix of a smaller rank in the norm |(W - W') root|, see `svd`.

    Args:
      weight: `[*lead, N, K]`.
      root: lower triangular `[*lead, K, K]`, or the diagonal of a diagonal one `[*lead, K]`; None:
        the identity.
      rank: see `svd`, like the rest.
    """
    ranks.check_choice(rank, ratio, energy)
    matrix = dense(weight)
    rows, columns = matrix.shape[-2:]
    if energy is not None and isinstance(matrix, jax.core.Tracer):
        # Only the data can tell the rank: room for all of them.
        return nearest_of_rank(matrix, root, min(rows, columns))
    if energy is not None:
        rank = ranks.rank_of_energy(singular_values(matrix, root), energy)
    elif rank is None:
        rank = ranks.rank_of_ratio(rows, columns, RATIO if ratio is None else ratio)
    return nearest_of_rank(matrix, root, rank) if ranks.pays(rows, columns, rank) else matrix


def singular_values(matrix: Array, root: Array | None) -> np.ndarray:
    """Singular values of `W root`, descending, float32 `[*lead, min(N, K)]`."""
    return np.asarray(over_lead(_values, matrix, root))


def _values(matrix: Array, root: Array | None) -> Array:
    return jnp.linalg.svd(whitened(matrix, root), compute_uv=False)


Root = Callable[..., Array | None]


def survey(
    root_of: Root,
    matrices: Matrices,
    *,
    allocate: str = "uniform",
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    **others: Any,
) -> list[Callable[..., Any]] | None:
    """For allocate "global": what to do with each matrix, under one budget for all of them.

    Args:
      root_of: `root_of(**statistics, **others)`: the root of a matrix, see `factorized`.
      matrices: iterates over (matrix, statistics by name).
      allocate: see `svd`, like the next three.
      rank: likewise.
      ratio: likewise.
      energy: likewise.
      **others: options of `root_of`.

    Raises:
      InputError: allocate "global" of a rank or an energy, which are no budget.
    """
    if allocate != "global":
        return None
    if rank is not None or energy is not None:
        raise InputError("allocate global: needs a ratio, the budget; no rank and no energy")
    ranks.check_choice(rank, ratio, energy)
    values, shapes = [], []
    for weight, statistics in matrices():
        matrix = jnp.asarray(dense(weight))
        own = {name: value for name, value in statistics.items() if name not in TOLD}
        values.append(singular_values(matrix, root_of(**own, **others)))
        shapes.append((matrix.shape[-2], matrix.shape[-1]))

    def decided(rank: int, weight: Array, **statistics: Array) -> Array | LowRank:
        return factorized(weight, root_of(**statistics, **others), rank=rank)

    found = ranks.allocate(values, shapes, RATIO if ratio is None else ratio)
    each = {rank: partial(decided, rank) for rank in set(found)}
    return [each[rank] for rank in found]


def no_root() -> None:
    """The root of a matrix without statistics: the identity."""
