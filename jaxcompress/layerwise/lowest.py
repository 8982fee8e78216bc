"""Which entries go, inside of a compiled loop: exact counts, no sort, one program for any count."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.base import Array


def lowest(scores: Array, count: Array) -> Array:
    """True at exactly `count` of the lowest scores; of equal ones, those that come first.

    Args:
      scores: non-negative float32 of any shape.
      count: int32 `[]`, at most the number of scores.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32)  # of the same order as the scores

    def lower_half(i: Array, threshold: Array) -> Array:
        trial = threshold | (1 << (30 - i))
        return jnp.where(jnp.sum(bits < trial) >= count, threshold, trial)

    # The count-th lowest score.
    threshold = lax.fori_loop(0, 31, lower_half, jnp.full_like(bits, 0, shape=()))
    below = bits < threshold
    return below | first(bits == threshold, count - jnp.sum(below))


def first(found: Array, count: Array) -> Array:
    """True at the first `count` True entries of `found`, in order of storage.

    Bisects the place of the last one, unless all of them are wanted: a cumulative sum costs a CPU
    several times more.
    """
    place = jnp.arange(found.size).reshape(found.shape)

    def open_(state: tuple[Array, Array]) -> Array:
        low, high = state
        return high - low > 1

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state  # at most `count` lie before low, more than that before high
        middle = (low + high) // 2
        few = jnp.sum(found & (place < middle)) <= count
        return jnp.where(few, middle, low), jnp.where(few, high, middle)

    all_of_them = jnp.sum(found) <= count
    end = jnp.full_like(all_of_them, found.size + 1, jnp.int32)
    low, _ = lax.while_loop(open_, halve, (jnp.where(all_of_them, end, 0), end))
    return found & (place < low)


def lowest_rows(scores: Array, count: int) -> Array:
    """True at the `count` lowest of every column of `[m, N]`; of equal ones, the first."""
    row = jnp.arange(scores.shape[0])
    mine, other = scores[:, None], scores[None]
    earlier = (row[None] < row[:, None])[..., None]
    return jnp.sum((other < mine) | ((other == mine) & earlier), axis=1) < count
