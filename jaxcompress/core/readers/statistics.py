"""The statistics that `capture` knows: functions of the rows that a weight multiplies.

All are sums (or maxima), so that those of several batches, steps or devices are combined by adding
(or taking the larger); `count` says over how many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

HISTOGRAM_LOW, HISTOGRAM_HIGH, HISTOGRAM_PER_OCTAVE = -24, 16, 8


@dataclass(frozen=True)
class Statistic:
    """A statistic of rows.

    Attributes:
      name: its key in the results.
      compute: `compute(x [*batch, rows, K] float32, weight [*batch, rows] float32) -> array`, or a
        pytree of arrays; a row with weight 0 must not count.
      largest: whether several results are combined by their maximum (they are then at least 0),
        and not by their sum.
    """

    name: str
    compute: Callable[[Array, Array], Any]
    largest: bool = False

    def combine(self, a: Any, b: Any) -> Any:
        """The statistic of two sets of rows."""
        return jax.tree.map(jnp.maximum if self.largest else jnp.add, a, b)

    def reduce(self, stacked: Any, axes: tuple[int, ...]) -> Any:
        """The statistic of all sets of rows along `axes`."""
        return jax.tree.map(lambda x: (x.max if self.largest else x.sum)(axis=axes), stacked)


def second_moment(x: Array, weight: Array) -> Array:
    """X'X `[*batch, K, K]`."""
    return jnp.einsum(
        "...tk,...tl->...kl", x * weight[..., None], x, precision=lax.Precision.HIGHEST
    )


def sum_abs(x: Array, weight: Array) -> Array:
    """Sum of |x| `[*batch, K]`; divided by the count, the mean."""
    return (jnp.abs(x) * weight[..., None]).sum(-2)


def max_abs(x: Array, weight: Array) -> Array:
    """Largest |x| `[*batch, K]`."""
    return jnp.where(weight[..., None] > 0, jnp.abs(x), 0).max(-2, initial=0)


def zeros(x: Array, weight: Array) -> Array:
    """Number of zeros `[*batch, K]`; divided by the count, their fraction."""
    return ((x == 0) * weight[..., None]).sum(-2)


def histogram(x: Array, weight: Array) -> Array:
    """How many |x| lie in each bin of `histogram_edges`, `[*batch, bins]`; zeros: the first."""
    bins = (HISTOGRAM_HIGH - HISTOGRAM_LOW) * HISTOGRAM_PER_OCTAVE
    place = (jnp.log2(jnp.abs(x)) - HISTOGRAM_LOW) * HISTOGRAM_PER_OCTAVE
    place = jnp.clip(jnp.floor(place), 0, bins - 1).astype(jnp.int32)
    weight = jnp.broadcast_to(weight[..., None], x.shape)
    flat = place.reshape(-1, *x.shape[-2:])
    counts = jax.vmap(lambda p, w: jnp.zeros(bins).at[p].add(w))(flat, weight.reshape(flat.shape))
    return counts.reshape(*x.shape[:-2], bins)


def histogram_edges() -> np.ndarray:
    """Edges of the bins of `histogram`: 8 to the octave, from 2^-24 to 2^16."""
    bins = (HISTOGRAM_HIGH - HISTOGRAM_LOW) * HISTOGRAM_PER_OCTAVE
    return 2.0 ** (HISTOGRAM_LOW + np.arange(bins + 1) / HISTOGRAM_PER_OCTAVE)


COUNT = Statistic("count", lambda x, weight: weight.sum(-1))

STATISTICS = {
    s.name: s
    for s in (
        Statistic("second_moment", second_moment),
        Statistic("mean_abs", sum_abs),
        Statistic("max_abs", max_abs, largest=True),
        Statistic("histogram", histogram),
        Statistic("zeros", zeros),
    )
}
