"""Quality over several slices of the data: how much one number can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def over_slices(
    items: np.ndarray, count: int, quality: Callable[[np.ndarray], float]
) -> dict[str, Any]:
    """A quality over contiguous slices of as equal a length as can be.

    Args:
      items: `[items, ...]` what each window or image adds, in the order of the data.
      count: slices asked for; fewer where there are fewer items; 0 or 1: none.
      quality: `quality(slice of items) -> float`.

    Returns:
      `slices`, a list, and `spread`, their standard deviation (n - 1); empty for fewer than 2.
    """
    count = min(count, len(items))
    if count < 2:
        return {}
    found = [float(quality(part)) for part in np.array_split(items, count)]
    with np.errstate(invalid="ignore"):  # of a slice that is infinite
        return {"slices": found, "spread": float(np.std(found, ddof=1))}
