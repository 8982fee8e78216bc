"""How many singular values to keep: of one matrix, or of all of them under one budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcompress.core.errors import InputError


def check_choice(rank: int | None, ratio: float | None, energy: float | None) -> None:
    """Raise `InputError` unless at most one of them is given, within its range."""
    given = {"rank": rank, "ratio": ratio, "energy": energy}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InputError(f"{named[0]} and {named[1]}: give one of them")
    if rank is not None and rank < 1:
        raise InputError(f"rank {rank}: must be 1 or more")
    for name in ("ratio", "energy"):
        value = given[name]
        if value is not None and not 0 < value <= 1:
            raise InputError(f"{name} {value}: must be a share in (0, 1]")


def rank_of_ratio(rows: int, columns: int, ratio: float) -> int:
    """The largest rank whose factors hold at most `ratio` of the matrix's entries, at least 1."""
    return min(max(int(ratio * rows * columns / (rows + columns)), 1), rows, columns)


def rank_of_energy(values: np.ndarray, energy: float) -> int:
    """The least rank whose squared singular values make up the share `energy` of all of them.

    Args:
      values: singular values, descending, `[*lead, n]`; the rank is enough for each of `lead`.
      energy: 0 < energy <= 1.
    """
    squares = np.square(np.asarray(values, np.float64)).reshape(-1, np.shape(values)[-1])
    share = np.cumsum(squares, axis=-1) / np.maximum(squares.sum(-1, keepdims=True), 1e-300)
    short = (share < energy - 1e-12).sum(-1)
    return int(min(short.max() + 1, squares.shape[-1]))


def pays(rows: int, columns: int, rank: int) -> bool:
    """Whether two factors of this rank hold fewer numbers than the matrix."""
    return rank * (rows + columns) < rows * columns


def allocate(
    values: Sequence[np.ndarray], shapes: Sequence[tuple[int, int]], ratio: float
) -> list[int]:
    """Ranks of all matrices such that together they keep the most energy under one budget.

    A singular value costs as many numbers as a row and a column have, and earns its square as a
    share of its matrix's energy. What earns the most for its price is taken first: optimal but for
    the last that does not fit, for what a matrix earns only falls. The last thing to buy is the
    rest of a matrix, which is then kept whole, at its own size.

    Args:
      values: singular values of each matrix, descending, `[*lead, n]`; stacked matrices get one
        rank.
      shapes: (rows, columns) of each.
      ratio: numbers kept of those of all matrices, in (0, 1].

    Returns:
      A rank for each matrix, at least 1; one that does not pay (see `pays`) is a whole matrix.

    Raises:
      InputError: the budget does not hold rank 1 everywhere.
    """
    found, prices, wholes, offers = [], [], [], []
    for i, (value, (n, k)) in enumerate(zip(values, shapes, strict=True)):
        squares = np.square(np.asarray(value, np.float64)).reshape(-1, np.shape(value)[-1])
        # Shares, so that no layer counts for its scale.
        earned = (squares / np.maximum(squares.sum(-1, keepdims=True), 1e-300)).sum(0)
        price, whole = len(squares) * (n + k), len(squares) * n * k
        most = min((whole - 1) // price, len(earned))  # the last rank that pays
        found.append(1 if most else min(n, k))
        prices.append(price)
        wholes.append(whole)
        if most:
            taken = np.arange(1, most + 1)
            rest = (earned.sum() - np.cumsum(earned)[:most]) / (whole - taken * price)
            offers += [(-rate, i, False) for rate in earned[1:most] / price]
            offers.append((-rest.min(), i, True))
    costs = [r * p if r * p < w else w for r, p, w in zip(found, prices, wholes)]
    left = int(ratio * sum(wholes)) - sum(costs)
    if left < 0:
        raise InputError(f"ratio {ratio}: not even rank 1 of every matrix fits; raise it")
    for _, i, all_of_it in sorted(offers):
        cost = wholes[i] - costs[i] if all_of_it else prices[i]
        if cost <= left and costs[i] < wholes[i]:
            left, costs[i] = left - cost, costs[i] + cost
            found[i] = min(shapes[i]) if all_of_it else found[i] + 1
    return found
