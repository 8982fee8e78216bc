"""Allocation: how many entries go of each matrix, so that all together lose floor(sparsity * n).

A matrix here is one `[N, K]`; the layers of a stacked leaf are matrices of their own. Its size is
its number of entries, or of blocks, where the pattern is one of blocks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.pruning.patterns import ordered_bits_of, removed_count

GRID = (0.25, 0.5, 0.7, 0.85, 0.95)  # sparsities at which `measured` looks


def uniform(sizes: Sequence[int], sparsity: float, rounding: str = "floor") -> np.ndarray:
    """The same share of every matrix: int64 `[matrices]`."""
    return np.array([removed_count(n, sparsity, rounding) for n in sizes], np.int64)


def global_threshold(
    scores: Callable[[], Iterable[np.ndarray]], sparsity: float, rounding: str = "floor"
) -> np.ndarray:
    """The lowest scores of all matrices together go; ties by the matrices' order.

    Two passes over the scores (high half of the float's bits, low half), no sort, so that they can
    be read from disk one matrix at a time.

    Args:
      scores: gives a fresh iterator over the scores of each matrix, in a fixed order.
      sparsity: fraction removed of all entries.
      rounding: see `patterns.removed_count`.

    Returns:
      How many go of each matrix, int64 `[matrices]`.
    """

    def all_bits() -> Iterator[np.ndarray]:
        return (ordered_bits_of(block).reshape(-1) for block in scores())

    high = np.zeros(1 << 16, np.int64)
    for bits in all_bits():
        high += np.bincount(bits >> 16, minlength=1 << 16)
    left = removed_count(int(high.sum()), sparsity, rounding)
    bucket = int(np.searchsorted(np.cumsum(high), left))
    counts, low = [], []
    for bits in all_bits():
        counts.append(int((bits >> 16 < bucket).sum()))
        low.append((bits[bits >> 16 == bucket] & 0xFFFF).astype(np.uint16))
    left -= sum(counts)
    in_bucket = np.bincount(np.concatenate(low), minlength=1 << 16)
    value = int(np.searchsorted(np.cumsum(in_bucket), left))
    ties = left - int(in_bucket[:value].sum())
    for i, mine in enumerate(low):
        equal = min(ties, int((mine == value).sum()))
        counts[i] += int((mine < value).sum()) + equal
        ties -= equal
    return np.array(counts, np.int64)


def erdos_renyi(
    shapes: Sequence[Sequence[int]],
    sparsity: float,
    rounding: str = "floor",
    *,
    sizes: Sequence[int] | None = None,
) -> np.ndarray:
    """Erdos-Renyi(-kernel): densities in proportion to (n_in + n_out + w + h) / (n_in n_out w h).

    Small matrices are kept denser; one that would be denser than dense stays whole, and the others
    make up for it.

    Source: Evci et al., "Rigging the Lottery", arXiv:1911.11134, section 3 (1).

    Args:
      shapes: (outputs, inputs) of each matrix, and the window of a convolution behind them.
      sparsity: fraction removed of all entries.
      rounding: see `patterns.removed_count`.
      sizes: of the matrices, where they are not the products of the shapes (blocks).

    Returns:
      How many go of each matrix, int64 `[matrices]`.
    """
    entries = np.array([math.prod(shape) for shape in shapes], np.float64)
    each = entries if sizes is None else np.array(sizes, np.float64)
    total = removed_count(int(each.sum()), sparsity, rounding)
    relative = np.array([sum(shape) for shape in shapes], np.float64) / entries
    whole = np.zeros(len(each), bool)
    while True:
        kept = each.sum() - total - each[whole].sum()
        scale = kept / max((relative * each)[~whole].sum(), np.finfo(float).tiny)
        over = ~whole & (scale * relative > 1)
        if not over.any():
            break
        whole |= over
    density = np.where(whole, 1.0, scale * relative)
    return exact_counts((1 - density) * each, each, total)


def outlier_weighted(
    shares: Sequence[float] | np.ndarray,
    sizes: Sequence[int],
    blocks: Sequence[Hashable],
    sparsity: float,
    rounding: str = "floor",
    *,
    spread: float = 0.08,
) -> np.ndarray:
    """OWL: blocks of the model with more outliers keep more, within 2 * spread of each other.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv:2310.05175, section 3.

    Args:
      shares: of each matrix, the share of outliers among its |w| ||x||: see `outlier_shares`.
      sizes: of each matrix.
      blocks: of each matrix, the block of the model that it is part of. A block has one sparsity.
      sparsity: fraction removed of all entries.
      rounding: see `patterns.removed_count`.
      spread: lambda of the paper; the sparsities of two blocks differ by 2 * spread at most.

    Returns:
      How many go of each matrix, int64 `[matrices]`.

    Raises:
      InputError: the spread takes a block's sparsity out of [0, 1].
    """
    each = np.array(sizes, np.float64)
    names = list(dict.fromkeys(blocks))
    member = np.array([names.index(block) for block in blocks])
    size = np.bincount(member, each)
    outliers = np.bincount(member, each * np.array(shares)) / size
    width = np.ptp(outliers)
    density = (outliers - outliers.min()) * (2 * spread / width if width > 0 else 0)
    density += 1 - sparsity - (density * size).sum() / size.sum()
    if density.min() < 0 or density.max() > 1:
        raise InputError(
            f"owl_spread {spread}: at sparsity {sparsity} a block's share would leave [0, 1]; "
            "use a smaller spread"
        )
    total = removed_count(int(each.sum()), sparsity, rounding)
    return exact_counts((1 - density[member]) * each, each, total)


def measured(
    sizes: Sequence[int],
    loss_increase: Callable[[int, int], float],
    sparsity: float,
    rounding: str = "floor",
    *,
    grid: Sequence[float] = GRID,
) -> np.ndarray:
    """The split of the budget that costs least, by the loss measured with one matrix pruned.

    Losses of the matrices are taken to add up. Between the measured sparsities of a matrix its
    loss is the lower convex hull's; over such curves, filling the segments in the order of their
    slopes is the best split.

    Args:
      sizes: of each matrix.
      loss_increase: `loss_increase(i, count)`: by how much the loss grows if `count` entries of
        matrix i go, and nothing else.
      sparsity: fraction removed of all entries.
      rounding: see `patterns.removed_count`.
      grid: sparsities at which each matrix is measured.

    Returns:
      How many go of each matrix, int64 `[matrices]`.

    Raises:
      InputError: the budget is more than the grid's highest sparsity takes.
    """
    left = removed_count(sum(sizes), sparsity, rounding)
    segments = []
    for i, n in enumerate(sizes):
        places = sorted({removed_count(n, s) for s in grid} - {0})
        curve = [(0, 0.0), *((count, loss_increase(i, count)) for count in places)]
        hull = _lower_hull(curve)
        segments += [((d - b) / (c - a), i, a, c - a) for (a, b), (c, d) in pairwise(hull)]
    if sum(length for *_, length in segments) < left:
        raise InputError(
            f"sparsity {sparsity}: no matrix is measured beyond {max(grid)}; use a lower one"
        )
    counts = np.zeros(len(sizes), np.int64)
    for _, i, _, length in sorted(segments):
        taken = min(length, left)
        counts[i] += taken
        left -= taken
    return counts


def outlier_shares(
    metrics: Callable[[], Iterable[np.ndarray]],
    blocks: Sequence[Hashable],
    threshold: float = 5.0,
) -> np.ndarray:
    """Share of outliers in each matrix: entries above `threshold` times the mean of its block.

    Source: Yin et al., arXiv:2310.05175, section 3, equation 2.

    Args:
      metrics: gives a fresh iterator over |w| ||x|| of each matrix, in a fixed order.
      blocks: of each matrix, the block of the model that it is part of.
      threshold: M of the paper.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    entries: dict[Hashable, int] = defaultdict(int)
    for block, metric in zip(blocks, metrics(), strict=True):
        sums[block] += float(metric.sum(dtype=np.float64))
        entries[block] += metric.size
    return np.array(
        [
            np.mean(metric > threshold * sums[block] / entries[block])
            for block, metric in zip(blocks, metrics(), strict=True)
        ]
    )


def exact_counts(wanted: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers close to `wanted` with the sum `total`, by largest remainders.

    Args:
      wanted: real numbers in [0, sizes] whose sum is `total`, up to rounding.
      sizes: the most that each may be.
      total: the sum.
    """
    counts = np.clip(np.floor(wanted), 0, sizes).astype(np.int64)
    by_remainder = np.argsort(counts - wanted, kind="stable")
    while (short := total - int(counts.sum())) != 0:
        step = 1 if short > 0 else -1
        order = by_remainder if short > 0 else by_remainder[::-1]
        room = [i for i in order if 0 <= counts[i] + step <= sizes[i]]
        counts[room[: abs(short)]] += step
    return counts


def _lower_hull(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The corners of the lower convex hull of points with ascending places."""
    hull: list[tuple[int, float]] = []
    for x, y in curve:
        while len(hull) > 1:
            (a, b), (c, d) = hull[-2:]
            if (d - b) * (x - c) < (y - d) * (c - a):
                break
            hull.pop()
        hull.append((x, y))
    return hull
