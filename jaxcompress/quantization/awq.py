"""Activation-aware scales: weights of strong inputs get finer steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.core.arrays.base import Array
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model
from jaxcompress.layerwise.grid import Grid, grid_of, group_width, on_grid
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT
from jaxcompress.quantization.folds import Consumer, by_entry, folded, spread

STATISTICS = ("second_moment", "sum_abs", "count")
RATIOS = 20
SMALLEST = 1e-4  # of a mean, before the scales are normalised


def awq(
    model: Model,
    *,
    calibration: Any,
    dtype: str = "int",
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    weigh_outputs: bool = True,
) -> Model:
    """Scale input channels so that rounding errs least where the inputs are strong; fold it in.

    Of the matrices that share an input, s multiplies the columns, and what makes the input takes
    up 1/s: the function stays the same, and the model dense. With x the mean |input| of a channel
    and w the mean |weight| of its columns, relative to the largest of each group, the candidates
    are s = x^a and s = x^a / w^(1-a) for 20 values of a in [0, 1] (the latter from the authors'
    programs). The one is taken with the least error tr(G D H D') summed over the matrices, where
    D = Q(W s) / s - W, H are the second moments of the input, and G those of the loss's gradients
    by the outputs: what the errors cost the loss (`layerwise.output_moments`).

    Which parameters take up 1/s is derived from the function, so that every matrix is served
    for which there are any; the notes of the result name the others.

    Source: Lin et al., "AWQ", arXiv:2306.00978, section 3.2, equations 4 and 5.

    Args:
      model: any model.
      calibration: inputs `[samples, ...]`.
      dtype: number format that the weights will be rounded to, see `layerwise.grid.grid_of`.
      bits: bits of an integer weight.
      group_size: contracted columns that share a scale; -1: one scale per row.
      symmetric: fixed zero in the middle of the codes; otherwise a zero point per group.
      weigh_outputs: False: G = 1, all outputs count alike, as in the paper.

    Returns:
      The dense model of the same function, whose weights are easier to round.

    Raises:
      InputError: no such format, or calibration data of unequal lengths.
    """
    grid = grid_of(dtype, bits=bits, group_size=group_size, symmetric=symmetric)
    return folded(
        model,
        calibration,
        (*STATISTICS, OUTPUT_MOMENT) if weigh_outputs else STATISTICS,
        partial(best_scale, grid=grid),
        what="awq",
        usable=partial(_divides, grid),
    )


def best_scale(consumers: Sequence[Consumer], size: int, *, grid: Grid) -> Array:
    """s `[size]` with the least error among the candidates.

    Args:
      consumers: the matrices that share s, with `second_moment`, `sum_abs`, `count` and, where
        outputs do not count alike, `output_moment`.
      size: entries of s.
      grid: what they will be rounded to.
    """
    return _search(list(consumers), size, grid)


@partial(jax.jit, static_argnums=(1, 2))
def _search(consumers: list[Consumer], size: int, grid: Grid) -> Array:
    inputs, weights = _mean_inputs(consumers, size), _mean_weights(consumers, size, grid)
    ratios = jnp.linspace(0.0, 1.0, RATIOS)[:, None]
    by_inputs = inputs**ratios
    candidates = jnp.concatenate([by_inputs, by_inputs / weights ** (1 - ratios)])
    low, high = candidates.min(1, keepdims=True), candidates.max(1, keepdims=True)
    candidates = candidates / jnp.sqrt(low * high)
    losses = jax.lax.map(lambda scale: sum(_loss(c, scale, grid) for c in consumers), candidates)
    return candidates[jnp.nanargmin(losses)]


def _mean_inputs(consumers: list[Consumer], size: int) -> Array:
    """Mean |x| of each entry's channels, over all tokens."""
    total = jnp.zeros(size)
    count = jnp.zeros(size)
    for _, statistics, columns in consumers:
        total += by_entry(statistics["sum_abs"], columns, size)
        count += by_entry(statistics["count"][..., None], columns, size)
    return jnp.maximum(total / jnp.maximum(count, 1), SMALLEST)


def _mean_weights(consumers: list[Consumer], size: int, grid: Grid) -> Array:
    """Mean |w| of each entry's columns, relative to the largest of its row's group."""
    total = jnp.zeros(size)
    count = jnp.zeros(size)
    for matrix, _, columns in consumers:
        rows, width = matrix.shape[-2], group_width(grid, matrix.shape[-1])
        sizes = jnp.abs(matrix.astype(jnp.float32))
        grouped = sizes.reshape(*sizes.shape[:-1], -1, width)
        relative = (grouped / (grouped.max(-1, keepdims=True) + 1e-6)).reshape(sizes.shape)
        total += by_entry(relative.sum(-2), columns, size)
        count += by_entry(jnp.full(relative.shape[:-2] + relative.shape[-1:], rows), columns, size)
    return jnp.maximum(total / jnp.maximum(count, 1), SMALLEST)


def _loss(consumer: Consumer, scale: Array, grid: Grid) -> Array:
    """tr(G D H D') of the rounded matrix."""
    matrix = consumer.matrix.astype(jnp.float32)
    own = spread(scale, consumer.columns)[..., None, :]
    error = on_grid(grid, matrix * own) / own - matrix
    passed = jnp.matmul(error, consumer.statistics["second_moment"])
    outputs = consumer.statistics.get(OUTPUT_MOMENT)
    if outputs is not None:
        error = jnp.matmul(outputs, error)
    return (passed * error).sum()


def _divides(grid: Grid, columns: int) -> bool:
    try:
        grid.groups(columns)
    except InputError:
        return False
    return True
