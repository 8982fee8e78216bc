"""Rows of different lengths: a rectangle filled up with zeros in memory, end to end in files."""

from __future__ import annotations

from typing import Any

import numpy as np


def trimmed(values: Any, counts: np.ndarray) -> np.ndarray | None:
    """The first `counts` entries of every row, end to end.

    Args:
      values: `[*lead, N, cap]`.
      counts: integers `[*lead, N]`.

    Returns:
      `[counts.sum()]`; None where something besides zeros would be lost.
    """
    rows = np.asarray(values)
    if counts.size and int(counts.max()) > rows.shape[-1]:
        return None
    kept = np.arange(rows.shape[-1]) < counts[..., None]
    if np.ascontiguousarray(rows[~kept]).view(np.uint8).any():
        return None
    return rows[kept]


def filled(flat: Any, counts: np.ndarray, cap: int) -> Any:
    """The inverse of `trimmed`: `[*lead, N, cap]`.

    Raises:
      ValueError: `flat` has not as many entries as `counts` says, or a row more than `cap`.
    """
    flat = np.asarray(flat)
    if flat.shape != (int(counts.sum()),) or (counts.size and int(counts.max()) > cap):
        raise ValueError(f"{flat.shape} values for rows of {counts.sum()} in all")
    rows = np.zeros((*counts.shape, cap), flat.dtype)
    rows[np.arange(cap) < counts[..., None]] = flat
    return rows


def bits_of(words: Any, count: int) -> np.ndarray:
    """The first `count` bits of every row of int32 words, bool `[..., count]`."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=count, bitorder="little").astype(bool)
