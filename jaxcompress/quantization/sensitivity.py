"""What each parameter loses in each number format, and how large it is then: a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxcompress.core.errors import InputError
from jaxcompress.core.model import Model, of_arrays
from jaxcompress.core.readers.lift import lift
from jaxcompress.core.readers.scan_blocks import scan_blocks
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.layerwise.observe import Observer, first
from jaxcompress.layerwise.pieces import Pieces
from jaxcompress.quantization.candidates import Candidate, Trials
from jaxcompress.quantization.curvature import fisher, hessian_trace, kronecker
from jaxcompress.quantization.divergence import divergences, kl, output_error

By = Literal["kl", "output_error", "fisher", "hessian_trace", "kronecker"]


@dataclass(frozen=True)
class Sensitivities:
    """Costs and sizes of parameters by candidate.

    Attributes:
      paths: of the parameters, P of them.
      candidates: C of them.
      costs: float64 `[P, C]`: what the model loses where this parameter alone is rounded, in the
        unit of `by`; infinite where the format does not fit the parameter.
      bytes: int64 `[P, C]`: of the stored parameter, scales and zero points counted; 0 where the
        format does not fit.
      entries: int64 `[P]`: of the dense parameters.
      groups: paths that read the same values; every path is in one group.
      by: how the costs were found.
    """

    paths: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    costs: np.ndarray
    bytes: np.ndarray
    entries: np.ndarray
    groups: tuple[tuple[str, ...], ...]
    by: str

    @property
    def unit(self) -> str:
        """Of the costs."""
        return "of the outputs' squares" if self.by == "output_error" else "nats per prediction"


def sensitivities(
    model: Model,
    candidates: Sequence[Any],
    *,
    calibration: Any,
    paths: Sequence[str] | None = None,
    by: By = "kl",
    probes: int = 8,
    seed: int = 0,
) -> Sensitivities:
    """What the model loses where one parameter alone is rounded to nearest, all others dense.

    - "kl": the Kullback-Leibler divergence of the model's predictions from the dense model's,
      measured. Every parameter and candidate costs a pass over the calibration data, of the blocks
      from the parameter's on.
    - "output_error": the same passes for models that predict nothing, such as encoders: squared
      error of the outputs, as a share of their squares.
    - "fisher", "hessian_trace", "kronecker": estimates from gradients at the dense model, some
      passes for all parameters together: see `quantization.curvature`.

    Args:
      model: what is to be quantized; compressed parameters count by their dense values.
      candidates: options of number formats, such as `{"bits": 4, "group_size": 64}` or
        `{"dtype": "mxfp4"}`, or "dense".
      calibration: inputs `[samples, ...]`, or whatever `layerwise.calibrate.Calibration.of` takes.
        For "kl", windows held out from those that a rounding method is fitted to.
      paths: of the parameters; None: the linear weights of the reference models, elsewhere every
        `kernel`.
      by: how the loss is found.
      probes: random directions of "hessian_trace".
      seed: of the probes, of the labels of "kronecker", and of windows drawn from a text.

    Raises:
      InputError: no such format, a parameter that no product reads, or a model or data without
        what the measure needs.
    """
    model, _ = of_arrays(model)
    data = Calibration.of(calibration, model, samples=32, ctx=512, seed=seed)
    trials = Trials.of(model, candidates, data.inputs, paths)
    fits = np.isfinite(trials.bytes)
    costs = np.where(fits, 0.0, np.inf)
    row = {path: i for i, path in enumerate(trials.matrices)}
    for path, column, cost in _costs(trials, data, by, probes, seed):
        # A format that overflows does not fit; float32 may find a divergence just below 0.
        costs[row[path], column] = max(cost, 0.0) if np.isfinite(cost) else np.inf
    return Sensitivities(
        paths=tuple(trials.matrices),
        candidates=trials.candidates,
        costs=costs,
        bytes=np.where(fits, trials.bytes, 0).astype(np.int64),
        entries=np.array([stored.leaf.size for stored in trials.matrices.values()], np.int64),
        groups=shared_inputs(model, list(trials.matrices), data.inputs),
        by=by,
    )


def _costs(
    trials: Trials, data: Calibration, by: By, probes: int, seed: int
) -> Iterator[tuple[str, int, float]]:
    if by in ("kl", "output_error"):
        return divergences(trials, data.inputs, kl if by == "kl" else output_error)
    if by == "fisher":
        return fisher(trials, data)
    if by == "hessian_trace":
        return hessian_trace(trials, data, probes=probes, seed=seed)
    if by == "kronecker":
        return kronecker(trials, data, seed=seed)
    raise InputError(f"by {by!r}: use kl, output_error, fisher, hessian_trace or kronecker")


def shared_inputs(
    model: Model, paths: Sequence[str], inputs: Sequence[np.ndarray]
) -> tuple[tuple[str, ...], ...]:
    """The paths in groups that read the same values; what no product reads is alone.

    Serving engines fuse such matrices (query, key and value; gate and up) into one.

    Args:
      model: any.
      paths: of its matrices.
      inputs: of the model, `[samples, ...]` each; only their shapes count.
    """
    hidden: Any = tuple(jax.ShapeDtypeStruct((1, 1, *x.shape[1:]), x.dtype) for x in inputs)
    if model.blocks is None:
        walk = scan_blocks(model.apply, model.params, *first(hidden))
        model = model.replace(blocks=walk)
    joined: dict[str, set[str]] = {path: {path} for path in paths}
    known: dict[Any, Any] = {}
    for piece in Pieces(model, paths).pieces:
        key = id(piece.function), tuple(piece.selected)
        if key not in known:
            observer = Observer(piece.function, list(piece.selected), ("sum_x",))
            known[key] = observer.groups(piece.params, hidden) if piece.selected else []
        for group in known[key]:
            names = [piece.selected[path].split("[")[0] for path in group.paths]
            together = set().union(*(joined[name] for name in names))
            joined.update(dict.fromkeys(together, together))
        after = jax.eval_shape(lift(piece.function), piece.params, first(hidden))
        hidden = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), after)
    order = {path: i for i, path in enumerate(paths)}
    return tuple(dict.fromkeys(tuple(sorted(joined[p], key=order.__getitem__)) for p in paths))
