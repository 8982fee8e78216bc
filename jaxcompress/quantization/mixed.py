"""Mixed precision: every parameter in the number format that pays best under a budget of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxcompress.core.arrays.base import CompressedArray, dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model, of_arrays
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.layerwise.grid import Grid, nearest
from jaxcompress.layerwise.pieces import with_leaves
from jaxcompress.quantization.allocation import Allocation, allocate
from jaxcompress.quantization.candidates import DENSE, Candidate, Trials
from jaxcompress.quantization.sensitivity import By, sensitivities


def mixed(
    model: Model,
    *,
    calibration: Any,
    average_bits: float = 4.0,
    candidates: str = "2,3,4,8",
    group_size: int = 128,
    symmetric: bool = True,
    by: By = "kl",
    windows: int = 8,
    tied: bool = True,
) -> Model:
    """Mixed precision: every parameter in the format that pays best, then rounded to nearest.

    What the model loses by each parameter in each format is measured or estimated with the others
    dense (`quantization.sensitivity`), and an integer programme finds the assignment of the least
    summed loss within the budget (`quantization.allocation`). The notes of the result say what each
    parameter got and what the alternatives would have cost.

    Source: Dong et al., "HAWQ-V2", arXiv:1911.03852, section 3 (traces); Yao et al., "HAWQ-V3",
    arXiv:2011.10680, section 4 (the integer programme).

    Args:
      model: any.
      calibration: inputs `[samples, ...]`.
      average_bits: the budget: bits per weight of the selected parameters together, scales and
        zero points counted.
      candidates: formats, by comma: bits of integers, names as `dtype` has them, or "dense".
      group_size: contracted columns of an integer that share a scale; -1: one scale per row.
      symmetric: of integers: fixed zero in the middle; otherwise a zero point per group.
      by: "kl" measures the divergence of the predictions; "output_error" that of any outputs;
        "fisher", "hessian_trace" and "kronecker" estimate, which is cheaper.
      windows: calibration samples that the loss is measured on, the first ones; 0: all.
      tied: parameters that read the same values get the same format, as engines that fuse them
        need.

    Returns:
      The model with compressed parameters, some of them in other formats than others.

    Raises:
      InputError: no such format, or a budget that no assignment meets; says the least possible.
    """
    whole, restored = of_arrays(model)
    found = mixed_allocation(
        whole,
        calibration=calibration,
        average_bits=average_bits,
        candidates=candidates,
        group_size=group_size,
        symmetric=symmetric,
        by=by,
        windows=windows,
        tied=tied,
    )
    chosen = found.candidates()
    data = _data(whole, calibration, windows)
    trials = Trials.of(whole, found.table.candidates, data.inputs, found.table.paths)
    leaves = {}
    for path, stored in trials.matrices.items():
        grid = chosen[path].grid
        if grid is not None:
            leaves[path] = stored.put_back(_nearest(stored.matrix(), grid))
    params = with_leaves(whole.params, leaves)
    return restored(whole.replace(params=params, notes=(*whole.notes, *notes(found))))


def mixed_allocation(
    model: Model,
    paths: Sequence[str] | None = None,
    *,
    calibration: Any,
    average_bits: float = 4.0,
    candidates: str | Sequence[Any] = "2,3,4,8",
    group_size: int = 128,
    symmetric: bool = True,
    by: By = "kl",
    windows: int = 8,
    tied: bool = True,
) -> Allocation:
    """The formats that `mixed` would round to, for any method that rounds.

    `overrides()` and `dense()` of the result are what `compress` takes as `overrides` and
    `exclude`.

    Args:
      model: see `mixed`.
      paths: of the parameters; None: the linear weights of the reference models, elsewhere every
        `kernel`.
      calibration: see `mixed`.
      average_bits: see `mixed`.
      candidates: see `mixed`; or a list as `sensitivities` takes it.
      group_size: see `mixed`.
      symmetric: see `mixed`.
      by: see `mixed`.
      windows: see `mixed`.
      tied: see `mixed`.

    Raises:
      InputError: see `mixed`.
    """
    data = _data(model, calibration, windows)
    labels = () if data.labels is None else (data.labels,)
    listed = candidates
    if isinstance(candidates, str):
        listed = [_candidate(name, group_size, symmetric) for name in candidates.split(",")]
    table = sensitivities(
        model, list(listed), calibration=(*data.inputs, *labels), paths=paths, by=by
    )
    return allocate(table, bits=average_bits, tied=tied)


def notes(allocation: Allocation) -> list[str]:
    """What a person ought to know: the sum, and for each parameter its format and the others."""
    table = allocation.table
    told = [
        f"mixed: {allocation.bits:.3f} bits a weight, predicted loss {allocation.cost:.3g} "
        f"{table.unit} by {table.by}"
    ]
    for path, costs, chosen in zip(table.paths, table.costs, allocation.choice, strict=True):
        each = [
            f"{c.name} {cost:.2g}"
            for c, cost in zip(table.candidates, costs, strict=True)
            if np.isfinite(cost)
        ]
        told.append(f"{path}: {table.candidates[chosen].name} (losses: {', '.join(each)})")
    return told


def _data(model: Model, calibration: Any, windows: int) -> Calibration:
    """The first windows of the calibration data."""
    if windows < 0:
        raise InputError(f"windows {windows}: 1 or more, or 0: all")
    data = Calibration.of(calibration, model, samples=32, ctx=512, seed=0)
    count = windows or len(data.inputs[0])
    labels = None if data.labels is None else data.labels[:count]
    return Calibration(tuple(x[:count] for x in data.inputs), labels)


def _candidate(name: str, group_size: int, symmetric: bool) -> Candidate:
    """Of a name such as `4`, `int4`, `mxfp4` or `dense`.

    All options that decide are said, so that others given to a method for all parameters do not
    reach in.
    """
    name = name.strip()
    bits = name.removeprefix("int")
    if name == DENSE:
        return Candidate.of(DENSE)
    if bits.isdigit():
        options: Mapping[str, Any] = {"bits": int(bits), "group_size": group_size}
        return Candidate.of(options if symmetric else {**options, "symmetric": False})
    # fp8 with a scale per row, as engines multiply it; 128 stands for the other formats' own.
    size = -1 if name.startswith("fp8") else 128
    return Candidate.of({"dtype": name, "group_size": size})


@partial(jax.jit, static_argnums=1)
def _nearest(matrix: Any, grid: Grid) -> CompressedArray:
    return nearest(grid, dense(matrix))
