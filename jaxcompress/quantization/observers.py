"""Ranges of activations: from what was seen of the values to what a format shall cover.

What was seen are the statistics "extremes" and "values" of `core.readers.statistics`: smallest and
largest values, their moving averages, and a histogram of fixed size whose range doubles as needed.
An observer turns them into (low, high). The histograms are a few thousand numbers per matrix, so
this runs in NumPy, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.inputs import FLOATS, INTEGERS
from jaxcompress.core.arrays.minifloat import FORMATS, from_codes, to_codes
from jaxcompress.core.errors import InputError
from jaxcompress.core.readers.statistics import EXPONENT_BIAS

STATISTICS = {
    "minmax": ("extremes",),
    "moving": ("extremes",),
    "percentile": ("extremes", "values"),
    "entropy": ("extremes", "values"),
    "mse": ("extremes", "values"),
}
FEWEST_BINS = 128  # that the entropy observer keeps, as TensorRT does
CANDIDATES = 200  # ranges that the MSE observer tries


class Seen:
    """What was seen of the input of one matrix.

    Args:
      statistics: `extremes`, and `values` where there is a histogram; without leading axes.

    Attributes:
      low: the smallest value seen.
      high: the largest.
      counts: of the bins of the histogram.
      edges: of the bins, one more than `counts`.
    """

    def __init__(self, statistics: Mapping[str, Any]) -> None:
        self.extremes = {name: float(value) for name, value in statistics["extremes"].items()}
        self.low, self.high = self.extremes["low"], self.extremes["high"]
        if "values" in statistics:
            histogram = statistics["values"]
            self.counts = np.asarray(histogram["counts"], np.float64)
            exponent = int(histogram["exponent"]) - EXPONENT_BIAS
            self.edges = np.linspace(-1.0, 1.0, len(self.counts) + 1) * 2.0**exponent

    @property
    def centers(self) -> np.ndarray:
        """Middle of each bin."""
        return (self.edges[:-1] + self.edges[1:]) / 2

    def magnitudes(self) -> tuple[np.ndarray, float]:
        """Counts of |x| in bins from 0 up to the last that is not empty, and their width."""
        middle = len(self.counts) // 2
        folded = self.counts[middle:] + self.counts[:middle][::-1]
        used = np.flatnonzero(folded)
        return folded[: used[-1] + 1 if len(used) else 1], float(self.edges[1] - self.edges[0])

    def within(self, low: float, high: float) -> tuple[float, float]:
        """A range cut to what was seen."""
        return max(low, self.low), min(high, self.high)


def observed_range(
    statistics: Mapping[str, Any],
    observer: str,
    *,
    input_dtype: str = "int8",
    symmetric: bool = True,
    percentile: float = 99.99,
) -> tuple[np.ndarray, np.ndarray]:
    """The range that an observer chooses.

    Args:
      statistics: `STATISTICS[observer]` by name, with any leading axes `[*lead]`.
      observer: "minmax": all that was seen; "moving": the moving averages of the batches' extremes;
        "percentile", "entropy" and "mse": see the functions of these names.
      input_dtype: the format that is to cover it, as of `QuantizedInput`.
      symmetric: whether the format has no zero point.
      percentile: for the observer of that name.

    Returns:
      low and high, float32 `[*lead]`.

    Raises:
      InputError: an unknown observer, a percentile out of range, or one that saw nothing.
    """
    if observer not in STATISTICS:
        raise InputError(f"activation_range {observer!r}: use one of {', '.join(STATISTICS)}")
    if not 50 < percentile <= 100:
        raise InputError(f"activation_percentile {percentile}: must lie in (50, 100]")
    choose: Callable[[Seen], tuple[float, float]] = {
        "minmax": lambda seen: (seen.low, seen.high),
        "moving": lambda seen: (seen.extremes["moving_low"], seen.extremes["moving_high"]),
        "percentile": lambda seen: percentile_range(seen, percentile, symmetric),
        "entropy": lambda seen: entropy_range(seen, input_dtype),
        "mse": lambda seen: mse_range(seen, input_dtype, symmetric),
    }[observer]
    arrays = {
        name: {part: np.asarray(value) for part, value in statistics[name].items()}
        for name in STATISTICS[observer]
    }
    lead = arrays["extremes"]["low"].shape
    ranges = np.zeros((*lead, 2), np.float32)
    for index in np.ndindex(*lead):
        one = {
            name: {part: value[index] for part, value in parts.items()}
            for name, parts in arrays.items()
        }
        if not one["extremes"]["batches"]:
            raise InputError("activations: no calibration data reached a matrix; exclude it")
        ranges[index] = choose(Seen(one))
    return ranges[..., 0], ranges[..., 1]


def percentile_range(seen: Seen, percentile: float, symmetric: bool) -> tuple[float, float]:
    """The range that leaves out the outermost values.

    Symmetric: that of the smallest t with `percentile` % of all |x| at most t; otherwise from the
    (100 - `percentile`)-th to the `percentile`-th percentile of x. Values lie evenly in a bin.
    """
    if symmetric:
        counts, width = seen.magnitudes()
        top = _quantile(counts, np.arange(len(counts) + 1) * width, percentile / 100)
        return seen.within(-top, top)
    low = _quantile(seen.counts, seen.edges, 1 - percentile / 100)
    return seen.within(low, _quantile(seen.counts, seen.edges, percentile / 100))


def _quantile(counts: np.ndarray, edges: np.ndarray, share: float) -> float:
    """The smallest value that so large a share of the values does not exceed."""
    below = np.concatenate([[0.0], np.cumsum(counts)])
    wanted = share * below[-1]
    i = max(int(np.searchsorted(below, wanted)), 1) - 1  # the bin that it lies in
    within = (wanted - below[i]) / counts[i] if counts[i] else 1.0
    return float(edges[i] + within * (edges[i + 1] - edges[i]))


def entropy_range(seen: Seen, input_dtype: str) -> tuple[float, float]:
    """The symmetric range whose rounded distribution is nearest to the clipped one, in KL.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017, as NVIDIA's calibrators have it: for
    every number of bins from 128 up, the outliers are added to the last bin kept (P), the bins are
    merged into as many levels as the format has for |x| and spread again over those that are not
    empty (Q); the least KL(P || Q) wins, of equals the widest. The bin of zeros counts as its
    neighbour.

    Raises:
      InputError: a format other than integers.
    """
    if input_dtype not in INTEGERS:
        raise InputError(f"activation_range entropy: {input_dtype} has no equal levels; use mse")
    levels = 2 ** (INTEGERS[input_dtype] - 1)
    counts, width = seen.magnitudes()
    counts = counts.copy()
    counts[0] = counts[1] if len(counts) > 1 else counts[0]
    if len(counts) <= max(FEWEST_BINS, levels) or not counts.any():
        return seen.low, seen.high
    kept = np.arange(max(FEWEST_BINS, levels), len(counts) + 1)
    best = int(np.argmin(_divergences(counts, kept, levels)[::-1]))
    top = float(kept[len(kept) - 1 - best] * width)
    return seen.within(-top, top)


def _divergences(counts: np.ndarray, kept: np.ndarray, levels: int) -> np.ndarray:
    """KL(P || Q) for each number of bins kept; by sums over levels, of which prefix sums tell."""

    def prefix(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(values)])

    # Bin j of i belongs to level floor(j * levels / i): level l starts at ceil(l * i / levels).
    starts = -(-np.arange(levels + 1) * kept[:, None] // levels)
    mass = np.diff(prefix(counts)[starts], axis=1)
    filled = np.diff(prefix(counts > 0)[starts], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(counts > 0, counts * np.log(counts), 0.0)
        spread = np.where(filled > 0, np.log(mass / filled), 0.0)  # log of Q in each level
    inside = prefix(counts)[kept]
    total = counts.sum()
    outliers = total - inside
    last = counts[kept - 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = np.where(last + outliers > 0, (last + outliers) * np.log(last + outliers), 0.0)
        shrunk = np.where(last > 0, last * np.log(last), 0.0)
        own = prefix(logs)[kept] - shrunk + grown
        other = (mass * spread).sum(axis=1) + outliers * spread[:, -1]
        divergence = (own - other) / total - np.log(total) + np.log(inside)
    # An empty last bin has no share in Q; outliers that P puts there are infinitely far from it.
    return np.where((last == 0) & (outliers > 0), np.inf, divergence)


def mse_range(seen: Seen, input_dtype: str, symmetric: bool) -> tuple[float, float]:
    """Of the range seen, shrunk in equal steps towards 0, the one of least squared error.

    Source: Banner et al., arXiv:1810.05723, section 3, by a search instead of a formula.
    """
    x, weight = seen.centers[seen.counts > 0], seen.counts[seen.counts > 0]
    shrinks = np.arange(CANDIDATES, 0, -1) / CANDIDATES

    def error(shrink: float) -> float:
        low, high = seen.low * shrink, seen.high * shrink
        return float(weight @ np.square(x - nearest(x, low, high, input_dtype, symmetric)))

    best = shrinks[int(np.argmin([error(shrink) for shrink in shrinks]))] if len(x) else 1.0
    return seen.low * best, seen.high * best


def nearest(
    x: np.ndarray, low: float, high: float, input_dtype: str, symmetric: bool
) -> np.ndarray:
    """`x` on the grid of a format that covers low .. high; `scale_of_range` in float64."""
    absmax = max(abs(low), abs(high))
    if not absmax:
        return np.zeros_like(x)
    if input_dtype in FLOATS:
        name = FLOATS[input_dtype]
        scale = absmax / FORMATS[name].largest
        return np.asarray(from_codes(to_codes(jnp.asarray(x / scale), name), name)) * scale
    levels = 2 ** INTEGERS[input_dtype] - 1
    if symmetric:
        scale, zero = absmax / (levels / 2), (levels + 1) / 2
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / levels
        zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale + zero), 0, levels) - zero) * scale
