"""How long the product of each parameter takes in each number format: measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import dense
from jaxcompress.core.model import Model, of_arrays
from jaxcompress.core.readers.lift import lift
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.layerwise.grid import nearest
from jaxcompress.quantization.candidates import Trials

LEAST_SECONDS = 2e-3  # of one measurement: short products run several times


def measure_latency(
    model: Model,
    candidates: Sequence[Any],
    *,
    calibration: Any,
    paths: Sequence[str] | None = None,
    rows: int = 1,
    repeats: int = 15,
) -> np.ndarray:
    """Seconds of the product of each parameter in each format, float64 `[P, C]`.

    Parameters of equal shape and dtype are measured once. The candidates take turns, so that what
    else the machine does meets all of them; of the repeats, the median counts.

    Args:
      model: what is to be quantized.
      candidates: as of `sensitivities`.
      calibration: as of `sensitivities`; only the shapes count.
      paths: as of `sensitivities`.
      rows: of inputs that are multiplied at once: 1 as in generating for one user.
      repeats: measurements of each product.

    Returns:
      NaN where a format does not fit.

    Raises:
      InputError: see `sensitivities`.
    """
    model, _ = of_arrays(model)
    data = Calibration.of(calibration, model, samples=32, ctx=512, seed=0)
    trials = Trials.of(model, candidates, data.inputs, paths)
    known: dict[Any, np.ndarray] = {}
    found = []
    for path, stored in trials.matrices.items():
        matrix = dense(stored.matrix())
        key = matrix.shape, matrix.dtype, tuple(i for i, _ in trials.grids(path))
        if key not in known:
            forms = {i: nearest(grid, matrix) for i, grid in trials.grids(path)}
            for i, candidate in enumerate(trials.candidates):
                if candidate.options is None:
                    forms[i] = matrix
            known[key] = _medians(forms, len(trials.candidates), rows, repeats)
        found.append(known[key])
    return np.stack(found)


def _medians(forms: dict[int, Any], count: int, rows: int, repeats: int) -> np.ndarray:
    """Median seconds of each form's product, `[count]`; NaN where there is no form."""
    some = next(iter(forms.values()))
    x = jnp.ones((*some.shape[:-2], rows, some.shape[-1]), some.dtype)
    product = jax.jit(lift(lambda weight, x: jnp.matmul(x, jnp.swapaxes(weight, -1, -2))))
    times = dict.fromkeys(forms, 1)
    for i, form in forms.items():
        jax.block_until_ready(product(form, x))
        times[i] = max(1, round(LEAST_SECONDS / _seconds(product, form, x, 1)))
    measured: dict[int, list[float]] = {i: [] for i in forms}
    for _ in range(repeats):
        for i, form in forms.items():
            measured[i].append(_seconds(product, form, x, times[i]))
    medians = np.full(count, np.nan)
    for i, seconds in measured.items():
        medians[i] = np.median(seconds)
    return medians


def _seconds(product: Any, form: Any, x: jax.Array, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        out = product(form, x)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / times
