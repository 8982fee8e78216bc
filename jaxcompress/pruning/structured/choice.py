"""Which indices of each group stay, given their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.pruning.patterns import removed_count

Allocation = Literal["uniform", "global"]


def kept_count(size: int, sparsity: float, multiple: int = 1, minimum: int = 1) -> int:
    """How many of `size` indices stay: all but floor(sparsity * size), a multiple of `multiple`.

    Never more go than asked: the count is rounded up, to `size` at most.

    Args:
      size: of the group.
      sparsity: fraction removed, 0 <= sparsity < 1.
      multiple: of which the count shall be, as kernels and devices like it.
      minimum: the least that stay.

    Raises:
      InputError: sparsity out of range, or a number that is not positive.
    """
    for name, value in (("multiple", multiple), ("minimum", minimum)):
        if value < 1:
            raise InputError(f"{name} {value}: must be 1 or more")
    kept = max(size - removed_count(size, sparsity), minimum)
    return min(-(-kept // multiple) * multiple, size)


def choose(
    scores: Sequence[np.ndarray],
    sparsity: float,
    *,
    multiple: int = 1,
    minimum: int = 1,
    allocation: Allocation = "uniform",
) -> list[np.ndarray]:
    """The indices that stay, of the lowest scores the fraction `sparsity` going.

    Among equal scores the lower index goes first.

    Args:
      scores: of each group, `[size]` or `[steps, size]`.
      sparsity: fraction removed of each group, or of all together.
      multiple: see `kept_count`.
      minimum: see `kept_count`.
      allocation: "uniform": the same fraction of each group; "global": the lowest of all groups,
        after each group's scores were divided by their mean (Fang et al., "DepGraph",
        arXiv:2301.12900, appendix), so that a layer of small weights is not cut first.

    Returns:
      Sorted indices `[k]` or `[steps, k]` of each group.

    Raises:
      InputError: see `kept_count`; or "global" for groups that live in a scan, whose steps must
        all keep the same number.
    """
    if allocation == "uniform":
        counts = [kept_count(s.shape[-1], sparsity, multiple, minimum) for s in scores]
    else:
        counts = _global_counts(scores, sparsity, multiple, minimum)
    return [best(s, count) for s, count in zip(scores, counts, strict=True)]


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest indices of `[..., size]`, sorted; of equal ones the later stay."""
    order = np.argsort(scores, axis=-1, kind="stable")
    return np.sort(order[..., order.shape[-1] - count :], axis=-1)


def _global_counts(
    scores: Sequence[np.ndarray], sparsity: float, multiple: int, minimum: int
) -> list[int]:
    if any(s.ndim > 1 for s in scores):
        raise InputError(
            "allocation global: layers stacked in a scan all keep the same number; load the model "
            "with scan_layers=False, or use allocation uniform"
        )
    left = np.array([kept_count(len(s), 0.0, 1, minimum) for s in scores])
    least = np.array([min(-(-minimum // multiple) * multiple, len(s)) for s in scores])
    relative = [s / (np.abs(s).mean() or 1.0) for s in scores]
    group = np.repeat(np.arange(len(scores)), left)
    todo = removed_count(len(group), sparsity)
    for place in np.argsort(np.concatenate(relative), kind="stable"):
        if todo and left[group[place]] > least[group[place]]:
            left[group[place]] -= 1
            todo -= 1
    return [min(-(-n // multiple) * multiple, len(s)) for n, s in zip(left, scores, strict=True)]
