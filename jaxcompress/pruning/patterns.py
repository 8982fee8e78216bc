"""Patterns: scores to masks, with exactly the asked number of entries removed.

Scores are float `[*lead, N, K]` (the stored matrix: N rows, K contracted), non-negative, the
larger the more important. A mask is boolean of the same shape, True = kept. Among equal scores
the entry with the lower index goes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError


def removed_count(n: int, sparsity: float, rounding: str = "floor") -> int:
    """Entries of `n` that go: exactly floor(sparsity * n), sparsity read as a decimal fraction.

    Args:
      n: number of entries in the unit of selection.
      sparsity: fraction removed, 0 <= sparsity < 1.
      rounding: "floor", or "nearest" as `torch.nn.utils.prune` rounds (half to even).

    Raises:
      InputError: sparsity outside of [0, 1), or an unknown rounding.
    """
    check_sparsity(sparsity)
    exact = Decimal(repr(float(sparsity))) * n
    if rounding == "floor":
        return int(exact)
    if rounding == "nearest":
        return int(exact.to_integral_value("ROUND_HALF_EVEN"))
    raise InputError(f"rounding {rounding!r}: use 'floor' or 'nearest'")


def check_sparsity(sparsity: float) -> None:
    """Raise `InputError` unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise InputError(
            f"sparsity {sparsity}: must be a fraction in [0, 1), such as 0.5 to remove half"
        )


def parse_n_m(pattern: str) -> tuple[int, int] | None:
    """(n, m) of a pattern written `n:m` (keep n of every m), None for "unstructured".

    Raises:
      InputError: the pattern is neither.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise InputError(
            f"pattern {pattern!r}: use 'unstructured', or n:m with 0 < n < m (2:4 keeps 2 of 4)"
        )
    return int(match[1]), int(match[2])


def keep_per_row(scores: Array, sparsity: float, rounding: str = "floor") -> Array:
    """Mask that removes floor(sparsity * K) entries of every row."""
    return _remove_lowest(scores, removed_count(scores.shape[-1], sparsity, rounding))


def keep_per_layer(scores: Array, sparsity: float, rounding: str = "floor") -> Array:
    """Mask that removes floor(sparsity * N * K) entries of every `[N, K]` matrix."""
    flat = scores.reshape(*scores.shape[:-2], -1)
    count = removed_count(flat.shape[-1], sparsity, rounding)
    return _remove_lowest(flat, count).reshape(scores.shape)


def keep_n_of_m(scores: Array, n: int, m: int) -> Array:
    """Mask that keeps the n best of every m consecutive columns of a row.

    Raises:
      InputError: m does not divide K.
    """
    k = scores.shape[-1]
    if k % m:
        raise InputError(f"pattern {n}:{m}: {m} does not divide the {k} contracted columns")
    groups = scores.reshape(*scores.shape[:-1], k // m, m)
    earlier = jnp.arange(m)[:, None] < jnp.arange(m)[None, :]  # [other, mine]
    mine, other = groups[..., None, :], groups[..., :, None]
    goes_before = (other < mine) | ((other == mine) & earlier)
    rank = goes_before.sum(-2)  # how many of the group are removed before this one
    return (rank >= m - n).reshape(scores.shape)


class Threshold(NamedTuple):
    """Scores below `score` go, and the first `ties` entries that equal it."""

    score: float
    ties: int


def keep_above(scores: Array, threshold: Threshold) -> Array:
    """Mask that removes the scores below a threshold, and the first of those that equal it."""
    bits = _ordered_bits(scores).reshape(-1)
    score = _ordered_bits(jnp.float32(threshold.score))
    return _keep_above_bits(bits, score, jnp.int32(threshold.ties)).reshape(scores.shape)


def global_thresholds(
    scores: Callable[[], Iterable[np.ndarray]], sparsity: float, rounding: str = "floor"
) -> list[Threshold]:
    """Thresholds that remove floor(sparsity * n) of the n scores of all matrices together.

    Three passes over the scores (high half of the float's bits, low half, ties), no sort, so that
    they can be read from disk one matrix at a time.

    Args:
      scores: gives a fresh iterator over the matrices' scores, in a fixed order.
      sparsity: fraction removed of all entries.
      rounding: see `removed_count`.

    Returns:
      One threshold for each matrix, in their order: the same score, and its share of the ties.
    """

    def all_bits() -> Iterator[np.ndarray]:
        for block in scores():
            yield np.asarray(block, np.float32).reshape(-1).view(np.uint32)

    high, matrices = np.zeros(1 << 16, np.int64), 0
    for bits in all_bits():
        high += np.bincount(bits >> 16, minlength=1 << 16)
        matrices += 1
    left = removed_count(int(high.sum()), sparsity, rounding)
    if left == 0:
        return [Threshold(0.0, 0)] * matrices
    bucket = int(np.searchsorted(np.cumsum(high), left))
    left -= int(high[:bucket].sum())
    low = np.zeros(1 << 16, np.int64)
    for bits in all_bits():
        low += np.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    value = int(np.searchsorted(np.cumsum(low), left))
    ties = left - int(low[:value].sum())
    word = np.array([(bucket << 16) | value], np.uint32)
    score, found = float(word.view(np.float32)[0]), []
    for bits in all_bits():
        mine = min(ties, int((bits == word[0]).sum()))
        found.append(Threshold(score, mine))
        ties -= mine
    return found


def _ordered_bits(scores: Array) -> Array:
    """int32 whose order is that of non-negative float32 scores (-0.0 counts as 0)."""
    positive = jnp.abs(scores.astype(jnp.float32))
    return jax.lax.bitcast_convert_type(positive, jnp.int32)


def _remove_lowest(scores: Array, count: int) -> Array:
    """Mask that removes `count` entries along the last axis; ties go by index."""
    if count == 0:
        return jnp.ones(scores.shape, bool)
    bits = _ordered_bits(scores)
    # The count-th smallest value, bit by bit from the top: no sort, and exact.
    threshold = jnp.zeros((*bits.shape[:-1], 1), jnp.int32)
    for bit in range(30, -1, -1):
        trial = threshold | (1 << bit)
        below = (bits < trial).sum(-1, keepdims=True)
        threshold = jnp.where(below >= count, threshold, trial)
    equal = bits == threshold
    ties = count - (bits < threshold).sum(-1, keepdims=True)
    return (bits > threshold) | (equal & (jnp.cumsum(equal, axis=-1) > ties))


@jax.jit
def _keep_above_bits(bits: Array, threshold: Array, ties: Array) -> Array:
    equal = bits == threshold
    return (bits > threshold) | (equal & (jnp.cumsum(equal) > ties))
