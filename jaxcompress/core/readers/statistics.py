"""The statistics that `capture` knows: functions of the rows that a weight multiplies.

Those of several batches, steps or devices are combined: most by adding or by taking the larger,
others by a rule of their own; `count` says over how many rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

HISTOGRAM_LOW, HISTOGRAM_HIGH, HISTOGRAM_PER_OCTAVE = -24, 16, 8
VALUE_BINS = 8192  # half of them for each sign: at least 2,048 up to the largest |x|
EXPONENT_BIAS = 160  # more than the smallest float32 has, so that 0 stands for no range at all
MOVING_RATE = 0.01  # PyTorch's `averaging_constant`


@dataclass(frozen=True)
class Statistic:
    """A statistic of rows.

    Attributes:
      name: its key in the results.
      compute: `compute(x [*batch, rows, K] float32, weight [*batch, rows] float32) -> array`, or a
        pytree of arrays; a row with weight 0 must not count.
      largest: whether several results are combined by their maximum (they are then at least 0),
        and not by their sum.
      merge: `merge(a, b)`, how two results are combined where it is neither; b comes after a.
        Zeros everywhere must be the result of no rows.
    """

    name: str
    compute: Callable[[Array, Array], Any]
    largest: bool = False
    merge: Callable[[Any, Any], Any] | None = None

    @property
    def summed(self) -> bool:
        """Whether several results are combined by their sum."""
        return not self.largest and self.merge is None

    def combine(self, a: Any, b: Any) -> Any:
        """The statistic of two sets of rows."""
        if self.merge is not None:
            return self.merge(a, b)
        return jax.tree.map(jnp.maximum if self.largest else jnp.add, a, b)

    def reduce(self, stacked: Any, axes: tuple[int, ...]) -> Any:
        """The statistic of all sets of rows along the leading `axes`, 0, 1, ..."""
        if self.merge is None:
            return jax.tree.map(lambda x: (x.max if self.largest else x.sum)(axis=axes), stacked)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(axes) :]), stacked)
        parts = [
            jax.tree.map(lambda x, i=i: x[i], flat) for i in range(len(jax.tree.leaves(flat)[0]))
        ]
        return functools.reduce(self.merge, parts)


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


def values(x: Array, weight: Array) -> dict[str, Array]:
    """A histogram of all values whose range grows with them, by doubling.

    Bins of equal width over -2^e .. 2^e with the smallest whole e that holds every |x|: those of a
    smaller range nest in those of a larger one, so that histograms merge without error, in any
    order, into that of all rows together.

    Returns:
      `counts` `[*batch, VALUE_BINS]`; `exponent` int32 `[*batch]`, e + `EXPONENT_BIAS`.
    """
    here = jnp.isfinite(x) & (weight[..., None] > 0)
    x = jnp.where(here, x, 0)
    _, exponent = jnp.frexp(jnp.abs(x).max((-2, -1), initial=0))
    exponent = jnp.where((x != 0).any((-2, -1)), exponent + EXPONENT_BIAS, 0)
    unit = jnp.ldexp(x, (EXPONENT_BIAS - exponent)[..., None, None])  # in -1 .. 1, exactly
    place = jnp.floor(unit * (VALUE_BINS // 2)).astype(jnp.int32) + VALUE_BINS // 2
    weight = jnp.broadcast_to(weight[..., None], x.shape) * here
    flat = place.reshape(-1, x.shape[-2] * x.shape[-1])
    counts = jax.vmap(_counted)(flat, weight.reshape(flat.shape))
    return {"counts": counts.reshape(*x.shape[:-2], VALUE_BINS), "exponent": exponent}


def merge_values(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    """`values` of two sets of rows."""
    exponent = jnp.maximum(a["exponent"], b["exponent"])
    first, second = (_widened(one["counts"], exponent - one["exponent"]) for one in (a, b))
    return {"counts": first + second, "exponent": exponent}


def _widened(counts: Array, doublings: Array) -> Array:
    """The counts in the bins of a range doubled so many times; both `[*batch, ...]`."""
    bins = jnp.arange(VALUE_BINS) - VALUE_BINS // 2
    by = jnp.minimum(doublings.reshape(-1, 1), 31)
    place = jnp.right_shift(bins, by) + VALUE_BINS // 2
    return jax.vmap(_counted)(place, counts.reshape(place.shape)).reshape(counts.shape)


def _counted(place: Array, weight: Array) -> Array:
    return jnp.zeros(VALUE_BINS).at[place].add(weight)


def extremes(x: Array, weight: Array) -> dict[str, Array]:
    """The smallest and the largest value, and moving averages of those of the batches.

    A batch is what one product reads at a time. The averages move by `MOVING_RATE` with each, as
    PyTorch's `MovingAverageMinMaxObserver`.

    Returns:
      `low`, `high`, `moving_low`, `moving_high` and `batches`, their number, `[*batch]` each.
    """
    here = weight[..., None] > 0
    low = jnp.where(here, x, jnp.inf).min((-2, -1), initial=jnp.inf)
    high = jnp.where(here, x, -jnp.inf).max((-2, -1), initial=-jnp.inf)
    any_row = (weight > 0).any(-1)
    low, high = jnp.where(any_row, low, 0), jnp.where(any_row, high, 0)
    batches = any_row.astype(jnp.float32)
    return {"low": low, "high": high, "moving_low": low, "moving_high": high, "batches": batches}


def merge_extremes(a: dict[str, Array], b: dict[str, Array]) -> dict[str, Array]:
    """`extremes` of the batches of a and then of b."""
    first, second = a["batches"] > 0, b["batches"] > 0
    stays = (1 - MOVING_RATE) ** b["batches"]

    def both(pick: Callable[[Array, Array], Array], name: str) -> Array:
        met = pick(a[name], b[name])
        return jnp.where(first, jnp.where(second, met, a[name]), b[name])

    def moved(x: Array, y: Array) -> Array:
        return y + (x - y) * stays

    picks: dict[str, Callable[[Array, Array], Array]] = {
        "low": jnp.minimum,
        "high": jnp.maximum,
        "moving_low": moved,
        "moving_high": moved,
        "batches": jnp.add,
    }
    return {name: both(pick, name) for name, pick in picks.items()}


COUNT = Statistic("count", lambda x, weight: weight.sum(-1))

STATISTICS = {
    s.name: s
    for s in (
        Statistic("second_moment", second_moment),
        Statistic("mean_abs", sum_abs),
        Statistic("max_abs", max_abs, largest=True),
        Statistic("histogram", histogram),
        Statistic("zeros", zeros),
        Statistic("values", values, merge=merge_values),
        Statistic("extremes", extremes, merge=merge_extremes),
    )
}
