"""Patterns: scores to masks, with exactly the asked number of entries removed.

Scores are float `[*lead, N, K]` (the stored matrix: N rows, K contracted) of any sign, the larger
the more important. A mask is boolean of the same shape, True = kept. Among equal scores the entry
with the lower index goes first.

A pattern says what goes together: single entries ("unstructured"), all but n of every m columns of
a row (`n:m`), or blocks of R rows and C columns (`block:RxC`, its score the sum of its entries').
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError

Scope = Literal["layer", "row", "global"]

SIGN = np.uint32(1 << 31)  # the bits of -0.0


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


def parse_block(pattern: str) -> tuple[int, int] | None:
    """(rows, columns) of a pattern written `block:RxC`, None for any other.

    Raises:
      InputError: the pattern begins with "block", but is not of that form.
    """
    if not pattern.startswith("block"):
        return None
    match = re.fullmatch(r"block:(\d+)x(\d+)", pattern)
    if not match or int(match[1]) * int(match[2]) == 0:
        raise InputError(f"pattern {pattern!r}: blocks are block:RxC, such as block:4x16")
    return int(match[1]), int(match[2])


# ------------------------------------------------------------------------------ scores to masks


def keep(
    scores: Array,
    sparsity: float,
    *,
    pattern: str = "unstructured",
    scope: str = "layer",
    rounding: str = "floor",
) -> Array:
    """The mask of a pattern: the lowest scores go.

    Args:
      scores: float `[*lead, N, K]`.
      sparsity: fraction removed of each unit (of its blocks, if the pattern is one of blocks);
        n:m ignores it.
      pattern: "unstructured", `n:m` or `block:RxC`.
      scope: the unit: every "layer" `[N, K]`, every "row" (of blocks), or "global": all of
        `scores` together.
      rounding: see `removed_count`.

    Raises:
      InputError: an unknown pattern, or one that does not divide the matrix.
    """
    n_m = None if parse_block(pattern) else parse_n_m(pattern)
    if n_m is not None:
        return keep_n_of_m(scores, *n_m)
    units = unit_scores(scores, pattern)
    if scope == "global":
        flat = units.reshape(-1)
        mask = keep_highest(flat, removed_count(flat.size, sparsity, rounding)).reshape(units.shape)
    else:
        mask = (keep_per_row if scope == "row" else keep_per_layer)(units, sparsity, rounding)
    return unit_mask(mask, pattern)


def keep_counted(
    scores: Array, removed: Array, *, pattern: str = "unstructured", scope: str = "layer"
) -> Array:
    """The mask that removes a given number of entries of every matrix.

    Args:
      scores: float `[*lead, N, K]`.
      removed: int32 `[*lead]`, entries (or blocks) that go of each matrix.
      pattern: "unstructured" or `block:RxC`.
      scope: "layer": the lowest of the matrix go; "row": as many of every row, one more of the
        first rows where the number does not divide.
    """
    units = unit_scores(scores, pattern)
    if scope == "row":
        rows = units.shape[-2]
        each, more = jnp.divmod(removed[..., None], rows)
        return unit_mask(keep_highest(units, each + (jnp.arange(rows) < more)), pattern)
    flat = units.reshape(*units.shape[:-2], -1)
    return unit_mask(keep_highest(flat, removed).reshape(units.shape), pattern)


def keep_per_row(scores: Array, sparsity: float, rounding: str = "floor") -> Array:
    """Mask that removes floor(sparsity * K) entries of every row."""
    return keep_highest(scores, removed_count(scores.shape[-1], sparsity, rounding))


def keep_per_layer(scores: Array, sparsity: float, rounding: str = "floor") -> Array:
    """Mask that removes floor(sparsity * N * K) entries of every `[N, K]` matrix."""
    flat = scores.reshape(*scores.shape[:-2], -1)
    count = removed_count(flat.shape[-1], sparsity, rounding)
    return keep_highest(flat, count).reshape(scores.shape)


def keep_n_of_m(scores: Array, n: int, m: int) -> Array:
    """Mask that keeps the n best of every m consecutive columns of a row.

    Raises:
      InputError: m does not divide K.
    """
    k = scores.shape[-1]
    if k % m:
        raise InputError(f"pattern {n}:{m}: {m} does not divide the {k} contracted columns")
    groups = lax.optimization_barrier(scores).reshape(*scores.shape[:-1], k // m, m)
    earlier = jnp.arange(m)[:, None] < jnp.arange(m)[None, :]  # [other, mine]
    mine, other = groups[..., None, :], groups[..., :, None]
    goes_before = (other < mine) | ((other == mine) & earlier)
    rank = goes_before.sum(-2)  # how many of the group are removed before this one
    return (rank >= m - n).reshape(scores.shape)


def unit_scores(scores: Array, pattern: str) -> Array:
    """Scores of what goes together: `scores`, or the sums of the blocks `[*lead, N/R, K/C]`.

    Raises:
      InputError: the blocks do not divide the matrix.
    """
    block = parse_block(pattern)
    if block is None:
        return scores
    (rows, columns), (n, k) = block, scores.shape[-2:]
    if n % rows or k % columns:
        raise InputError(f"pattern {pattern}: does not divide the {n} x {k} matrix")
    cut = scores.reshape(*scores.shape[:-2], n // rows, rows, k // columns, columns)
    return cut.astype(jnp.float32).sum((-3, -1))


def unit_mask(mask: Array, pattern: str) -> Array:
    """The mask of the entries, from that of what goes together; see `unit_scores`."""
    block = parse_block(pattern)
    if block is None:
        return mask
    return jnp.repeat(jnp.repeat(mask, block[0], axis=-2), block[1], axis=-1)


# ---------------------------------------------------------------------------- exactly the lowest


@jax.jit
def keep_highest(scores: Array, removed: Array | int) -> Array:
    """Mask that removes the lowest scores along the last axis, ties by index.

    No sort: the highest score that goes is found bit by bit. One program for any number.

    Args:
      scores: finite floats `[..., n]`.
      removed: how many go, at most n; an int, or int32 `[...]`.
    """
    # Computed once: a compiler that computes scores anew where they are compared may round them
    # another way there.
    bits = lax.optimization_barrier(ordered_bits(scores))
    count = jnp.broadcast_to(jnp.asarray(removed, jnp.int32), bits.shape[:-1])[..., None]

    def lower_half(i: Array, threshold: Array) -> Array:
        trial = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        below = jnp.sum(bits < trial, axis=-1, keepdims=True)
        return jnp.where(below >= count, threshold, trial)

    threshold = lax.fori_loop(0, 32, lower_half, jnp.zeros(count.shape, jnp.uint32))
    below, equal = bits < threshold, bits == threshold
    ties = count - jnp.sum(below, axis=-1, keepdims=True)
    return ~(below | _first(equal, ties))


def _first(found: Array, count: Array) -> Array:
    """True at the first `count` `[..., 1]` True entries of `found` along the last axis.

    Bisects the place of the last one, unless all are wanted: a cumulative sum costs several times
    more on a CPU.
    """
    n = found.shape[-1]
    place = jnp.arange(n)

    def cut(found: Array) -> Array:
        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # at most `count` lie before low, more before high
            middle = (low + high) // 2
            few = jnp.sum(found & (place < middle), axis=-1, keepdims=True) <= count
            return jnp.where(few, middle, low), jnp.where(few, high, middle)

        bounds = jnp.zeros(count.shape, jnp.int32), jnp.full(count.shape, n + 1, jnp.int32)
        low, _ = lax.fori_loop(0, (n + 1).bit_length(), halve, bounds)
        return found & (place < low)

    all_wanted = jnp.all(jnp.sum(found, axis=-1, keepdims=True) <= count)
    return lax.cond(all_wanted, lambda found: found, cut, found)


def ordered_bits(scores: Array) -> Array:
    """uint32 in the order of float scores, as float32 (-0.0 counts as 0)."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(bits == SIGN, 0, bits)
    return jnp.where(bits >> 31 == 1, ~bits, bits | SIGN)


def ordered_bits_of(scores: np.ndarray) -> np.ndarray:
    """`ordered_bits` of a host array."""
    bits = np.asarray(scores, np.float32).view(np.uint32)
    bits = np.where(bits == SIGN, np.uint32(0), bits)
    return np.where(bits >> 31 == 1, ~bits, bits | SIGN)
