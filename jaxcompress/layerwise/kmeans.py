"""Shared values: k-means in one dimension, weighted, and matrices whose weights take few values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.affine import check_table_bits, groups_of
from jaxcompress.core.arrays.base import STORED, Array
from jaxcompress.core.arrays.codebook import Codebook, encode_codebook, scaled_down
from jaxcompress.layerwise.batch import over_lead

Init = Literal["optimal", "kmeans++", "linear"]
Sharing = Literal["tensor", "channel", "group"]
SAMPLE = 1 << 18  # values that "kmeans++" draws from
SHORT = 1 << 14  # values of a short row
PLACES = 256  # at which "optimal" may cut
MOST_OPTIMAL = 32  # clusters: more of them are too small for float32 sums, and take long
ROWS_TOGETHER = 32  # each with a table of PLACES x PLACES costs


def shared_values(
    matrix: Array,
    importance: Array | None = None,
    *,
    bits: int,
    granularity: Sharing,
    group_size: int = 128,
    init: Init = "optimal",
    steps: int = 200,
    seed: int = 0,
) -> Codebook:
    """A matrix of which every weight is one of 2^bits values of its table.

    Args:
      matrix: float `[*lead, N, K]`.
      importance: how much the squared error of each weight counts, not negative, in the shape of
        the matrix; None: all alike. A table of which no weight counts is made as if all did.
      bits: of a code, 1 to 8.
      granularity: what shares a table: "tensor", the matrix; "channel", each row; "group": the
        matrix, after every group of columns is divided by its largest absolute weight.
      group_size: contracted columns of a group; must divide K; -1: the whole row.
      init: see `clusters`.
      steps: of Lloyd's algorithm at most.
      seed: of the draws of "kmeans++".

    Returns:
      The codes and the table, in the dims `[N, K]` with the dtype of `matrix`. Where a matrix holds
      exact zeros, so does its table.

    Raises:
      InputError: bits outside of 1..8, or a group size that does not divide K.
    """
    check_table_bits(bits)
    groups = groups_of(matrix.shape[-1], group_size) if granularity == "group" else 0
    solve = _sharing(bits, granularity == "channel", groups, init, steps, seed)
    return over_lead(solve, matrix, importance)


@functools.cache
def _sharing(
    bits: int, per_row: bool, groups: int, init: Init, steps: int, seed: int
) -> Callable[[Array, Array | None], Codebook]:
    """The solver of one matrix; the same function for the same options, compiled once."""

    def solve(matrix: Array, importance: Array | None) -> Codebook:
        wide = matrix.astype(jnp.float32)
        counts = jnp.ones_like(wide) if importance is None else importance.astype(jnp.float32)
        rows = (matrix.shape[0], -1) if per_row else (1, -1)
        counts = _of_mean_one(counts.reshape(rows)).reshape(wide.shape)
        scale = None
        if groups:
            largest = jnp.abs(matrix).reshape(*matrix.shape[:-1], groups, -1).max(-1)
            scale = jnp.where(largest > 0, largest, 1)
            # The error of a value counts as large as its scale makes it.
            squares = jnp.square(scale.astype(jnp.float32))
            counts = counts * jnp.repeat(squares, matrix.shape[-1] // groups, axis=-1)
            wide = scaled_down(wide, scale.astype(jnp.float32))
        find = functools.partial(clusters, count=2**bits, init=init, steps=steps, seed=seed)
        given = wide.reshape(rows), counts.reshape(rows)
        table = lax.map(lambda row: find(*row), given, batch_size=ROWS_TOGETHER)
        return encode_codebook(
            matrix, jnp.sort(table.astype(matrix.dtype)), scale, bits=bits, dims=STORED
        )

    return solve


def _of_mean_one(importance: Array) -> Array:
    """Rows of a mean of one; of nothing but ones where none counts."""
    largest = importance.max(-1, keepdims=True)
    shares = importance / jnp.where(largest > 0, largest, 1)  # a mean of tiny numbers may vanish
    mean = shares.mean(-1, keepdims=True)
    return jnp.where(largest > 0, shares / jnp.where(mean > 0, mean, 1), 1)


def clusters(
    values: Array,
    weights: Array,
    *,
    count: int,
    init: Init = "optimal",
    steps: int = 200,
    seed: int = 0,
) -> Array:
    """Centers of Lloyd's algorithm in one dimension, ascending, float32 `[count]`.

    Clusters are intervals of the sorted values, so that a step needs the values at `count` places
    only. A cluster without values keeps its center. If some value is exactly 0, the center that
    begins nearest to 0 is 0 and stays there.

    Args:
      values: float32 `[n]`.
      weights: how much the squared error of each value counts, float32 `[n]`, not negative.
      count: of clusters.
      init: "optimal": the best intervals over all cuts at 256 places or fewer, which lie densest
        where there is most to win (all places, of up to 256 values): nothing for Lloyd's algorithm
        to mend, or little; from 6 bits on as "kmeans++". "kmeans++": centers drawn one after the
        other, far from those before (Arthur and Vassilvitskii 2007). "linear": evenly between the
        smallest and the largest value.
      steps: at most.
      seed: of the draws of "kmeans++".
    """
    order = jnp.argsort(values)
    values, weights = values[order], weights[order]
    # What is pinned at zero draws no other center towards it.
    has_zero = (values == 0).any()
    drawing = jnp.where(values == 0, 0, weights)
    start = jnp.sort(INITS[init](values, drawing, count, seed))
    pinned = has_zero & (jnp.arange(count) == jnp.argmin(jnp.abs(start)))
    start = jnp.where(pinned, 0, start)

    # A binary search is many small gathers; of a short row, looking at all values is faster.
    method = "compare_all" if values.size <= SHORT else "scan"

    def bounds_of(centers: Array) -> Array:
        middles = (centers[1:] + centers[:-1]) / 2
        inner = jnp.searchsorted(values, middles, side="right", method=method)
        return jnp.concatenate([jnp.zeros(1, inner.dtype), inner, jnp.full(1, values.size)])

    def sums_before(terms: Array) -> Array:
        return jnp.concatenate([jnp.zeros(1), jnp.cumsum(terms)])

    mass_before, moment_before = sums_before(weights), sums_before(weights * values)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        centers, _, done = state
        bounds = bounds_of(centers)
        mass, moment = jnp.diff(mass_before[bounds]), jnp.diff(moment_before[bounds])
        means = jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1), centers)
        return jnp.where(pinned, 0, means), centers, done + 1

    def moves(state: tuple[Array, Array, Array]) -> Array:
        centers, before, done = state
        return (done < steps) & (centers != before).any()

    state = (start, jnp.full_like(start, jnp.nan), jnp.int32(0))
    centers, _, _ = lax.while_loop(moves, step, state)
    # Differences of long sums lose digits; those of the small distances to the centers do not.
    bounds = bounds_of(centers)
    own = centers[jnp.searchsorted(bounds[1:-1], jnp.arange(values.size), side="right")]
    mass = jnp.diff(mass_before[bounds])
    off = jnp.diff(sums_before(weights * (values - own))[bounds])
    return jnp.where(pinned | (mass == 0), centers, centers + off / jnp.where(mass > 0, mass, 1))


def _linear(values: Array, weights: Array, count: int, seed: int) -> Array:
    """Centers from values that are sorted, `[count]`, in any order."""
    return jnp.linspace(values[0], values[-1], count)


def _plus_plus(values: Array, weights: Array, count: int, seed: int) -> Array:
    draws = jax.random.uniform(jax.random.key(seed), (count,))
    has_zero = (values == 0).any()
    if values.size > SAMPLE:  # they are sorted: every so many of them
        sample = jnp.round(jnp.linspace(0, 1, SAMPLE) * (values.size - 1)).astype(jnp.int32)
        values, weights = values[sample], weights[sample]

    def draw(near: Array, at: Array) -> tuple[Array, Array]:
        chances = jnp.cumsum(weights * near)
        place = jnp.searchsorted(chances, at * chances[-1], side="right")
        center = values[jnp.clip(place, 0, values.size - 1)]
        return jnp.minimum(near, jnp.square(values - center)), center

    first = values[jnp.searchsorted(jnp.cumsum(weights), draws[0] * weights.sum())]
    first = jnp.where(has_zero, 0, first)
    _, rest = lax.scan(draw, jnp.square(values - first), draws[1:])
    return jnp.concatenate([first[None], rest])


def _optimal(values: Array, weights: Array, count: int, seed: int) -> Array:
    """Dynamic programming over the cuts (Wang and Song, "Ckmeans.1d.dp", 2011)."""
    if count > MOST_OPTIMAL:
        return _plus_plus(values, weights, count, seed)
    places = _places(values, weights)
    mean = (weights * values).sum() / jnp.maximum(weights.sum(), jnp.finfo(jnp.float32).tiny)
    centered = values - mean  # differences of large sums lose digits
    mass, moment, square = (
        jnp.concatenate([jnp.zeros(1), jnp.cumsum(terms)])[places]
        for terms in (weights, weights * centered, weights * jnp.square(centered))
    )
    inside, first, second = (x[None] - x[:, None] for x in (mass, moment, square))
    cost = jnp.maximum(second - jnp.square(first) / jnp.where(inside > 0, inside, 1), 0)
    cost = jnp.where(places[None] >= places[:, None], cost, jnp.inf)

    def longer(least: Array, _: None) -> tuple[Array, Array]:
        total = least[:, None] + cost
        return total.min(0), total.argmin(0)

    _, cuts = lax.scan(longer, cost[0], None, length=count - 1)

    # The center at zero has no interval: its values weigh nothing here.
    idle = (values == 0).any() & (jnp.arange(count - 1) == count - 2)

    def back(end: Array, level: tuple[Array, Array]) -> tuple[Array, Array]:
        cut, idle = level
        begin = jnp.where(idle, end, cut[end])
        return begin, begin

    _, starts = lax.scan(back, jnp.int32(places.size - 1), (cuts, idle), reverse=True)
    ends = jnp.concatenate([jnp.zeros(1, starts.dtype), starts, jnp.full(1, places.size - 1)])
    held, moved = jnp.diff(mass[ends]), jnp.diff(moment[ends])
    alone = values[jnp.minimum(places[ends[:-1]], values.size - 1)]
    centers = jnp.where(held > 0, mean + moved / jnp.where(held > 0, held, 1), alone)
    return jnp.where((values == 0).any(), centers.at[-1].set(0), centers)


def _places(values: Array, weights: Array) -> Array:
    """Where cuts may lie, ascending from 0 to n, at most PLACES + 1 of them.

    Many centers lie with a density of the cube root of that of the weights (Panter and Dite 1951):
    between two values, by the cube root of their weight times the square of the gap.
    """
    if values.size <= PLACES:
        return jnp.arange(values.size + 1)
    gap = jnp.diff(values, prepend=values[:1])
    share = jnp.cumsum(jnp.cbrt(weights * jnp.square(gap)))
    wanted = jnp.linspace(0, 1, PLACES + 1)[1:-1] * share[-1]
    inner = jnp.searchsorted(share, wanted, side="right")
    ends = jnp.zeros(1, inner.dtype), jnp.full(1, values.size, inner.dtype)
    return jnp.concatenate([ends[0], inner, ends[1]])


INITS: dict[str, Callable[[Array, Array, int, int], Array]] = {
    "optimal": _optimal,
    "linear": _linear,
    "kmeans++": _plus_plus,
}
