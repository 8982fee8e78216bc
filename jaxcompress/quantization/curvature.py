"""What rounding costs, estimated from the curvature of the loss at the dense model.

A change D of a parameter costs the loss about D' C D / 2, C its curvature; estimates differ in what
they take for C. All are in nats per prediction; `[*lead, N, K]` is the stored matrix:

  fisher         the diagonal of the empirical Fisher matrix: sum F D^2 / 2 (LeCun et al. 1989,
                 "Optimal Brain Damage", equation 5, with F for the diagonal of the Hessian)
  hessian_trace  the Hessian's mean eigenvalue: tr(C) / n |D|^2 / 2 (Dong et al., "HAWQ-V2",
                 arXiv:1911.03852, section 3)
  kronecker      inputs and output gradients, independent: tr(G D H D') / 2 (Martens and Grosse,
                 arXiv:1503.05671, section 3)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.core.arrays.base import Array, dense
from jaxcompress.core.errors import InputError
from jaxcompress.core.paths import leaves_with_paths
from jaxcompress.layerwise.calibrate import Calibration
from jaxcompress.layerwise.gradients import gradient_statistics
from jaxcompress.layerwise.losses import Loss, slope_of
from jaxcompress.layerwise.output_moments import OUTPUT_MOMENT, obstacle, output_moments
from jaxcompress.layerwise.pieces import with_leaves
from jaxcompress.layerwise.problem import Problem, StoredMatrix
from jaxcompress.layerwise.walk import Settings, walk
from jaxcompress.models import EncoderConfig
from jaxcompress.progress import progress
from jaxcompress.quantization.candidates import Trials, change

Costs = Iterator[tuple[str, int, float]]  # (path, index of the candidate, cost)


def fisher(trials: Trials, data: Calibration) -> Costs:
    """sum F D^2 / 2, F the mean square of the gradients of single predictions.

    F comes from the gradients of whole sequences, of which the predictions are taken to be
    independent of each other.
    """
    found = gradient_statistics(
        trials.model, list(trials.matrices), ["squared_gradient"], data.batches()
    )
    predictions = _predictions(trials, data)
    for path, stored in trials.matrices.items():
        squares = StoredMatrix(found[path]["squared_gradient"], stored.dims).matrix()
        for index, grid in trials.grids(path):
            cost = jnp.vdot(squares, jnp.square(change(stored.matrix(), grid)))
            yield path, index, predictions * float(cost) / 2


def hessian_trace(trials: Trials, data: Calibration, *, probes: int, seed: int) -> Costs:
    """tr(C) / n |D|^2 / 2, C the Hessian of the mean loss by the parameter's n entries."""
    if probes < 1:
        raise InputError(f"probes {probes}: one or more random directions are needed")
    traces = hessian_traces(trials, data, probes=probes, seed=seed)
    for path, stored in trials.matrices.items():
        mean = max(traces[path], 0.0) / stored.leaf.size  # a noisy trace may be below 0
        for index, grid in trials.grids(path):
            square = float(jnp.square(change(stored.matrix(), grid)).sum())
            yield path, index, mean * square / 2


def hessian_traces(
    trials: Trials, data: Calibration, *, probes: int, seed: int
) -> dict[str, float]:
    """Traces of the Hessian of the mean loss by each parameter, by Hutchinson's estimator.

    E z' C z = tr(C) for z of independent entries +1 and -1; all parameters are probed at once,
    as what is between two of them cancels on average.

    Returns:
      By path.

    Raises:
      InputError: a trace that is not finite.
    """
    params, batches = trials.model.params, data.batches()
    loss = slope_of(trials.model, batches[0])
    leaves = {
        path: dense(stored.leaf).astype(jnp.promote_types(stored.leaf.dtype, jnp.float32))
        for path, stored in trials.matrices.items()
    }
    total = dict.fromkeys(leaves, 0.0)
    count = 0.0
    keys = jax.random.split(jax.random.key(seed), probes)
    for key in progress(keys, "hessian", unit="probe"):
        for batch in batches:
            found, number = _probed(loss, leaves, params, batch, key)
            total = {path: total[path] + float(found[path]) for path in total}
            count += float(number)
    traces = {path: value / count for path, value in total.items()}
    for path, value in traces.items():
        if not np.isfinite(value):
            raise InputError(f"{path}: the trace of its Hessian is not finite")
    return traces


@partial(jax.jit, static_argnums=0)
def _probed(
    loss: Loss, leaves: dict[str, Array], params: Any, batch: Any, key: Array
) -> tuple[dict[str, Array], Array]:
    """z' C z by path, of a batch's summed loss, and the number of its predictions."""
    keys = jax.random.split(key, len(leaves))
    probe = {
        path: jax.random.rademacher(k, leaf.shape, leaf.dtype)
        for k, (path, leaf) in zip(keys, leaves.items(), strict=True)
    }

    stored = dict(leaves_with_paths(params))

    def of_leaves(leaves: Mapping[str, Array]) -> tuple[Array, Array]:
        narrow = {path: leaf.astype(stored[path].dtype) for path, leaf in leaves.items()}
        return loss(with_leaves(params, narrow), batch)

    gradient = jax.grad(of_leaves, has_aux=True)
    _, product, count = jax.jvp(gradient, (leaves,), (probe,), has_aux=True)
    return {path: jnp.vdot(probe[path], product[path]) for path in leaves}, count


def kronecker(trials: Trials, data: Calibration, *, seed: int) -> Costs:
    """tr(G D H D') / 2, H the second moment of the inputs, G that of the output gradients.

    Raises:
      InputError: the model gives no logits, or a parameter has no moment of its outputs.
    """
    paths, batches = list(trials.matrices), data.batches()
    if why := obstacle(trials.model, paths, batches[0]):
        raise InputError(f"by kronecker: {why}; use fisher")
    moments = output_moments(trials.model, paths, batches, seed=seed)
    if without := set(paths) - set(moments):
        raise InputError(f"by kronecker: {min(without)} has no moment of its outputs; use fisher")
    total = _outputs(data)
    found: dict[tuple[str, int], float] = {}

    def look(problems: list[tuple[StoredMatrix, Problem]]) -> None:
        for _, problem in problems:
            path = problem.path.split("[")[0]
            for index, grid in trials.grids(path):
                cost = float(_kronecker(change(problem.matrix, grid), **problem.statistics))
                found[path, index] = found.get((path, index), 0.0) + cost / (2 * total)

    walk(
        trials.model,
        {path: {} for path in paths},
        data.inputs,
        lambda problems: [problem.matrix for problem in problems],
        Settings(("second_moment", "count", OUTPUT_MOMENT), sequential="none"),
        known={path: {OUTPUT_MOMENT: moments[path]} for path in paths},
        look=look,
        what="sensitivity",
    )
    yield from ((path, index, cost) for (path, index), cost in found.items())


@jax.jit
def _kronecker(change: Array, second_moment: Array, count: Array, output_moment: Array) -> Array:
    """tr(G D H D') per row of inputs, summed over the leading axes: sums over rows are given."""
    product = jnp.matmul(jnp.matmul(output_moment, change), second_moment)
    return ((product * change).sum((-2, -1)) / jnp.maximum(count, 1)).sum()


def _predictions(trials: Trials, data: Calibration) -> int:
    """Predictions of a sequence, whose gradients add up to that of its mean loss."""
    is_text = data.labels is None and not isinstance(trials.model.config, EncoderConfig)
    return max(data.inputs[0].shape[1] - 1, 1) if is_text else 1


def _outputs(data: Calibration) -> int:
    """Predictions in all."""
    return data.inputs[0].size if data.labels is None else len(data.labels)
