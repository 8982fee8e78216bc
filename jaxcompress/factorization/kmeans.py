"""Weight sharing: the weights of a matrix take few values, found by k-means."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.core.arrays.affine import check_bits, groups_of
from jaxcompress.core.arrays.base import STORED, Array, CompressedArray, dense
from jaxcompress.core.arrays.codebook import Codebook, encode_codebook, scaled_down
from jaxcompress.layerwise.batch import over_lead

Init = Literal["kmeans++", "linear"]
SAMPLE = 1 << 18  # values that "kmeans++" draws from


def kmeans(
    weight: Array | CompressedArray,
    *,
    bits: int = 4,
    granularity: Literal["tensor", "channel", "group"] = "tensor",
    group_size: int = 128,
    init: Init = "kmeans++",
    steps: int = 200,
    random_seed: int = 0,
) -> Codebook:
    """Weight sharing: every weight becomes the mean of its cluster, by k-means.

    Source: Han et al., "Deep Compression", arXiv:1510.00149, section 3 (linear initialization:
    section 3.2).

    Args:
      weight: float `[*lead, N, K]`, N rows by K contracted columns.
      bits: of a code, 1 to 8: 2^bits shared values.
      granularity: what shares a table: "tensor", the matrix; "channel", each row; "group": the
        matrix, after every group of columns is divided by its largest absolute weight.
      group_size: contracted columns of a group; must divide K; -1: the whole row.
      init: "kmeans++": centers drawn one after the other, far from those before (Arthur and
        Vassilvitskii 2007), which errs least; "linear": evenly between the smallest and the
        largest weight, as the paper, which keeps large weights.
      steps: of Lloyd's algorithm at most; it ends where nothing changes.
      random_seed: of the draws of "kmeans++".

    Returns:
      The codes and the table, in the dims `[N, K]` with the dtype of `weight`. Where a matrix holds
      exact zeros, so does its table: a pruned model stays pruned.

    Raises:
      InputError: bits outside of 1..8, or a group size that does not divide K.
    """
    check_bits(bits)
    matrix = dense(weight)
    groups = groups_of(matrix.shape[-1], group_size) if granularity == "group" else 0
    shared = _sharing(bits, granularity == "channel", groups, init, steps, random_seed)
    return over_lead(shared, matrix)


@functools.cache
def _sharing(
    bits: int, per_row: bool, groups: int, init: Init, steps: int, seed: int
) -> Callable[[Array], Codebook]:
    """The solver of one matrix; the same function for the same options, compiled once."""

    def solve(matrix: Array) -> Codebook:
        wide = matrix.astype(jnp.float32)
        scale = counts = None
        if groups:
            largest = jnp.abs(matrix).reshape(*matrix.shape[:-1], groups, -1).max(-1)
            scale = jnp.where(largest > 0, largest, 1)
            # The error of a value counts as large as its scale makes it.
            squares = jnp.square(scale.astype(jnp.float32))
            counts = jnp.repeat(squares, matrix.shape[-1] // groups, axis=-1)
            wide = scaled_down(wide, scale.astype(jnp.float32))
        if counts is None:
            counts = jnp.ones_like(wide)
        rows = (matrix.shape[0], -1) if per_row else (1, -1)
        find = functools.partial(clusters, count=2**bits, init=init, steps=steps, seed=seed)
        table = jax.vmap(find)(wide.reshape(rows), counts.reshape(rows))
        return encode_codebook(
            matrix, jnp.sort(table.astype(matrix.dtype)), scale, bits=bits, dims=STORED
        )

    return solve


def clusters(
    values: Array,
    weights: Array,
    *,
    count: int,
    init: Init = "kmeans++",
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
      init: see `kmeans`.
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

    def bounds_of(centers: Array) -> Array:
        inner = jnp.searchsorted(values, (centers[1:] + centers[:-1]) / 2, side="right")
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


INITS: dict[str, Callable[[Array, Array, int, int], Array]] = {
    "linear": _linear,
    "kmeans++": _plus_plus,
}
